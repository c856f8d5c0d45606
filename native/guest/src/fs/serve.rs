//! Starting and ending: check, mount, serve, unmount.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use tmem_wire::{PoolCreate, PoolKind, Role};
use xxhash_rust::xxh3::xxh3_64;

use super::abi::{init, ROOT_ID};
use super::around::{self, Around};
use super::buffer::Buffers;
use super::cache::{Cache, Host};
use super::device::{self, Device};
use super::handle::Handles;
use super::inode::Inodes;
use super::lower::{clear_dead_mounts, Lower};
use super::stat::Identity;
use super::status::{self, Names};
use super::tree::{Tree, Trust};
use super::victim::{VictimError, Victims};
use super::watch::Watch;
use super::{put, worker, Args, Changes, PutWhen};
use crate::link::{hello, Address, LinkError};
use crate::memory;

/// Why a directory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// Something about a path.
    #[error("{path}: {problem}; {hint}", path = path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to try.
        hint: &'static str,
    },
    /// FUSE is not there.
    #[error("cannot mount through /dev/fuse: {0}; load the fuse module and run as root")]
    Fuse(Errno),
    /// Something the kernel did not grant.
    #[error("{what} failed: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The link could not be prepared.
    #[error(transparent)]
    Link(#[from] LinkError),
}

fn system(what: &'static str) -> impl Fn(Errno) -> FsError {
    move |errno| FsError::System { what, source: errno.into() }
}

fn bad(path: &Path, problem: &dyn std::fmt::Display, hint: &'static str) -> FsError {
    FsError::Path { path: path.to_owned(), problem: problem.to_string(), hint }
}

/// INIT flags asked for whatever the lower directory is. Not `ATOMIC_O_TRUNC`: with it, the kernel has a file that is
/// being executed truncated before it says "text file busy".
const WANTED: u64 = init::ASYNC_READ
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::HAS_IOCTL_DIR
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT;

/// How long names and attributes are kept where nobody else changes them.
const FOREVER: Duration = Duration::from_secs(86_400);

/// The same where others' changes are reported; a bound on how long a lost report can matter.
const WATCHED: Duration = Duration::from_secs(60);

/// Mount and serve until unmounted or told to end.
#[allow(clippy::needless_pass_by_value)] // The signature all subcommands have.
pub fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    Ok(serve(&args)?)
}

