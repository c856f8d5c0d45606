//! The host side of tmem: how a guest's connection becomes operations on the store.
//!
//! ```text
//! listener ─ accepts on hybrid unix sockets and AF_VSOCK, names the VM ─┐
//! vhost_user ─ the vsock device inside tmemd, streams end here ─────────┤
//!                                                                       ▼
//!              connection (one thread, one buffer) ──────────────── session (sans-I/O)
//!                                                                       │ operations
//!                                                                       ▼
//!                                                                  tmem_store::Store
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`engine`] | the store, the VMs, notices to guests, draining |
//! | [`vm`] | one VM: identity, boot, open sessions, counters |
//! | [`session`] | the protocol's state machine: bytes in, bytes out |
//! | [`operations`] | what a session does to the store |
//! | [`outbox`] | how other threads reach a session: notices, closing |
//! | [`connection`] | a session on a socket |
//! | [`polling`] | bounded busy polling before a thread sleeps |
//! | `company` | which VMs are at work, and which has had more than its share |
//! | `scheduling` | how the threads that serve guests share the CPUs |
//! | [`listener`] | sockets on which guests arrive |
//! | [`limits`] | what a VM may use: connections, memory in flight, pages a second |
//! | [`vhost_user`] | a vsock device whose guest's streams end here |
//! | [`histogram`] | latencies |
//!
//! Who a client is comes from the transport, never from what it says. Nothing here knows of Python.

mod company;
pub mod connection;
pub mod engine;
pub mod histogram;
pub mod limits;
pub mod listener;
pub mod operations;
pub mod outbox;
pub mod polling;
mod scheduling;
pub mod session;
pub mod vhost_user;
pub mod vm;

pub use engine::{Endpoint, Engine, EngineError};
pub use limits::Limits;
pub use outbox::{Wake, Waker};
pub use session::{Progress, Session, SessionError, State};
pub use vm::{Vm, VmSpec};
