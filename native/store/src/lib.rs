//! The page store: pages of many VMs, compressed, in one arena of shared memory that outlives the process.
//!
//! | module | holds |
//! |---|---|
//! | [`config`], [`error`], [`stats`] | what callers say and are told |
//! | `store` | the [`Store`] and the administrator's operations |
//! | `ops` | put, get, flush |
//! | `reclaim` | compaction, eviction, shrinking |
//! | `recover` | opening an arena |
//! | `directory`, `vm`, `pool` | who there is |
//! | `charge` | what a page costs whom |
//! | `index` | which slot holds which page |
//! | `sieve`, `tuner` | eviction order |
//! | `slabs`, `slot` | the allocator and what it gives out |
//! | `arena`, `layout` | the shared memory and what stands where in it |
//! | [`codec`] | same-filled, LZ4, checksums |
//!
//! A put is encoded outside all locks, reserves its bytes of the VM's quota, allocates and fills a slot, and becomes
//! visible and recoverable under the lock of its shard by one store. A get copies the payload under that lock and
//! decodes it outside. See `docs/store.md`.

mod arena;
mod charge;
pub mod codec;
pub mod config;
mod directory;
pub mod error;
#[doc(hidden)]
pub mod fuzz;
mod index;
mod layout;
mod ops;
mod pool;
mod reclaim;
mod recover;
mod sieve;
mod slabs;
mod slot;
pub mod stats;
mod store;
mod sync;
mod tuner;
mod vm;

pub use config::{ArenaBacking, Attach, Incompressible, PoolId, StoreConfig, VmId, VmLimits};
pub use error::{AdminError, OpenError, PoolError};
pub use pool::PoolRef;
pub use stats::{Counters, PoolStats, Recovery, Usage, VmStats};
pub use store::Store;