fn serve(args: &Args) -> Result<(), FsError> {
    let signals = Signals::block()?;
    memory::lean_heap();
    raise_file_limit();
    let (lower_path, lower) = open_lower(args)?;
    let mount = check_mount(args, &lower_path)?;
    let cacheable = lower.reliable || args.trust_lower;
    if !cacheable && !args.no_tmem {
        log::warn!(
            "{}: tmem is not used, for its file system does not tell every change; --trust-lower uses it all the same",
            lower_path.display()
        );
    }
    let mut host = (!args.no_tmem && cacheable).then(|| host(args, &lower_path)).transpose()?;
    if host.is_some() && matches!(args.endpoint.address, Address::Vsock { .. }) {
        stay_resident();
    }
    let (device_of_lower, restrictions, fine_clock, listed_in_place) =
        (Identity::of(&lower.stat).device, lower.flags, lower.fine_clock, lower.listed_in_place);
    let inodes = Inodes::new(lower.root, &lower.stat);
    let (changes, watch) = watch(args.changes, &inodes, &lower_path)?;
    let openless = init::NO_OPEN_SUPPORT | if listed_in_place { init::NO_OPENDIR_SUPPORT } else { 0 };
    let (lifetime, wanted) = match changes {
        Changes::Watch => (WATCHED, WANTED | init::EXPLICIT_INVAL_DATA | init::CACHE_SYMLINKS),
        Changes::Check => (Duration::ZERO, WANTED | init::AUTO_INVAL_DATA),
        Changes::None => (FOREVER, WANTED | init::EXPLICIT_INVAL_DATA | init::CACHE_SYMLINKS | openless),
    };
    let device = Device::mount(&mount, &lower_path, restrictions).map_err(|errno| match errno {
        Errno::NOENT | Errno::NODEV | Errno::PERM | Errno::ACCESS => FsError::Fuse(errno),
        other => bad(&mount, &format!("mounting failed: {other}"), "look at the kernel log"),
    })?;
    let mounted = Mounted { path: mount.clone(), gone: false };
    let agreed = device.handshake(wanted).map_err(system("the first exchange with the kernel"))?;
    log::debug!("FUSE 7.{}, flags {:#x}", agreed.minor, agreed.flags);

    let victims = host.as_mut().filter(|_| args.put == PutWhen::Evicted);
    let victims = victims.and_then(|host| {
        let victims = catch_victims(&mount, device_of_lower)?;
        host.pool = pool(args, &lower_path, true);
        Some(victims)
    });
    // Elsewhere changes are promised to be seen at once, or nobody tells who may write, or what the page cache holds.
    let around = host.is_some() && changes == Changes::Watch && victims.is_none();
    let memory_kib = memory::total_kib();
    // Where the kernel reads ahead as far as a large buffer goes.
    let huge = device::read_ahead_kib(memory_kib) << 10 >= device::MAX_READ as u64;
    let buffers = Buffers::new(huge).map_err(system("allocating buffers"))?;
    let cache = Arc::new(Cache::new(host, Arc::default(), memory_kib));
    let tree = Arc::new(Tree {
        inodes,
        handles: Handles::default(),
        trust: Trust {
            lifetime,
            versions: fine_clock || changes != Changes::Check,
            // Who catches evicted pages learns from opens what the page cache holds.
            openless: agreed.flags & init::NO_OPEN_SUPPORT != 0 && victims.is_none(),
            openless_directories: agreed.flags & init::NO_OPENDIR_SUPPORT != 0,
        },
        cache: cache.clone(),
        cacheable: cache.host.is_some(),
        around: Around::new(around),
        victims: victims.is_some(),
        fine_clock,
        buffers,
    });
    if let Some(mut victims) = victims {
        let tree = tree.clone();
        spawn("tmem-victims", move || victims.run(&tree))?;
    }
    if let Some(watch) = watch {
        let (tree, device) = (tree.clone(), device.another().map_err(FsError::Fuse)?);
        spawn("tmem-watch", move || watch.run(&tree, &device))?;
    }
    if around {
        let (tree, device) = (tree.clone(), device.another().map_err(FsError::Fuse)?);
        spawn("tmem-around", move || {
            if let Err(error) = around::run(&tree, &device) {
                log::debug!("no pages are stored any more: {error}");
            }
        })?;
    }
    let workers = Workers::start(args.threads.clamp(1, 64), &tree, device)?;
    if let Err(error) = device::set_read_ahead(&mount, memory_kib) {
        log::warn!("{}: cannot set the read-ahead: {error}", mount.display());
    }
    let names = Names {
        mount: mount.clone(),
        lower: lower_path,
        endpoint: if args.no_tmem { String::new() } else { args.endpoint.to_string() },
        changes: match changes {
            Changes::Watch => "watch",
            Changes::Check => "check",
            Changes::None => "none",
        },
    };
    let socket = args
        .status_socket
        .clone()
        .unwrap_or_else(|| Path::new("/run/tmem").join(format!("fs-{}.sock", status::escape(&mount))));
    let listener = status::listen(&socket)
        .map_err(|error| bad(&socket, &error, "give another place with --status-socket"))?;
    {
        let tree = tree.clone();
        spawn("tmem-status", move || status::run(&listener, &tree, &names))?;
    }
    let putter = cache.host.clone().map(|host| {
        let cache = cache.clone();
        spawn("tmem-put", move || put::run(&cache, &host))
    });
    let putter = putter.transpose()?;
    log::info!("{} is mounted", mount.display());
    notify("READY=1");

    let told = signals.wait(workers.done.as_fd(), None)?;
    notify("STOPPING=1");
    if told {
        end(mounted, &workers, &signals, Duration::from_secs(args.linger_s.into()))?;
    } else {
        mounted.forget();
        log::info!("{} was unmounted", mount.display());
    }
    cache.close();
    if let Some(putter) = putter {
        // The thread does not panic; if it did, the process would be gone.
        let _ = putter.join();
    }
    // Gone already if another instance took the place.
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

fn end(mounted: Mounted, workers: &Workers, signals: &Signals, linger: Duration) -> Result<(), FsError> {
    let path = mounted.path.clone();
    let idle = mounted.unmount().map_err(|errno| bad(&path, &errno, "unmount it by hand"))?;
    if idle {
        log::info!("{} is unmounted", path.display());
    } else {
        log::warn!("{} is still in use, waiting {} s for its users", path.display(), linger.as_secs());
    }
    let until = Instant::now() + if idle { Duration::from_secs(5) } else { linger };
    while signals.wait(workers.done.as_fd(), Some(until))? {}
    if workers.left.load(Ordering::Acquire) > 0 {
        log::warn!("{}: users that are left get \"not connected\" from now on", path.display());
    }
    Ok(())
}

/// Have evicted pages caught, if the kernel lets us.
fn catch_victims(mount: &Path, lower: u64) -> Option<Victims> {
    let device = device::number(mount).map_err(VictimError::Refused);
    let attached = device.and_then(|device| Victims::attach(device, lower));
    attached
        .inspect_err(|error| {
            let mount = mount.display();
            log::warn!("{mount}: pages are put when they are read, not when they are evicted: {error}");
        })
        .ok()
}

/// Watch the lower file system if that is wanted and possible; how changes are met in the end.
fn watch(wanted: Changes, inodes: &Inodes, lower: &Path) -> Result<(Changes, Option<Watch>), FsError> {
    if wanted != Changes::Watch {
        return Ok((wanted, None));
    }
    let root = inodes.get(ROOT_ID).map_err(system("looking up the root"))?;
    match Watch::new(&root) {
        Ok(watch) => Ok((Changes::Watch, Some(watch))),
        Err(error) => {
            log::warn!(
                "{}: changes by others cannot be watched ({error}), asking each time",
                lower.display()
            );
            Ok((Changes::Check, None))
        }
    }
}

/// Keep this process's memory out of swap. vsock's receiving worker waits for whoever holds a socket, also while that
/// one waits, in the middle of `recv()`, for a page of its own that was swapped out. If swap is tmem's, that page comes
/// through the same worker, and nothing on vsock moves any more.
fn stay_resident() {
    if let Err(error) = memory::lock(memory::Lock::Touched) {
        log::warn!(
            "memory is not locked ({error}): {}. With swap on tmem the guest may hang",
            memory::LOCK_HINT
        );
    }
}

/// One descriptor for every file the kernel remembers: as many as the system grants.
fn raise_file_limit() {
    use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open").ok();
    let most = most.and_then(|text| text.trim().parse().ok()).unwrap_or(1 << 20);
    if setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: Some(most) }).is_err() {
        let granted = getrlimit(Resource::Nofile).maximum;
        if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: granted, maximum: granted }) {
            log::warn!("cannot raise the limit of open files: {error}");
        }
    }
}

