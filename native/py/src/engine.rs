//! `Engine`: the store, the VMs and their transports, as tmemd drives them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use tmem_host::histogram;
use tmem_host::listener::SocketOptions;
use tmem_host::{Limits, VmSpec};
use tmem_store::{Incompressible, PoolError, PoolId, Recovery, StoreConfig, VmLimits};
use tmem_wire::Notice;

use crate::error::{admin_error, engine_error, open_error, raise};
use crate::figures;

fn seconds(s: f64) -> Duration {
    Duration::try_from_secs_f64(s).unwrap_or(Duration::ZERO)
}

/// Run a keeper of vsock devices at `path`, until it has held nothing and nobody was connected for `linger_s`.
#[pyfunction]
#[pyo3(signature = (path, *, linger_s=5.0))]
#[allow(clippy::needless_pass_by_value)] // as PyO3 gives it
pub(crate) fn run_keeper(py: Python<'_>, path: PathBuf, linger_s: f64) -> PyResult<()> {
    py.detach(|| tmem_host::vhost_user::keeper::run(&path, seconds(linger_s)))?;
    Ok(())
}

/// Upper bounds of the buckets of `Engine.latencies`, seconds; the last is infinite.
#[pyfunction]
pub(crate) fn latency_bounds() -> Vec<f64> {
    (0..histogram::BUCKETS).map(histogram::upper_bound_s).collect()
}

/// Runs the store, the sessions and the listeners in native threads.
#[pyclass(frozen, module = "tmem_native")]
pub(crate) struct Engine {
    engine: Arc<tmem_host::Engine>,
    recovery: Recovery,
}

