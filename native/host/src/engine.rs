//! The engine: the store, the VMs that use it, and the ways their guests arrive.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tmem_store::{AdminError, Store, VmLimits};
use tmem_wire::Notice;

use crate::company::Company;
use crate::limits::{Budget, Limits};
use crate::listener::{Acceptor, SocketOptions};
use crate::polling::Spinners;
use crate::vhost_user::{DeviceConfig, VsockDevice};
use crate::vm::{Vm, VmSpec};

/// Why the engine could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No VM of that name is registered.
    #[error("no VM '{0}' is registered")]
    NoSuchVm(String),
    /// A VM of that name is registered with another spec.
    #[error("VM '{0}' is registered with other sockets or another CID")]
    VmExists(String),
    /// Another VM has this CID.
    #[error("CID {cid} belongs to VM '{owner}'")]
    CidTaken {
        /// The CID.
        cid: u32,
        /// Whose it is.
        owner: String,
    },
    /// Another VM has this socket.
    #[error("socket {} belongs to VM '{owner}'", path.display())]
    SocketTaken {
        /// The socket.
        path: PathBuf,
        /// Whose it is.
        owner: String,
    },
    /// Something else, probably another tmemd, answers on this socket.
    #[error("socket {} is in use by another process", .0.display())]
    SocketInUse(PathBuf),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the path.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The store refused.
    #[error(transparent)]
    Store(#[from] AdminError),
    /// The engine is draining.
    #[error("the daemon is shutting down")]
    Draining,
}

/// A way a VM's guest reaches the engine: a socket that is listened on, a device. Dropping it ends it.
pub trait Endpoint: Send + Sync {
    /// The VM is removed for good: what would let a later endpoint go on in this one's place is to be given up.
    fn forget(&self) {}

    /// Names and values of what it counts.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// How long a removed VM's sessions may take to end.
const REMOVE_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Default)]
struct Registry {
    vms: HashMap<String, Arc<Vm>>,
    endpoints: HashMap<String, Vec<Box<dyn Endpoint>>>,
}

/// Everything that serves guests. Shared by listeners, sessions and the administrator's calls.
pub struct Engine {
    store: Arc<Store>,
    limits: Limits,
    in_flight: Arc<Budget>,
    registry: RwLock<Registry>,
    acceptor: Acceptor,
    sockets: SocketOptions,
    keeper: OnceLock<PathBuf>,
    pub(crate) spinners: Spinners,
    pub(crate) company: Arc<Company>,
    draining: AtomicBool,
    sessions: Mutex<usize>,
    session_ended: Condvar,
}

