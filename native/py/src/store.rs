//! `Store`: the store on its own, on bytes objects. For tests: the product's pages never become Python objects.

use std::path::PathBuf;

use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use tmem_store::{Attach, PoolId, PoolRef, VmId, VmLimits};
use tmem_wire::{Encoding, GetStatus, Key, PoolCreate, PoolKind, PutStatus};

use crate::engine::store_config;
use crate::error::{admin_error, open_error};
use crate::figures;

/// A store without transports. VMs and pools go by the numbers that `add_vm` and `create_pool` return.
#[pyclass(frozen, module = "tmem_native")]
pub(crate) struct Store(tmem_store::Store);

impl Store {
    fn pool_ref(&self, vm: u16, pool: u32) -> PyResult<PoolRef> {
        self.0
            .pool(VmId(vm), PoolId(pool))
            .ok_or_else(|| PyKeyError::new_err(format!("VM {vm} has no pool {pool}")))
    }
}

fn key(object: [u8; 16], index: u32) -> Key {
    Key { object, index }
}

fn encoding(name: &str) -> PyResult<Encoding> {
    match name {
        "raw" => Ok(Encoding::Raw),
        "same_filled" => Ok(Encoding::SameFilled),
        "lz4" => Ok(Encoding::Lz4),
        other => Err(PyValueError::new_err(format!("no encoding {other:?}"))),
    }
}

#[pymethods]
impl Store {
    /// Open an arena: a file, or anonymous memory.
    #[new]
    #[pyo3(signature = (capacity_bytes, *, arena=None, store_incompressible=true))]
    fn new(
        py: Python<'_>,
        capacity_bytes: u64,
        arena: Option<PathBuf>,
        store_incompressible: bool,
    ) -> PyResult<Store> {
        let config = store_config(capacity_bytes, arena, store_incompressible);
        py.detach(|| tmem_store::Store::open(&config)).map(|(store, _)| Store(store)).map_err(open_error)
    }

    /// Register a VM; idempotent by name.
    #[pyo3(signature = (name, *, quota_bytes=u64::MAX, min_bytes=0, weight=100, persistent_max_bytes=u64::MAX))]
    fn add_vm(
        &self,
        name: &str,
        quota_bytes: u64,
        min_bytes: u64,
        weight: u32,
        persistent_max_bytes: u64,
    ) -> PyResult<u16> {
        let limits = VmLimits { quota_bytes, min_bytes, weight, persistent_max_bytes };
        self.0.add_vm(name, &limits).map(|vm| vm.0).map_err(admin_error)
    }

    /// Unregister a VM and destroy its pools; returns how many pages they held.
    fn remove_vm(&self, vm: u16) -> PyResult<u64> {
        self.0.remove_vm(VmId(vm)).map_err(admin_error)
    }

    /// The number of a VM.
    fn find_vm(&self, name: &str) -> Option<u16> {
        self.0.find_vm(name).map(|vm| vm.0)
    }

    /// Change a VM's limits.
    #[pyo3(signature = (vm, *, quota_bytes=u64::MAX, min_bytes=0, weight=100, persistent_max_bytes=u64::MAX))]
    fn set_limits(
        &self,
        vm: u16,
        quota_bytes: u64,
        min_bytes: u64,
        weight: u32,
        persistent_max_bytes: u64,
    ) -> PyResult<()> {
        let limits = VmLimits { quota_bytes, min_bytes, weight, persistent_max_bytes };
        self.0.set_limits(VmId(vm), &limits).map_err(admin_error)
    }

    /// Freeze or thaw a VM.
    fn set_frozen(&self, vm: u16, frozen: bool) -> PyResult<()> {
        self.0.set_frozen(VmId(vm), frozen).map_err(admin_error)
    }

    /// Enter a boot; returns the pools and pages destroyed with the old one, or None if it is the same boot.
    fn attach_boot(&self, vm: u16, boot_id: [u8; 16]) -> Option<(u64, u64)> {
        match self.0.attach_boot(VmId(vm), boot_id) {
            Attach::Same => None,
            Attach::Fresh { pools_destroyed, pages } => Some((pools_destroyed, pages)),
        }
    }

    /// Create a pool: kind is "persistent", "ephemeral" (inclusive) or "exclusive"; shared is a UUID.
    #[pyo3(signature = (vm, name, kind, *, shared=None))]
    fn create_pool(&self, vm: u16, name: &str, kind: &str, shared: Option<[u8; 16]>) -> PyResult<u32> {
        let kind = match kind {
            "persistent" => PoolKind::Persistent,
            "ephemeral" => PoolKind::Ephemeral { exclusive: false },
            "exclusive" => PoolKind::Ephemeral { exclusive: true },
            other => return Err(PyValueError::new_err(format!("no kind of pool {other:?}"))),
        };
        let spec = PoolCreate { shared, ..PoolCreate::private(kind, name) };
        self.0
            .create_pool(VmId(vm), &spec)
            .map(|pool| pool.0)
            .map_err(|error| PyValueError::new_err(error.to_string()))
    }