#[pymethods]
impl Engine {
    /// Open the arena (a file, or anonymous memory) and recover what is in it. No guest is served before `add_vm`.
    #[new]
    #[pyo3(signature = (*, capacity_bytes, arena=None, store_incompressible=true, socket_mode=0o660, socket_gid=None,
        connections=16, connections_per_s=50, in_flight_bytes=40 << 20, in_flight_bytes_total=256 << 20, pages_per_s=0, max_in_flight=64,
        hello_timeout_s=10.0, frame_timeout_s=30.0, stall_timeout_s=30.0, keep_alive_s=0.0, busy_poll_us=50))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        capacity_bytes: u64,
        arena: Option<PathBuf>,
        store_incompressible: bool,
        socket_mode: u32,
        socket_gid: Option<u32>,
        connections: usize,
        connections_per_s: u64,
        in_flight_bytes: u64,
        in_flight_bytes_total: u64,
        pages_per_s: u64,
        max_in_flight: u32,
        hello_timeout_s: f64,
        frame_timeout_s: f64,
        stall_timeout_s: f64,
        keep_alive_s: f64,
        busy_poll_us: u64,
    ) -> PyResult<Engine> {
        let config = store_config(capacity_bytes, arena, store_incompressible);
        let limits = Limits {
            connections,
            connections_per_s,
            in_flight_bytes,
            in_flight_bytes_total,
            pages_per_s,
            max_in_flight,
            hello_timeout: seconds(hello_timeout_s),
            frame_timeout: seconds(frame_timeout_s),
            stall_timeout: seconds(stall_timeout_s),
            keep_alive: seconds(keep_alive_s),
            busy_poll: Duration::from_micros(busy_poll_us),
        };
        let sockets = SocketOptions { mode: socket_mode, gid: socket_gid };
        py.detach(|| {
            let (store, recovery) = tmem_store::Store::open(&config).map_err(open_error)?;
            let engine = tmem_host::Engine::new(Arc::new(store), limits, sockets).map_err(engine_error)?;
            Ok(Engine { engine, recovery })
        })
    }

    /// What was found in the arena.
    #[getter]
    fn recovery<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        figures::recovery(py, &self.recovery)
    }

    /// Register a VM and open its sockets.
    #[pyo3(signature = (name, *, quota_bytes, min_bytes=0, weight=100, persistent_max_bytes=None, cid=None,
        hybrid_socket=None, vhost_user_socket=None, guest_cid=None))]
    #[allow(clippy::too_many_arguments)]
    fn add_vm(
        &self,
        py: Python<'_>,
        name: &str,
        quota_bytes: u64,
        min_bytes: u64,
        weight: u32,
        persistent_max_bytes: Option<u64>,
        cid: Option<u32>,
        hybrid_socket: Option<PathBuf>,
        vhost_user_socket: Option<PathBuf>,
        guest_cid: Option<u32>,
    ) -> PyResult<()> {
        let spec = VmSpec { cid, hybrid_socket, vhost_user_socket, guest_cid };
        let limits = limits(quota_bytes, min_bytes, weight, persistent_max_bytes);
        py.detach(|| self.engine.add_vm(name, &spec, &limits)).map_err(engine_error)?;
        Ok(())
    }

    /// Let the keeper at `path` hold the vsock devices of VMs registered from now on, so that they outlive tmemd.
    fn use_keeper(&self, path: PathBuf) {
        self.engine.use_keeper(path);
    }

    /// What the endpoints of a VM have counted, by name.
    fn endpoint_counters<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyDict>> {
        let counters = py.detach(|| self.engine.endpoint_counters(name)).map_err(engine_error)?;
        let dict = PyDict::new(py);
        for (name, value) in counters {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    /// Unregister a VM, destroy and scrub its pools; returns how many pages they held.
    fn remove_vm(&self, py: Python<'_>, name: &str) -> PyResult<u64> {
        py.detach(|| self.engine.remove_vm(name)).map_err(engine_error)
    }

    /// Destroy what the arena holds of a VM that is not registered; returns how many pages that was.
    fn forget_vm(&self, py: Python<'_>, name: &str) -> PyResult<u64> {
        let store = self.engine.store();
        py.detach(|| store.find_vm(name).map_or(Ok(0), |vm| store.remove_vm(vm))).map_err(admin_error)
    }

    /// Names of the registered VMs, sorted.
    fn vms(&self) -> Vec<String> {
        self.engine.vms().iter().map(|vm| vm.name.clone()).collect()
    }

    /// Names of the VMs that the arena holds something of, registered or not.
    fn stored_vms(&self) -> Vec<String> {
        self.engine.store().vms().into_iter().map(|(_, name)| name).collect()
    }

    /// Change a VM's limits.
    #[pyo3(signature = (name, *, quota_bytes, min_bytes, weight, persistent_max_bytes=None))]
    fn set_limits(
        &self,
        py: Python<'_>,
        name: &str,
        quota_bytes: u64,
        min_bytes: u64,
        weight: u32,
        persistent_max_bytes: Option<u64>,
    ) -> PyResult<()> {
        let limits = limits(quota_bytes, min_bytes, weight, persistent_max_bytes);
        py.detach(|| self.engine.set_limits(name, &limits)).map_err(engine_error)
    }

    /// Freeze or thaw a VM.
    fn set_frozen(&self, py: Python<'_>, name: &str, frozen: bool) -> PyResult<()> {
        py.detach(|| self.engine.set_frozen(name, frozen)).map_err(engine_error)
    }

    /// A VM's limits and counters.
    fn vm<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyDict>> {
        let vm = self.engine.vm(name).map_err(engine_error)?;
        figures::vm(py, &self.engine, &vm)
    }

    /// A VM's pools.
    fn pools<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyList>> {
        let vm = self.engine.vm(name).map_err(engine_error)?;
        let list = PyList::empty(py);
        for pool in self.engine.store().pool_stats(vm.id) {
            list.append(figures::pool(py, name, &pool)?)?;
        }
        Ok(list)
    }

    /// Destroy a pool; returns how many pages it held.
    fn destroy_pool(&self, py: Python<'_>, name: &str, pool: u32) -> PyResult<u64> {
        let vm = self.engine.vm(name).map_err(engine_error)?;
        py.detach(|| self.engine.store().destroy_pool(vm.id, PoolId(pool))).map_err(|error| match error {
            PoolError::NoSuchPool => raise("not_found", &format!("VM '{name}' has no pool {pool}")),
            other => raise("invalid", &other),
        })
    }

    /// Drop a VM's ephemeral pages; returns how many.
    fn flush_ephemeral(&self, py: Python<'_>, name: &str) -> PyResult<u64> {
        let vm = self.engine.vm(name).map_err(engine_error)?;
        Ok(py.detach(|| self.engine.store().flush_ephemeral(vm.id)))
    }

    /// Ask a VM's guest to take persistent pages back; returns how many control sessions were told.
    fn reclaim(&self, py: Python<'_>, name: &str, pages: u64) -> PyResult<usize> {
        py.detach(|| self.engine.notify(name, Notice::Reclaim { pages })).map_err(engine_error)
    }

    /// Allow a VM to join a shared pool.
    fn grant_shared(&self, py: Python<'_>, uuid: [u8; 16], name: &str) -> PyResult<()> {
        let vm = self.engine.vm(name).map_err(engine_error)?;
        py.detach(|| self.engine.store().grant_shared(uuid, vm.id)).map_err(admin_error)
    }

    /// Forbid a VM to join a shared pool.
    fn revoke_shared(&self, py: Python<'_>, uuid: [u8; 16], name: &str) -> PyResult<()> {
        let vm = self.engine.vm(name).map_err(engine_error)?;
        py.detach(|| self.engine.store().revoke_shared(uuid, vm.id));
        Ok(())
    }

    /// The whole store's figures.
    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = figures::usage(py, &self.engine.store().usage())?;
        dict.set_item("connections", self.engine.connections())?;
        dict.set_item("in_flight_bytes", self.engine.in_flight_bytes())?;
        Ok(dict)
    }

    /// Change how much memory may be lent; returns what it is then.
    fn set_capacity(&self, py: Python<'_>, capacity_bytes: u64) -> PyResult<u64> {
        py.detach(|| self.engine.store().set_capacity(capacity_bytes)).map_err(admin_error)
    }

    /// Compress the pages that come in from now on, or store them raw.
    fn set_compression(&self, on: bool) {
        self.engine.store().set_compression(on);
    }

    /// Give memory back to the host; returns how much it was.
    fn free_memory(&self, py: Python<'_>, size_bytes: u64) -> u64 {
        py.detach(|| self.engine.store().free_memory(size_bytes))
    }

    /// Listen on AF_VSOCK; the peer's CID names the VM.
    fn listen_vsock(&self, port: u32) -> PyResult<()> {
        self.engine.listen_vsock(port).map_err(engine_error)
    }

    /// Stop accepting, tell the guests, answer what is in flight, close. Returns whether that was done in time.
    fn drain(&self, py: Python<'_>, patience_s: f64) -> bool {
        py.detach(|| self.engine.drain(seconds(patience_s)))
    }

    /// Latencies of a VM's pages by operation: counts by bucket and their sum in seconds.
    fn latencies<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyDict>> {
        let vm = self.engine.vm(name).map_err(engine_error)?;
        let dict = PyDict::new(py);
        for (operation, latency) in [("get", &vm.get_latency), ("put", &vm.put_latency)] {
            let snapshot = latency.snapshot();
            dict.set_item(operation, (snapshot.counts.to_vec(), snapshot.sum_ns as f64 * 1e-9))?;
        }
        Ok(dict)
    }
}

/// How to open a store whose arena is a file, or anonymous memory.
pub(crate) fn store_config(
    capacity_bytes: u64,
    arena: Option<PathBuf>,
    store_incompressible: bool,
) -> StoreConfig {
    let config = match arena {
        Some(path) => StoreConfig::file(path, capacity_bytes),
        None => StoreConfig::memfd(capacity_bytes),
    };
    let incompressible = if store_incompressible { Incompressible::StoreRaw } else { Incompressible::Refuse };
    StoreConfig { incompressible, ..config }
}

fn limits(quota_bytes: u64, min_bytes: u64, weight: u32, persistent_max_bytes: Option<u64>) -> VmLimits {
    let persistent_max_bytes = persistent_max_bytes.unwrap_or(u64::MAX);
    VmLimits { quota_bytes, min_bytes, weight, persistent_max_bytes }
}