impl Engine {
    /// An engine with no VMs. It starts one thread, which accepts connections.
    pub fn new(
        store: Arc<Store>,
        limits: Limits,
        sockets: SocketOptions,
    ) -> Result<Arc<Engine>, EngineError> {
        let acceptor =
            Acceptor::new(sockets).map_err(|source| EngineError::Io { what: "epoll".to_owned(), source })?;
        let engine = Arc::new(Engine {
            store,
            in_flight: Budget::new(limits.in_flight_bytes_total, None),
            limits,
            registry: RwLock::default(),
            acceptor,
            sockets,
            keeper: OnceLock::new(),
            spinners: Spinners::new(),
            company: Arc::new(Company::new()),
            draining: AtomicBool::new(false),
            sessions: Mutex::new(0),
            session_ended: Condvar::new(),
        });
        engine
            .acceptor
            .run(Arc::downgrade(&engine))
            .map_err(|source| EngineError::Io { what: "starting the accepting thread".to_owned(), source })?;
        Ok(engine)
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Limits and deadlines of sessions.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Register a VM and open its endpoints. Repeating it with the same spec changes nothing; the limits are those it
    /// starts with.
    pub fn add_vm(
        self: &Arc<Engine>,
        name: &str,
        spec: &VmSpec,
        limits: &VmLimits,
    ) -> Result<Arc<Vm>, EngineError> {
        if self.is_draining() {
            return Err(EngineError::Draining);
        }
        let mut registry = self.registry.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(vm) = registry.vms.get(name) {
            return if vm.spec == *spec {
                Ok(vm.clone())
            } else {
                Err(EngineError::VmExists(name.to_owned()))
            };
        }
        for other in registry.vms.values() {
            check_distinct(spec, other)?;
        }
        let known = self.store.find_vm(name).is_some();
        let id = self.store.add_vm(name, limits)?;
        // After a restart the store knows the VM already, with the limits of then.
        self.store.set_limits(id, limits)?;
        let vm = Arc::new(Vm::new(
            name,
            id,
            spec.clone(),
            &self.limits,
            Budget::new(self.limits.in_flight_bytes, Some(self.in_flight.clone())),
            limits.weight,
        ));
        let endpoints = self.open(&vm).inspect_err(|_| {
            if !known {
                // Nothing was stored yet, so nothing can go wrong that would matter more than the error at hand.
                let _ = self.store.remove_vm(id);
            }
        })?;
        registry.endpoints.insert(name.to_owned(), endpoints);
        registry.vms.insert(name.to_owned(), vm.clone());
        Ok(vm)
    }

    fn open(self: &Arc<Engine>, vm: &Arc<Vm>) -> Result<Vec<Box<dyn Endpoint>>, EngineError> {
        let mut endpoints: Vec<Box<dyn Endpoint>> = Vec::new();
        if let Some(path) = &vm.spec.hybrid_socket {
            endpoints.push(self.acceptor.listen_hybrid(vm, path)?);
        }
        let spec = &vm.spec;
        if let (Some(front), Some(guest_cid)) = (&spec.vhost_user_socket, spec.guest_cid) {
            let config = DeviceConfig {
                vhost_user_socket: front.clone(),
                hybrid_socket: spec.hybrid_socket.clone(),
                guest_cid,
                keeper: self.keeper.get().cloned(),
                max_connections: DeviceConfig::MAX_CONNECTIONS,
                busy_poll: self.limits.busy_poll,
                sockets: self.sockets,
            };
            endpoints.push(Box::new(VsockDevice::listen(self, vm, config)?));
        }
        Ok(endpoints)
    }

    /// Let the keeper at `path` hold the vsock devices of VMs added from now on, so that they outlive this process.
    pub fn use_keeper(&self, path: PathBuf) {
        // A second call changes nothing: devices would be held in two places.
        let _ = self.keeper.set(path);
    }

    /// What a VM's endpoints have counted.
    pub fn endpoint_counters(&self, name: &str) -> Result<Vec<(&'static str, u64)>, EngineError> {
        let registry = self.registry.read().unwrap_or_else(PoisonError::into_inner);
        let endpoints = registry.endpoints.get(name).ok_or_else(|| EngineError::NoSuchVm(name.to_owned()))?;
        Ok(endpoints.iter().flat_map(|endpoint| endpoint.counters()).collect())
    }

    /// Accept AF_VSOCK connections to tmem's port; the peer's CID names the VM. The listener lives as long as the
    /// engine.
    pub fn listen_vsock(&self, port: u32) -> Result<(), EngineError> {
        self.acceptor.listen_vsock(port)
    }

    /// Unregister a VM: its sessions end, its pools are destroyed and scrubbed. Returns how many pages they held.
    pub fn remove_vm(&self, name: &str) -> Result<u64, EngineError> {
        let (vm, endpoints) = {
            let mut registry = self.registry.write().unwrap_or_else(PoisonError::into_inner);
            let vm = registry.vms.remove(name).ok_or_else(|| EngineError::NoSuchVm(name.to_owned()))?;
            (vm, registry.endpoints.remove(name))
        };
        for endpoint in endpoints.iter().flatten() {
            endpoint.forget();
        }
        drop(endpoints);
        vm.retire();
        self.wait_for_sessions(REMOVE_PATIENCE, || vm.connections() == 0);
        Ok(self.store.remove_vm(vm.id)?)
    }

    /// A registered VM.
    pub fn vm(&self, name: &str) -> Result<Arc<Vm>, EngineError> {
        let registry = self.registry.read().unwrap_or_else(PoisonError::into_inner);
        registry.vms.get(name).cloned().ok_or_else(|| EngineError::NoSuchVm(name.to_owned()))
    }

    /// All registered VMs, by name.
    pub fn vms(&self) -> Vec<Arc<Vm>> {
        let registry = self.registry.read().unwrap_or_else(PoisonError::into_inner);
        let mut vms: Vec<_> = registry.vms.values().cloned().collect();
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        vms
    }

    pub(crate) fn vm_of_cid(&self, cid: u32) -> Option<Arc<Vm>> {
        let registry = self.registry.read().unwrap_or_else(PoisonError::into_inner);
        registry.vms.values().find(|vm| vm.spec.cid == Some(cid)).cloned()
    }

    /// Change a VM's limits, and tell its guest if the quota is another.
    pub fn set_limits(&self, name: &str, limits: &VmLimits) -> Result<(), EngineError> {
        let vm = self.vm(name)?;
        let before = self.store.limits(vm.id).map(|limits| limits.quota_bytes);
        self.store.set_limits(vm.id, limits)?;
        vm.bucket.set_rate(self.limits.pages_per_s_of(limits.weight));
        vm.weight.store(limits.weight, Ordering::Relaxed);
        if before != Some(limits.quota_bytes) {
            let used_bytes = self.store.vm_stats(vm.id).map_or(0, |stats| stats.used_bytes);
            vm.notify(Notice::Quota { quota_bytes: limits.quota_bytes, used_bytes });
        }
        Ok(())
    }

    /// Freeze or thaw a VM, and tell its guest.
    pub fn set_frozen(&self, name: &str, frozen: bool) -> Result<(), EngineError> {
        let vm = self.vm(name)?;
        self.store.set_frozen(vm.id, frozen)?;
        vm.notify(Notice::Frozen(frozen));
        Ok(())
    }

    /// Send a notice to a VM's control sessions; returns how many there are.
    pub fn notify(&self, name: &str, notice: Notice) -> Result<usize, EngineError> {
        Ok(self.vm(name)?.notify(notice))
    }

    /// Stop accepting, tell the guests, let sessions answer what has arrived, and close them; those that are not done
    /// by `patience` are cut off. Returns whether all were done in time.
    pub fn drain(&self, patience: Duration) -> bool {
        self.draining.store(true, Ordering::Release);
        self.acceptor.stop();
        let endpoints = {
            let mut registry = self.registry.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut registry.endpoints)
        };
        let vms = self.vms();
        for vm in &vms {
            vm.drain();
        }
        let in_time = self.wait_for_sessions(patience, || self.connections() == 0);
        if !in_time {
            for vm in &vms {
                vm.close_all();
            }
            self.wait_for_sessions(Duration::from_secs(1), || self.connections() == 0);
        }
        drop(endpoints);
        in_time
    }