    /// Destroy a pool; returns how many pages it held.
    fn destroy_pool(&self, vm: u16, pool: u32) -> PyResult<u64> {
        self.0.destroy_pool(VmId(vm), PoolId(pool)).map_err(|error| PyKeyError::new_err(error.to_string()))
    }

    /// Put a page; returns the status: "stored", "over_quota", "frozen", "incompressible", "no_memory", "corrupt".
    #[pyo3(signature = (vm, pool, object, index, payload, *, encoding="raw", checksum=None))]
    #[allow(clippy::too_many_arguments)]
    fn put(
        &self,
        py: Python<'_>,
        vm: u16,
        pool: u32,
        object: [u8; 16],
        index: u32,
        payload: &[u8],
        encoding: &str,
        checksum: Option<u32>,
    ) -> PyResult<&'static str> {
        let pool = self.pool_ref(vm, pool)?;
        let encoding = self::encoding(encoding)?;
        let status = py.detach(|| self.0.put(&pool, &key(object, index), encoding, payload, checksum));
        Ok(match status {
            PutStatus::Stored => "stored",
            PutStatus::OverQuota => "over_quota",
            PutStatus::Frozen => "frozen",
            PutStatus::Incompressible => "incompressible",
            PutStatus::NoMemory => "no_memory",
            PutStatus::Corrupt => "corrupt",
        })
    }

    /// Get a page: (status, encoding, payload, checksum); status is "hit", "miss" or "lost".
    #[pyo3(signature = (vm, pool, object, index, *, accept_lz4=false))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        vm: u16,
        pool: u32,
        object: [u8; 16],
        index: u32,
        accept_lz4: bool,
    ) -> PyResult<(&'static str, &'static str, Bound<'py, PyBytes>, u32)> {
        let pool = self.pool_ref(vm, pool)?;
        let mut out = Vec::new();
        let (status, encoding, checksum) =
            py.detach(|| self.0.get(&pool, &key(object, index), accept_lz4, &mut out));
        let status = match status {
            GetStatus::Hit => "hit",
            GetStatus::Miss => "miss",
            GetStatus::Lost => "lost",
        };
        let encoding = match encoding {
            Encoding::None => "none",
            Encoding::Raw => "raw",
            Encoding::SameFilled => "same_filled",
            Encoding::Lz4 => "lz4",
        };
        Ok((status, encoding, PyBytes::new(py, &out), checksum))
    }

    /// Flush a page; returns whether it was there.
    fn flush_page(&self, vm: u16, pool: u32, object: [u8; 16], index: u32) -> PyResult<bool> {
        let pool = self.pool_ref(vm, pool)?;
        Ok(self.0.flush_page(&pool, &key(object, index)) == tmem_wire::FlushStatus::Flushed)
    }

    /// Flush an object; returns how many pages it had.
    fn flush_object(&self, vm: u16, pool: u32, object: [u8; 16]) -> PyResult<u64> {
        Ok(self.0.flush_object(&self.pool_ref(vm, pool)?, &object))
    }

    /// Flush a pool; returns how many pages it had.
    fn flush_pool(&self, vm: u16, pool: u32) -> PyResult<u64> {
        Ok(self.0.flush_pool(&self.pool_ref(vm, pool)?))
    }

    /// Drop a VM's ephemeral pages; returns how many.
    fn flush_ephemeral(&self, vm: u16) -> u64 {
        self.0.flush_ephemeral(VmId(vm))
    }

    /// Allow a VM to join a shared pool.
    fn grant_shared(&self, uuid: [u8; 16], vm: u16) -> PyResult<()> {
        self.0.grant_shared(uuid, VmId(vm)).map_err(admin_error)
    }

    /// Forbid it.
    fn revoke_shared(&self, uuid: [u8; 16], vm: u16) {
        self.0.revoke_shared(uuid, VmId(vm));
    }

    /// Change the capacity; returns what it is then.
    fn set_capacity(&self, py: Python<'_>, capacity_bytes: u64) -> PyResult<u64> {
        py.detach(|| self.0.set_capacity(capacity_bytes)).map_err(admin_error)
    }

    /// Compress the pages that come in from now on, or store them raw.
    fn set_compression(&self, on: bool) {
        self.0.set_compression(on);
    }

    /// Give memory back to the host; returns how much it was.
    fn free_memory(&self, py: Python<'_>, size_bytes: u64) -> u64 {
        py.detach(|| self.0.free_memory(size_bytes))
    }

    /// The store's figures.
    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        figures::usage(py, &self.0.usage())
    }

    /// A VM's figures.
    fn vm_stats<'py>(&self, py: Python<'py>, vm: u16) -> PyResult<Option<Bound<'py, PyDict>>> {
        self.0.vm_stats(VmId(vm)).map(|stats| figures::vm_stats(py, &stats)).transpose()
    }
}
