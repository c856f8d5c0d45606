//! The store: what holds the parts together, and the administrator's operations.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::Arc;

use crate::sync::{Mutex, RwLock};
use tmem_wire::{PoolCreate, PAGE_BYTES};

use crate::charge::INDEX_BYTES;
use crate::config::{Attach, Incompressible, PoolId, VmId, VmLimits};
use crate::directory::Directory;
use crate::error::{AdminError, PoolError};
use crate::index::BLOCK_BYTES;
use crate::layout::{HEADER_BYTES, MAX_SLABS};
use crate::pool::{Pool, PoolRef};
use crate::slabs::Slabs;
use crate::stats::{PoolStats, Usage, VmStats};
use crate::vm::Vm;

/// The page store. All operations may be called from any number of threads.
pub struct Store {
    pub(crate) slabs: Slabs,
    pub(crate) directory: RwLock<Directory>,
    pub(crate) seed: u64,
    pub(crate) incompressible: Incompressible,
    pub(crate) compression: AtomicBool,
    /// Held by the one thread that compacts.
    pub(crate) compactor: Mutex<()>,
    /// Held while the sum of what is promised is looked at.
    pub(crate) commitments: Mutex<()>,
    pub(crate) pages_evicted: AtomicU64,
    pub(crate) pages_moved: AtomicU64,
    pub(crate) pages_lost: AtomicU64,
}

