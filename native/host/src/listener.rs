//! The sockets on which guests arrive: a hybrid unix socket for each VM, and AF_VSOCK for all. One thread accepts on
//! all of them; each connection then gets its own.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::event::{eventfd, EventfdFlags, Timespec};
use rustix::fs::{Gid, Mode};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::connection;
use crate::engine::{Endpoint, Engine, EngineError};
use crate::vm::Vm;

/// Connections the kernel keeps until they are accepted.
const BACKLOG: i32 = 64;
/// Pause after a failure to accept that would only repeat, such as too many open files.
const PAUSE: Duration = Duration::from_millis(50);
/// Time between two lines about unknown CIDs.
const UNKNOWN_CID_PERIOD: Duration = Duration::from_secs(5);
const STOP: u64 = 0;

/// Who may connect to the unix sockets.
#[derive(Debug, Clone, Copy)]
pub struct SocketOptions {
    /// Permissions, for instance 0o660.
    pub mode: u32,
    /// Their group; `None` for that of the process.
    pub gid: Option<u32>,
}

/// Where connections of a listener belong.
enum Arrivals {
    /// To this VM, which the socket's path names.
    Hybrid(Weak<Vm>),
    /// To the VM with the peer's CID.
    Vsock,
}

struct Listening {
    socket: OwnedFd,
    arrivals: Arrivals,
    /// Removed when the listener ends.
    path: Option<PathBuf>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // It may be gone already, with its directory; then there is nothing to do.
            let _ = fs::remove_file(path);
        }
    }
}

struct Shared {
    epoll: OwnedFd,
    stop: OwnedFd,
    listening: Mutex<HashMap<u64, Arc<Listening>>>,
    next: AtomicU64,
    options: SocketOptions,
}

/// Accepts connections.
pub(crate) struct Acceptor(Arc<Shared>);

impl Acceptor {
    pub(crate) fn new(options: SocketOptions) -> io::Result<Acceptor> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN)?;
        let next = AtomicU64::new(STOP + 1);
        Ok(Acceptor(Arc::new(Shared { epoll, stop, listening: Mutex::default(), next, options })))
    }

    /// Start the accepting thread.
    pub(crate) fn run(&self, engine: Weak<Engine>) -> io::Result<()> {
        let shared = self.0.clone();
        thread::Builder::new()
            .name("tmem-accept".to_owned())
            .stack_size(256 << 10)
            .spawn(move || shared.accept_all(&engine))?;
        Ok(())
    }

    /// Close all listeners and end the thread.
    pub(crate) fn stop(&self) {
        // The counter cannot overflow; and if it could, it would be readable all the same.
        let _ = rustix::io::write(&self.0.stop, &1u64.to_ne_bytes());
        self.0.listening.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Listen on `<path>_29805`, for connections of `vm`.
    pub(crate) fn listen_hybrid(&self, vm: &Arc<Vm>, path: &Path) -> Result<Box<dyn Endpoint>, EngineError> {
        let path = with_port(path);
        let socket = bind(&path, self.0.options)?;
        let arrivals = Arrivals::Hybrid(Arc::downgrade(vm));
        let token = self.0.add(Listening { socket, arrivals, path: Some(path.clone()) });
        token.map_err(|source| EngineError::Io { what: format!("listening on {}", path.display()), source })
    }

    pub(crate) fn listen_vsock(&self, port: u32) -> Result<(), EngineError> {
        let failed = |source| EngineError::Io { what: format!("listening on vsock port {port}"), source };
        let listener =
            vsock::VsockListener::bind_with_cid_port(vsock::VMADDR_CID_ANY, port).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        // SAFETY: into_raw_fd gives up ownership of an open descriptor, which is taken over here.
        let socket = unsafe { OwnedFd::from_raw_fd(listener.into_raw_fd()) };
        let endpoint = self.0.add(Listening { socket, arrivals: Arrivals::Vsock, path: None });
        // It lives as long as the engine.
        std::mem::forget(endpoint.map_err(failed)?);
        Ok(())
    }
}

/// One listener; dropping it closes it.
struct Handle {
    shared: Weak<Shared>,
    token: u64,
}

