//! A vhost-user-vsock device inside tmemd: the guest's virtqueues end here, with no kernel hop and no socket between
//! them and the store. `docs/transport.md` describes it as a whole.
//!
//! ```text
//!   QEMU ── messages ──► front ─┐                       ┌─ peer::Local ── service ── crate::Session
//!                               ▼                       │
//!   guest ── rings ──► ring ─ chain ─ packet ─ streams ─ connection
//!                          (device)                     │
//!   host programs ── greeting ──────────────────────────┴─ peer::Stream ── unix socket `<hybrid>_<port>`
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`packet`] | the vsock header; where data comes from and goes to |
//! | [`chain`] | descriptor chains as checked ranges of guest memory |
//! | [`ring`] | one virtqueue, its notifications |
//! | [`connection`] | the state machine of one stream: credit, closing |
//! | [`peer`] | the host's end of a stream: a unix socket or a service |
//! | [`streams`] | all streams of a VM, taking turns |
//! | [`front`] | vhost-user messages and the state they add up to |
//! | [`device`] | guest memory, rings and streams together, without I/O of its own |
//! | `worker` | the thread, its sockets and its waiting |
//! | `service` | tmem's session as a peer |
//! | [`greeting`] | `CONNECT <port>` from programs of the host |
//! | [`snapshot`], [`ledger`], [`keeper`] | going on when tmemd dies |
//! | [`counters`] | what is counted |
//! | [`hostile`] | an arbitrary guest, for fuzzing |

pub mod chain;
pub mod connection;
pub mod counters;
pub mod device;
pub mod front;
pub mod greeting;
pub mod hostile;
pub mod keeper;
pub mod ledger;
pub mod packet;
pub mod peer;
pub mod ring;
mod service;
pub mod snapshot;
pub mod streams;
mod worker;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::engine::{Endpoint, Engine, EngineError};
use crate::listener::{bind, SocketOptions};
use crate::vm::Vm;
use counters::{Counters, Snapshot};
use service::DeviceWaker;
use worker::Worker;

/// How one VM's device is reached and what it may use.
#[derive(Debug, Clone)]
pub struct DeviceConfig {
    /// Where QEMU connects (`-chardev socket,path=…`).
    pub vhost_user_socket: PathBuf,
    /// The hybrid socket: programs of the host connect to it and say `CONNECT <port>`; a guest that connects to port P
    /// of the host reaches whoever listens on this path with `_P` behind
    /// it. `None`: only tmem's port leads anywhere.
    pub hybrid_socket: Option<PathBuf>,
    /// The guest's context id, at least 3.
    pub guest_cid: u32,
    /// Where the keeper listens; `None`: do without.
    pub keeper: Option<PathBuf>,
    /// Streams the VM may have open.
    pub max_connections: usize,
    /// Longest busy polling before the thread sleeps; zero turns it off.
    pub busy_poll: Duration,
    /// Who may connect to the sockets.
    pub sockets: SocketOptions,
}

impl DeviceConfig {
    /// Streams a VM may have open unless configured otherwise.
    pub const MAX_CONNECTIONS: usize = 512;
}

/// A VM's device, with a thread of its own. Dropping it resets the guest's streams and ends the thread; with a keeper,
/// a later device of the same VM goes on with the same QEMU.
pub struct VsockDevice {
    waker: Arc<DeviceWaker>,
    counters: Arc<Counters>,
    paths: Vec<PathBuf>,
    thread: Option<JoinHandle<()>>,
}

impl VsockDevice {
    /// Listen for QEMU and for programs of the host, and go on with a QEMU the keeper holds.
    ///
    /// # Errors
    /// A socket cannot be bound, or the host is short of descriptors or threads.
    pub fn listen(
        engine: &Arc<Engine>,
        vm: &Arc<Vm>,
        config: DeviceConfig,
    ) -> Result<VsockDevice, EngineError> {
        let failed = |source: std::io::Error| EngineError::Io {
            what: format!("starting the vsock device of VM {}", vm.name),
            source,
        };
        let front = bind(&config.vhost_user_socket, config.sockets)?;
        let hybrid = config.hybrid_socket.as_deref().map(|path| bind(path, config.sockets)).transpose()?;
        for socket in [Some(&front), hybrid.as_ref()].into_iter().flatten() {
            rustix::io::ioctl_fionbio(socket.as_fd(), true).map_err(|error| failed(error.into()))?;
        }
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let waker = Arc::new(DeviceWaker {
            eventfd: rustix::event::eventfd(0, flags).map_err(|error| failed(error.into()))?,
            services: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            forget: AtomicBool::new(false),
        });
        let counters = Arc::new(Counters::default());
        let mut paths = vec![config.vhost_user_socket.clone()];
        paths.extend(config.hybrid_socket.clone());
        let worker = Worker::new(engine, vm, config, front, hybrid, waker.clone(), counters.clone())
            .map_err(failed)?;
        let (company, served) = (engine.company.clone(), vm.clone());
        let thread = thread::Builder::new()
            .name(format!("vsock {}", vm.name))
            .spawn(move || {
                crate::scheduling::serve(&company, &served);
                worker.run();
            })
            .map_err(failed)?;
        Ok(VsockDevice { waker, counters, paths, thread: Some(thread) })
    }

    /// What the device has counted.
    pub fn snapshot(&self) -> Snapshot {
        self.counters.snapshot()
    }
}

impl Drop for VsockDevice {
    fn drop(&mut self) {
        self.waker.stop.store(true, Ordering::Release);
        ring::signal(&self.waker.eventfd);
        // The last owner of the engine may be a session on this very thread.
        let other = |thread: &JoinHandle<()>| thread.thread().id() != thread::current().id();
        if let Some(thread) = self.thread.take().filter(other) {
            // It does not panic by design; if it did, its message is printed already.
            let _ = thread.join();
        }
        for path in &self.paths {
            // Gone already if the directory is.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Endpoint for VsockDevice {
    fn forget(&self) {
        self.waker.forget.store(true, Ordering::Release);
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.snapshot().list()
    }
}