fn open_lower(args: &Args) -> Result<(PathBuf, Lower), FsError> {
    let lower = Lower::open(&args.lower).map_err(|errno| {
        let hint = match errno {
            Errno::NOTDIR => "give a directory with --lower",
            Errno::NOENT => "create it, or give another with --lower",
            _ => "run as root on a mounted file system",
        };
        bad(&args.lower, &errno, hint)
    })?;
    let path = std::fs::canonicalize(&args.lower)
        .map_err(|error| bad(&args.lower, &error, "give an existing directory with --lower"))?;
    Ok((path, lower))
}

fn check_mount(args: &Args, lower: &Path) -> Result<PathBuf, FsError> {
    let absolute = std::path::absolute(&args.mount)
        .map_err(|error| bad(&args.mount, &error, "give a directory with --mount"))?;
    clear_dead_mounts(&absolute).map_err(|errno| bad(&absolute, &errno, "unmount it by hand"))?;
    let mount = std::fs::canonicalize(&absolute)
        .map_err(|error| bad(&absolute, &error, "create it, or give another with --mount"))?;
    if !mount.is_dir() {
        return Err(bad(&mount, &"not a directory", "give a directory with --mount"));
    }
    if mount != lower && (mount.starts_with(lower) || lower.starts_with(&mount)) {
        return Err(bad(
            &mount,
            &"one of the two directories is inside the other",
            "mount over the lower directory itself or outside of it",
        ));
    }
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let served = table.split(|&b| b == b'\n').any(|line| {
        let mut fields = line.split(|&b| b == b' ');
        fields.nth(4).is_some_and(|point| unescape(point) == mount.as_os_str().as_bytes())
            && line.windows(11).any(|part| part == b" fuse.tmem ")
    });
    if served {
        return Err(bad(&mount, &"a tmem file cache is mounted there already", "unmount it first"));
    }
    Ok(mount)
}

/// Undo the octal escapes of `/proc/self/mountinfo`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\').then(|| tail.get(..3)).flatten();
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        if let Some(value) = value {
            out.push(value);
            rest = &tail[3..];
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    out
}

fn host(args: &Args, lower: &Path) -> Result<Host, FsError> {
    let mut hello = hello(Role::FileCache, "tmem-guest fs")?;
    hello.max_frame_bytes = Host::FRAME_BYTES;
    Ok(Host {
        endpoint: args.endpoint.clone(),
        hello,
        pool: pool(args, lower, false),
        get_timeout: args.get_timeout(),
        compress: args.compress,
        connections: args.threads.clamp(1, 3),
    })
}