impl Endpoint for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            let mut all = shared.listening.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(listening) = all.remove(&self.token) {
                // Closing the last descriptor would do the same; the accepting thread may hold one for a moment.
                let _ = epoll::delete(&shared.epoll, &listening.socket);
            }
        }
    }
}

impl Shared {
    fn add(self: &Arc<Shared>, listening: Listening) -> io::Result<Box<dyn Endpoint>> {
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        let listening = Arc::new(listening);
        let mut all = self.listening.lock().unwrap_or_else(PoisonError::into_inner);
        epoll::add(&self.epoll, &listening.socket, epoll::EventData::new_u64(token), epoll::EventFlags::IN)?;
        all.insert(token, listening);
        Ok(Box::new(Handle { shared: Arc::downgrade(self), token }))
    }

    fn accept_all(&self, engine: &Weak<Engine>) {
        let mut events = Vec::with_capacity(64);
        let mut unknown_cid_logged: Option<Instant> = None;
        let mut paused: Vec<(Instant, u64)> = Vec::new();
        loop {
            events.clear();
            self.resume(&mut paused);
            let next = paused.iter().map(|&(until, _)| until).min();
            let timeout = next.and_then(|until| {
                let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                Timespec::try_from(left).ok()
            });
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "no more connections are accepted: epoll failed");
                    return;
                }
            }
            for event in &events {
                let token = event.data.u64();
                if token == STOP {
                    return;
                }
                let found =
                    self.listening.lock().unwrap_or_else(PoisonError::into_inner).get(&token).cloned();
                let (Some(listening), Some(engine)) = (found, engine.upgrade()) else { continue };
                if let Err(wait) = listening.may_arrive() {
                    // The rest waits in the kernel's queue, and whoever storms with it.
                    let data = epoll::EventData::new_u64(token);
                    if epoll::modify(&self.epoll, &listening.socket, data, epoll::EventFlags::empty()).is_ok()
                    {
                        paused.push((Instant::now() + wait, token));
                    }
                    continue;
                }
                // One each time: a storm on one socket delays the others by one connection only.
                match listening.accept() {
                    Ok(Some((socket, cid))) => {
                        listening.hand_over(&engine, socket, cid, &mut unknown_cid_logged);
                    }
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(%error, "accepting a connection failed");
                        thread::sleep(PAUSE);
                    }
                }
            }
        }
    }
}

impl Shared {
    /// Accept again on the listeners whose VMs may open connections again.
    fn resume(&self, paused: &mut Vec<(Instant, u64)>) {
        let now = Instant::now();
        paused.retain(|&(until, token)| {
            if until > now {
                return true;
            }
            let found = self.listening.lock().unwrap_or_else(PoisonError::into_inner).get(&token).cloned();
            if let Some(listening) = found {
                let data = epoll::EventData::new_u64(token);
                if let Err(error) = epoll::modify(&self.epoll, &listening.socket, data, epoll::EventFlags::IN)
                {
                    tracing::error!(%error, "a listener could not be resumed");
                }
            }
            false
        });
    }
}

impl Listening {
    /// Whether the VM may open another connection now, or after how long.
    fn may_arrive(&self) -> Result<(), Duration> {
        match &self.arrivals {
            Arrivals::Hybrid(vm) => vm.upgrade().map_or(Ok(()), |vm| vm.arrivals.take(1, Instant::now())),
            Arrivals::Vsock => Ok(()),
        }
    }