    /// Whether [`Engine::drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Connections open now.
    pub fn connections(&self) -> usize {
        *self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Large buffers held by connections now, bytes; one connection of each VM is not counted.
    pub fn in_flight_bytes(&self) -> u64 {
        self.in_flight.used()
    }

    pub(crate) fn session_began(&self) {
        *self.sessions.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    pub(crate) fn session_ended(&self) {
        *self.sessions.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.session_ended.notify_all();
    }

    /// Wait until `done`, which is asked whenever a session has ended.
    fn wait_for_sessions(&self, patience: Duration, done: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            if done() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
            // A session that ended between the question and the lock is noticed at the latest then.
            let nap = left.min(Duration::from_millis(20));
            drop(self.session_ended.wait_timeout(sessions, nap));
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.acceptor.stop();
    }
}

fn check_distinct(spec: &VmSpec, other: &Vm) -> Result<(), EngineError> {
    if let Some(cid) = spec.cid.filter(|_| spec.cid == other.spec.cid) {
        return Err(EngineError::CidTaken { cid, owner: other.name.clone() });
    }
    for path in [&spec.hybrid_socket, &spec.vhost_user_socket].into_iter().flatten() {
        let theirs = [&other.spec.hybrid_socket, &other.spec.vhost_user_socket];
        if theirs.into_iter().flatten().any(|their| their == path) {
            return Err(EngineError::SocketTaken { path: path.clone(), owner: other.name.clone() });
        }
    }
    Ok(())
}
