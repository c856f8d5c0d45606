//! What a caller says: identities, limits, configuration.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::error::AdminError;

/// Names a VM within this store. Stable while the VM is registered, also across restarts of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VmId(pub u16);

/// Names a pool. Unique in the store, so that a guest cannot name another VM's pool by accident; ownership is
/// checked all the same. Stable across restarts of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PoolId(pub u32);

/// Where the arena's memory comes from.
#[derive(Debug)]
pub enum ArenaBacking {
    /// Anonymous shared memory of this process: gone when its last descriptor is closed.
    Memfd,
    /// A file, on tmpfs or hugetlbfs: outlives the process. Its directory is created if needed.
    File(PathBuf),
    /// A memfd or file that somebody kept open for us (systemd's file-descriptor store). An empty one is formatted.
    Adopt(OwnedFd),
}

/// What happens to a page that does not compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Incompressible {
    /// It is stored as it is, and costs its full size.
    #[default]
    StoreRaw,
    /// It is refused.
    Refuse,
}

/// How to open a store.
#[derive(Debug)]
pub struct StoreConfig {
    /// Where the arena is.
    pub arena: ArenaBacking,
    /// Bytes of host memory the arena may take, rounded down to whole slabs.
    pub capacity_bytes: u64,
    /// What happens to pages that do not compress.
    pub incompressible: Incompressible,
    /// Whether pages are compressed here; [`crate::Store::set_compression`] changes it. Blocks that guests compressed
    /// are stored as they are either way.
    pub compression: bool,
    /// Bytes of a slab; `None` chooses by capacity. A power of two from 64 KiB to 2 MiB. Only for a new arena.
    pub slab_bytes: Option<u32>,
}

impl StoreConfig {
    /// An anonymous arena with the defaults.
    pub fn memfd(capacity_bytes: u64) -> StoreConfig {
        StoreConfig {
            arena: ArenaBacking::Memfd,
            capacity_bytes,
            incompressible: Incompressible::default(),
            compression: true,
            slab_bytes: None,
        }
    }

    /// An arena in a file with the defaults.
    pub fn file(path: impl Into<PathBuf>, capacity_bytes: u64) -> StoreConfig {
        StoreConfig { arena: ArenaBacking::File(path.into()), ..StoreConfig::memfd(capacity_bytes) }
    }
}

/// What a VM may use. Bytes are bytes of host memory: slots with their headers, and the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmLimits {
    /// Never more than this (cap).
    pub quota_bytes: u64,
    /// Never less than this is available to the VM, whatever the others do. The minima of all VMs must fit.
    pub min_bytes: u64,
    /// Share of the arena in proportion to the other VMs' weights: twice the weight, twice the share. From 1.
    pub weight: u32,
    /// Most bytes of persistent pages, at 4096 a page however well it compresses: what the guest may have beyond
    /// its RAM.
    pub persistent_max_bytes: u64,
}

impl Default for VmLimits {
    fn default() -> Self {
        VmLimits { quota_bytes: u64::MAX, min_bytes: 0, weight: 100, persistent_max_bytes: u64::MAX }
    }
}

impl VmLimits {
    pub(crate) fn check(&self) -> Result<(), AdminError> {
        if self.weight == 0 {
            return Err(AdminError::Limits("weight is 0; the least weight is 1".into()));
        }
        if self.min_bytes > self.quota_bytes {
            return Err(AdminError::Limits(format!(
                "the guaranteed minimum of {} bytes is over the quota of {} bytes",
                self.min_bytes, self.quota_bytes
            )));
        }
        Ok(())
    }
}

/// What [`crate::Store::attach_boot`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach {
    /// The guest has not rebooted: its pools are as it left them.
    Same,
    /// A new boot. What the old one left is destroyed.
    Fresh {
        /// Pools destroyed.
        pools_destroyed: u64,
        /// Pages destroyed with them.
        pages: u64,
    },
}