    /// The next connection, with its CID if it has one.
    fn accept(&self) -> io::Result<Option<(OwnedFd, Option<u32>)>> {
        let accepted = match &self.arrivals {
            Arrivals::Hybrid(_) => net::accept_with(&self.socket, SocketFlags::CLOEXEC)
                .map(|s| (s, None))
                .map_err(io::Error::from),
            Arrivals::Vsock => accept_vsock(self.socket.as_fd()).map(|(s, cid)| (s, Some(cid))),
        };
        match accepted {
            Ok(connection) => Ok(Some(connection)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(None)
            }
            Err(error) if error.raw_os_error() == Some(Errno::CONNABORTED.raw_os_error()) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn hand_over(
        &self,
        engine: &Arc<Engine>,
        socket: OwnedFd,
        cid: Option<u32>,
        logged: &mut Option<Instant>,
    ) {
        let (vm, peer) = match (&self.arrivals, cid) {
            (Arrivals::Hybrid(vm), _) => (vm.upgrade(), "unix".to_owned()),
            (Arrivals::Vsock, Some(cid)) => (engine.vm_of_cid(cid), format!("cid {cid}")),
            (Arrivals::Vsock, None) => (None, "cid unknown".to_owned()),
        };
        let Some(vm) = vm else {
            if logged.is_none_or(|at| at.elapsed() > UNKNOWN_CID_PERIOD) {
                *logged = Some(Instant::now());
                tracing::warn!(%peer, "connection refused: no VM with this CID is registered");
            }
            return;
        };
        // On AF_VSOCK all VMs share one queue, so that a storm is turned away instead of kept waiting.
        if cid.is_some() && vm.arrivals.take(1, Instant::now()).is_err() {
            vm.counters.connections_refused.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if let Err(error) = connection::start(engine, &vm, socket, peer) {
            tracing::warn!(vm = %vm.name, %error, "connection dropped: its thread could not start");
            thread::sleep(PAUSE);
        }
    }
}

fn accept_vsock(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, u32)> {
    // SAFETY: the descriptor is borrowed for this call only: `forget` below keeps it from being closed here.
    let listener = unsafe { vsock::VsockListener::from_raw_fd(listener.as_raw_fd()) };
    let accepted = listener.accept();
    std::mem::forget(listener);
    let (stream, address) = accepted?;
    // SAFETY: into_raw_fd gives up ownership of an open descriptor, which is taken over here.
    Ok((unsafe { OwnedFd::from_raw_fd(stream.into_raw_fd()) }, address.cid()))
}

/// The path at which a hybrid socket's guest-initiated connections to tmem's port arrive.
pub fn with_port(path: &Path) -> PathBuf {
    let mut with_port = OsString::from(path);
    with_port.push(format!("_{}", tmem_wire::PORT));
    with_port.into()
}

/// Bind a listening socket. A socket file that nobody listens on, left by a daemon that died, is replaced.
pub(crate) fn bind(path: &Path, options: SocketOptions) -> Result<OwnedFd, EngineError> {
    let failed = |what: &str, source: io::Error| EngineError::Io {
        what: format!("{what} {}", path.display()),
        source,
    };
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(|error| failed("making the directory of", error))?;
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            let error = io::Error::new(io::ErrorKind::AlreadyExists, "it exists and is not a socket");
            return Err(failed("listening on", error));
        }
        Ok(_) => {
            if UnixStream::connect(path).is_ok() {
                return Err(EngineError::SocketInUse(path.to_owned()));
            }
            fs::remove_file(path).map_err(|error| failed("replacing the stale socket", error))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("listening on", error)),
    }
    let open = || -> Result<OwnedFd, Errno> {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Before bind it sets the mode of the file to come, less the umask: nobody else can connect in between.
        rustix::fs::fchmod(&socket, Mode::from_raw_mode(options.mode))?;
        net::bind(&socket, &address)?;
        if let Some(gid) = options.gid {
            rustix::fs::chown(path, None, Some(Gid::from_raw(gid)))?;
        }
        rustix::fs::chmod(path, Mode::from_raw_mode(options.mode))?;
        net::listen(&socket, BACKLOG)?;
        Ok(socket)
    };
    open().map_err(|error| failed("listening on", error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: SocketOptions = SocketOptions { mode: 0o600, gid: None };

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Dir {
            let dir = std::env::temp_dir().join(format!("tmem-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            Dir(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        use std::os::unix::fs::PermissionsExt;
        let dir = Dir::new("stale");
        let path = dir.0.join("deeper/s");
        let first = bind(&path, OPTIONS).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(bind(&path, OPTIONS), Err(EngineError::SocketInUse(_))));
        drop(first);
        assert!(bind(&path, OPTIONS).is_ok());
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = Dir::new("file");
        let path = dir.0.join("s");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path, OPTIONS), Err(EngineError::Io { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_named() {
        let path = std::env::temp_dir().join("x".repeat(120));
        let error = bind(&path, OPTIONS).unwrap_err().to_string();
        assert!(error.contains("xxx"), "{error}");
    }
}