/// The pool for this mount's pages. A pool keeps its kind for as long as the guest runs, so each kind has its own.
fn pool(args: &Args, lower: &Path, exclusive: bool) -> PoolCreate {
    let prefix = if exclusive { "victims" } else { "fs" };
    let usual = || format!("{prefix}-{:016x}", xxh3_64(lower.as_os_str().as_bytes()));
    PoolCreate::private(PoolKind::Ephemeral { exclusive }, &args.pool_name.clone().unwrap_or_else(usual))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>, FsError> {
    let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(256 << 10);
    thread.spawn(work).map_err(|source| FsError::System { what: "starting a thread", source })
}

/// Threads that serve requests.
struct Workers {
    /// How many are left.
    left: Arc<AtomicUsize>,
    /// Readable once none is left.
    done: Arc<OwnedFd>,
}

impl Workers {
    fn start(count: usize, tree: &Arc<Tree>, device: Device) -> Result<Workers, FsError> {
        let done = eventfd(0, EventfdFlags::CLOEXEC).map_err(system("eventfd"))?;
        let workers = Workers { left: Arc::new(AtomicUsize::new(count)), done: Arc::new(done) };
        let mut devices = Vec::with_capacity(count);
        for _ in 1..count {
            devices.push(device.another().map_err(FsError::Fuse)?);
        }
        devices.push(device);
        for (n, device) in devices.into_iter().enumerate() {
            let (tree, left, done) = (tree.clone(), workers.left.clone(), workers.done.clone());
            spawn(&format!("tmem-fuse-{n}"), move || {
                if let Err(error) = worker::run(&tree, &Arc::new(device)) {
                    log::error!("a worker ended: {error}");
                }
                if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    // Cannot block: it is written once.
                    let _ = rustix::io::write(&*done, &1_u64.to_ne_bytes());
                }
            })?;
        }
        Ok(workers)
    }
}

/// The mount, taken away when dropped on a failure.
struct Mounted {
    path: PathBuf,
    gone: bool,
}

impl Mounted {
    /// Take it away; whether nobody used it any more.
    fn unmount(mut self) -> Result<bool, Errno> {
        self.gone = true;
        device::unmount(&self.path)
    }

    /// Somebody else took it away.
    fn forget(mut self) {
        self.gone = true;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.gone {
            if let Err(error) = device::detach(&self.path) {
                log::error!("{}: cannot unmount: {error}", self.path.display());
            }
        }
    }
}

/// The signals that end the program, as a descriptor.
struct Signals(OwnedFd);

impl Signals {
    /// Block them for this thread and all it starts.
    fn block() -> Result<Signals, FsError> {
        // SAFETY: the set is initialised by sigemptyset before use and outlives the calls; signalfd's result is
        // owned by nobody else.
        let fd = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(&raw mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC);
            (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))
        };
        fd.map(Signals)
            .ok_or_else(|| FsError::System { what: "signalfd", source: std::io::Error::last_os_error() })
    }

    /// Wait for a signal (`true`), or for `other` to become readable or `until` to pass (`false`).
    fn wait(&self, other: impl AsFd, until: Option<Instant>) -> Result<bool, FsError> {
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let left = left
                .map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
            let mut fds = [PollFd::new(&self.0, PollFlags::IN), PollFd::new(&other, PollFlags::IN)];
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) if !fds[1].revents().is_empty() => return Ok(false),
                Ok(_) => {
                    let mut signal = [0; size_of::<libc::signalfd_siginfo>()];
                    rustix::io::read(&self.0, &mut signal).map_err(system("reading a signal"))?;
                    return Ok(true);
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(system("poll")(errno)),
            }
        }
    }
}

/// Tell systemd, if it wants to know.
fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = UnixDatagram::unbound().and_then(|socket| match path.as_bytes().split_first() {
        Some((b'@', name)) => {
            use std::os::linux::net::SocketAddrExt;
            socket.send_to_addr(state.as_bytes(), &SocketAddr::from_abstract_name(name)?)
        }
        _ => socket.send_to(state.as_bytes(), &path),
    });
    if let Err(error) = sent {
        log::warn!("cannot notify {}: {error}", Path::new(&path).display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_unescaped() {
        assert_eq!(unescape(b"/a\\040b\\134c"), b"/a b\\c");
        assert_eq!(unescape(b"/a\\0"), b"/a\\0");
    }
}