impl Store {
    /// The arena's descriptor, for handing to whoever keeps it while the daemon is replaced.
    pub fn arena_fd(&self) -> BorrowedFd<'_> {
        self.slabs.arena().fd()
    }

    /// The arena's file, if it has one.
    pub fn arena_path(&self) -> Option<&Path> {
        self.slabs.arena().path()
    }

    /// Bytes of a slab: capacity is counted in whole slabs.
    pub fn slab_bytes(&self) -> u64 {
        self.slabs.slab_bytes().into()
    }

    /// Use of the whole store.
    pub fn usage(&self) -> Usage {
        let (backed, capacity) = self.slabs.backed_and_capacity();
        let mut usage = Usage {
            capacity_bytes: u64::from(capacity) * self.slab_bytes(),
            backed_bytes: u64::from(backed) * self.slab_bytes(),
            pages_evicted: self.pages_evicted.load(Relaxed),
            pages_moved: self.pages_moved.load(Relaxed),
            pages_lost: self.pages_lost.load(Relaxed),
            ..Usage::default()
        };
        let directory = self.directory.read();
        usage.used_bytes = directory.vms().map(|vm| vm.used.used()).sum();
        for pool in directory.pools() {
            usage.pages += pool.stored.pages.load(Relaxed);
            usage.payload_bytes += pool.stored.payload_bytes.load(Relaxed);
            usage.same_filled_pages += pool.stored.same_filled.load(Relaxed);
            usage.raw_pages += pool.stored.raw.load(Relaxed);
            usage.metadata_bytes += pool.stored.blocks.load(Relaxed) * BLOCK_BYTES;
        }
        usage.raw_bytes = usage.pages * PAGE_BYTES as u64;
        usage.metadata_bytes += usage.pages * (HEADER_BYTES as u64 + INDEX_BYTES);
        usage
    }

    /// Set how much host memory the arena may take, bytes. Shrinking evicts ephemeral pages and returns memory to the
    /// host before it answers; persistent pages stay, so the answer, the capacity now in force, may be larger.
    pub fn set_capacity(&self, bytes: u64) -> Result<u64, AdminError> {
        let max = u64::from(MAX_SLABS - 1) * self.slab_bytes();
        if bytes > max {
            return Err(AdminError::Capacity { wanted: bytes, max });
        }
        {
            let _promises = self.commitments.lock();
            let minima: u64 = self.directory.read().vms().map(|vm| vm.min_bytes()).sum();
            check_minima(minima, bytes)?;
            self.slabs.set_capacity((bytes / self.slab_bytes()) as u32);
        }
        let in_force = self.shrink_to_capacity();
        Ok(u64::from(in_force) * self.slab_bytes())
    }

    /// Give the host this many bytes back now, evicting ephemeral pages as needed. Answers how many were given. The
    /// capacity stays, so the memory may be taken again as puts come in.
    pub fn free_memory(&self, bytes: u64) -> u64 {
        let want = bytes.div_ceil(self.slab_bytes());
        let freed = self.punch_slabs(want.min(MAX_SLABS.into()) as u32);
        u64::from(freed) * self.slab_bytes()
    }

    /// Compress the pages that come in from now on, or store them raw. Raw pages cost their full size and next to no
    /// time; pages stored already stay as they are.
    pub fn set_compression(&self, on: bool) {
        self.compression.store(on, Relaxed);
    }

    /// Register a VM; for a registered name, set its limits and answer the same id.
    pub fn add_vm(&self, name: &str, limits: &VmLimits) -> Result<VmId, AdminError> {
        limits.check()?;
        let _promises = self.commitments.lock();
        let mut directory = self.directory.write();
        if let Some(id) = directory.vm_named(name) {
            let vm = directory.vm(id).ok_or(AdminError::NoSuchVm)?;
            return self.apply_limits(&directory, vm, limits).map(|()| id);
        }
        let minima = directory.vms().map(|vm| vm.min_bytes()).sum::<u64>().saturating_add(limits.min_bytes);
        check_minima(minima, self.capacity_bytes())?;
        directory.add_vm(self.slabs.arena(), name, limits)
    }

    /// Forget a VM and destroy what it has stored. Answers how many pages that was.
    pub fn remove_vm(&self, vm: VmId) -> Result<u64, AdminError> {
        let entry = self.vm(vm).ok_or(AdminError::NoSuchVm)?;
        entry.gone.store(true, SeqCst);
        let pages = self.destroy_pools(vm).1;
        self.directory.write().remove_vm(self.slabs.arena(), vm);
        Ok(pages)
    }

    /// The VM of this name.
    pub fn find_vm(&self, name: &str) -> Option<VmId> {
        self.directory.read().vm_named(name)
    }

    /// Every VM with its name.
    pub fn vms(&self) -> Vec<(VmId, String)> {
        self.directory.read().vms().map(|vm| (vm.id, vm.name.clone())).collect()
    }

    /// What a VM may use.
    pub fn limits(&self, vm: VmId) -> Option<VmLimits> {
        self.directory.read().vm(vm).map(|vm| vm.limits())
    }

    /// Change what a VM may use. A quota below its usage evicts its ephemeral pages until they fit; persistent pages
    /// stay, and its puts are refused until it is under the quota again.
    pub fn set_limits(&self, vm: VmId, limits: &VmLimits) -> Result<(), AdminError> {
        limits.check()?;
        let promises = self.commitments.lock();
        let directory = self.directory.write();
        let entry = directory.vm(vm).ok_or(AdminError::NoSuchVm)?.clone();
        self.apply_limits(&directory, &entry, limits)?;
        drop((directory, promises));
        while entry.used.used() > entry.quota_bytes() && self.evict_from(&entry) {}
        Ok(())
    }

    fn apply_limits(&self, directory: &Directory, vm: &Vm, limits: &VmLimits) -> Result<(), AdminError> {
        if limits.min_bytes > vm.min_bytes() {
            let others: u64 =
                directory.vms().filter(|other| other.id != vm.id).map(|other| other.min_bytes()).sum();
            check_minima(others.saturating_add(limits.min_bytes), self.capacity_bytes())?;
        }
        vm.set_limits(limits);
        Directory::write_limits(self.slabs.arena(), vm);
        Ok(())
    }

    /// Refuse the VM's puts from now on, or take them again.
    pub fn set_frozen(&self, vm: VmId, frozen: bool) -> Result<(), AdminError> {
        let entry = self.vm(vm).ok_or(AdminError::NoSuchVm)?;
        entry.frozen.store(frozen, SeqCst);
        Directory::write_frozen(self.slabs.arena(), &entry);
        Ok(())
    }

    /// Figures of one VM.
    pub fn vm_stats(&self, vm: VmId) -> Option<VmStats> {
        let directory = self.directory.read();
        let entry = directory.vm(vm)?;
        let mut counters = *entry.past.lock();
        let (mut pages, mut pools) = ([0, 0], 0);
        for pool in directory.pools_of(vm) {
            counters += pool.counters.read();
            pages[usize::from(pool.is_persistent())] += pool.stored.pages.load(Relaxed);
            pools += 1;
        }
        Some(VmStats {
            name: entry.name.clone(),
            limits: entry.limits(),
            used_bytes: entry.used.used(),
            persistent_bytes: entry.persistent.used(),
            raw_bytes: (pages[0] + pages[1]) * PAGE_BYTES as u64,
            ephemeral_pages: pages[0],
            persistent_pages: pages[1],
            pools,
            puts_accepted: counters.puts_accepted,
            puts_refused: counters.puts_refused,
            gets_hit: counters.gets_hit,
            gets_missed: counters.gets_missed,
            pages_flushed: counters.pages_flushed,
            pages_evicted: counters.pages_evicted,
            pages_lost: counters.pages_lost,
            frozen: entry.frozen.load(Relaxed),
        })
    }

    /// Figures of each of a VM's pools.
    pub fn pool_stats(&self, vm: VmId) -> Vec<PoolStats> {
        self.directory.read().pools_of(vm).map(|pool| pool.stats()).collect()
    }

    /// A guest's connection says which boot it belongs to. The first of a new boot destroys what the old one left.
    /// `None` for an unknown VM is reported as a fresh boot without pools.
    pub fn attach_boot(&self, vm: VmId, boot_id: [u8; 16]) -> Attach {
        let Some(entry) = self.vm(vm) else { return Attach::Fresh { pools_destroyed: 0, pages: 0 } };
        let mut boot = entry.boot.lock();
        if *boot == Some(boot_id) {
            return Attach::Same;
        }
        let (pools_destroyed, pages) = self.destroy_pools(vm);
        Directory::write_boot(self.slabs.arena(), &entry, &boot_id);
        *boot = Some(boot_id);
        Attach::Fresh { pools_destroyed, pages }
    }

    /// Create a pool, or find the one of the same name and properties.
    pub fn create_pool(&self, vm: VmId, spec: &PoolCreate) -> Result<PoolId, PoolError> {
        let mut directory = self.directory.write();
        let entry = directory.vm(vm).ok_or(PoolError::NoSuchPool)?.clone();
        if entry.gone.load(SeqCst) {
            return Err(PoolError::NoSuchPool);
        }
        directory.add_pool(self.slabs.arena(), &entry, spec).map(|pool| pool.id())
    }

    /// Destroy a pool and scrub its pages (those of this VM, if it is shared). Answers how many that was.
    pub fn destroy_pool(&self, vm: VmId, pool: PoolId) -> Result<u64, PoolError> {
        let entry = self.pool(vm, pool).ok_or(PoolError::NoSuchPool)?.0;
        Ok(self.destroy(&entry))
    }

    fn destroy(&self, pool: &Arc<Pool>) -> u64 {
        pool.gone.store(true, SeqCst);
        let pages = self.drop_pages(pool, None, Some(pool.number), true);
        self.directory.write().remove_pool(self.slabs.arena(), pool.number);
        pages
    }

    fn destroy_pools(&self, vm: VmId) -> (u64, u64) {
        let pools: Vec<Arc<Pool>> = self.directory.read().pools_of(vm).cloned().collect();
        let pages = pools.iter().map(|pool| self.destroy(pool)).sum();
        (pools.len() as u64, pages)
    }

    /// The pool of this id, if it is the VM's. Resolve once and use for a whole batch.
    pub fn pool(&self, vm: VmId, pool: PoolId) -> Option<PoolRef> {
        let number = u16::try_from(pool.0.checked_sub(1)?).ok()?;
        let directory = self.directory.read();
        let entry = directory.pool(number)?;
        (entry.vm.id == vm && !entry.gone.load(Relaxed)).then(|| PoolRef(entry.clone()))
    }

    /// Allow a VM to join the shared pool of this UUID.
    pub fn grant_shared(&self, uuid: [u8; 16], vm: VmId) -> Result<(), AdminError> {
        self.directory.write().grant(self.slabs.arena(), uuid, vm)
    }

    /// Forbid a VM to join a shared pool, and end its membership. Answers whether there was a grant.
    pub fn revoke_shared(&self, uuid: [u8; 16], vm: VmId) -> bool {
        let had = self.directory.write().revoke(self.slabs.arena(), uuid, vm);
        let member: Option<Arc<Pool>> =
            self.directory.read().pools_of(vm).find(|pool| pool.shared == Some(uuid)).cloned();
        if let Some(pool) = member {
            self.destroy(&pool);
        }
        had
    }

    pub(crate) fn vm(&self, id: VmId) -> Option<Arc<Vm>> {
        self.directory.read().vm(id).cloned()
    }

    pub(crate) fn capacity_bytes(&self) -> u64 {
        u64::from(self.slabs.backed_and_capacity().1) * self.slab_bytes()
    }
}

/// What of a capacity can be promised: the rest is room for slabs that are partly filled.
pub(crate) fn promisable(capacity_bytes: u64) -> u64 {
    capacity_bytes / 16 * 15
}

fn check_minima(needed: u64, capacity_bytes: u64) -> Result<(), AdminError> {
    let available = promisable(capacity_bytes);
    if needed > 0 && needed > available {
        return Err(AdminError::Overcommitted { needed, available });
    }
    Ok(())
}
