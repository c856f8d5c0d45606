//! Finding room: slabs, compaction, eviction; and giving memory back to the host.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

use crate::pool::{count, Pool};
use crate::slot::SlotRef;
use crate::store::{promisable, Store};
use crate::vm::Vm;

/// Pages evicted from a VM before looking again who is furthest over its share.
const BATCH: usize = 8;
/// How many classes up a page may go before others' pages are evicted for it.
const NEAR_CLASSES: u8 = 2;
/// Rounds of making room before a put gives up: only reached when other threads take the room every time.
const MAX_ROUNDS: usize = 100_000;
/// Persistent bytes promised to a VM at a time.
const LEASE_BYTES: u64 = 1 << 20;

impl Store {
    /// A slot of at least this class for a page of this pool; `None` if there is no room that may be had.
    pub(crate) fn allocate(&self, pool: &Pool, class: u8) -> Option<SlotRef> {
        let classes = self.slabs.classes().len() as u8;
        for _ in 0..MAX_ROUNDS {
            if let Some(at) = self.slabs.allocate(class).or_else(|| self.slabs.assign(class)) {
                return Some(at);
            }
            let near = class + 1..(class + 1 + NEAR_CLASSES).min(classes);
            if let Some(at) = near.into_iter().find_map(|near| self.slabs.allocate(near)) {
                return Some(at);
            }
            if self.compact() || self.make_room(&pool.vm, pool.is_persistent()) {
                continue;
            }
            if let Some(at) = (class + 1..classes).find_map(|larger| self.slabs.allocate(larger)) {
                return Some(at);
            }
            if !self.merge() {
                return None;
            }
        }
        None
    }

    /// Evict a few pages of the VM that is furthest over its share; whether any was.
    fn make_room(&self, vm: &Arc<Vm>, persistent: bool) -> bool {
        let entitled = persistent || vm.used.used() < vm.min_bytes();
        let victim = self.furthest_over_share(Some(vm), |other| {
            // An ephemeral page does not displace those of a VM that is less over its share.
            entitled || other.pressure() >= vm.pressure()
        });
        victim.is_some_and(|victim| self.evict_batch(&victim))
    }

    fn evict_batch(&self, vm: &Arc<Vm>) -> bool {
        (0..BATCH).filter(|_| self.evict_from(vm)).count() > 0
    }

    /// Of the VMs that have ephemeral pages and more than their guaranteed minimum (for its own put a VM may be under
    /// it), the one that uses most per unit of weight.
    fn furthest_over_share(&self, own: Option<&Arc<Vm>>, allowed: impl Fn(&Vm) -> bool) -> Option<Arc<Vm>> {
        let directory = self.directory.read();
        directory
            .vms()
            .filter(|vm| {
                let own = own.is_some_and(|own| Arc::ptr_eq(own, vm));
                vm.has_ephemeral() && (own || vm.used.used() > vm.min_bytes() && allowed(vm))
            })
            .max_by_key(|vm| vm.pressure())
            .cloned()
    }

    /// Evict one ephemeral page of this VM; whether there was one.
    pub(crate) fn evict_from(&self, vm: &Arc<Vm>) -> bool {
        loop {
            let (at, state, key) = {
                let mut eviction = vm.ephemeral.lock();
                let order = eviction.order;
                let Some(at) = eviction.list.victim(&self.slabs, order) else { return false };
                let slot = self.slabs.slot(at);
                (at, slot.state(), slot.key())
            };
            let pool = self.directory.read().pool(state.pool()).cloned();
            let Some(pool) = pool else { continue };
            let mut shard = pool.index.lock(&key);
            // Between the two locks the page may have been flushed, replaced or moved: then another one is tried.
            if shard.get(&key) != Some(at) || self.slabs.slot(at).state().pool() != pool.number {
                continue;
            }
            let taken = self.take(&mut shard, &pool, &key);
            drop(shard);
            if let Some(taken) = taken {
                self.release(&taken, false);
                count(&pool.counters.pages_evicted, 1);
                count(&self.pages_evicted, 1);
                return true;
            }
        }
    }

    /// Empty a sparse slab by moving its pages to others of its class; whether that gave a spare slab.
    fn compact(&self) -> bool {
        let _alone = self.compactor.lock();
        // Another thread may have made room while this one waited.
        if self.slabs.available() > 0 {
            return true;
        }
        self.compact_alone()
    }

    fn compact_alone(&self) -> bool {
        self.slabs.sparsest_class().is_some_and(|class| self.empty_slab(class, class))
    }

    /// When no class has a slab's worth of free slots: empty the slab that holds least, also into larger slots.
    fn merge(&self) -> bool {
        let _alone = self.compactor.lock();
        let largest = self.slabs.classes().len() as u8 - 1;
        self.slabs.emptiest_classes().into_iter().any(|class| self.empty_slab(class, largest))
    }

    /// Move the pages of a class's sparsest slab to slots of its class, or up to class `up_to`; whether that gave a
    /// spare slab.
    fn empty_slab(&self, class: u8, up_to: u8) -> bool {
        let Some((slab, slots)) = self.slabs.start_draining(class) else { return false };
        for number in 0..slots {
            let at = SlotRef::new(slab, number);
            if self.slabs.slot(at).state().is_valid() && !self.relocate(at, class, up_to) {
                break;
            }
        }
        self.slabs.finish_draining(class, slab)
    }

    /// Move a page to another slot; `false` if there is none.
    fn relocate(&self, at: SlotRef, class: u8, up_to: u8) -> bool {
        let to = (class..=up_to).find_map(|class| self.slabs.allocate(class));
        let Some(to) = to else { return false };
        let moved = self.move_page(at, to);
        self.slabs.free(if moved { at } else { to });
        true
    }

    fn move_page(&self, at: SlotRef, to: SlotRef) -> bool {
        let (from_slot, to_slot) = (self.slabs.slot(at), self.slabs.slot(to));
        let (state, key) = (from_slot.state(), from_slot.key());
        let pool = self.directory.read().pool(state.pool()).cloned();
        let Some(pool) = pool else { return false };
        let mut shard = pool.index.lock(&key);
        // The state and key were read without the lock: only the index says whether they are this page's.
        if shard.get(&key) != Some(at) {
            return false;
        }
        // SAFETY: the shard's lock is held.
        let payload = unsafe { from_slot.payload(from_slot.state().length()) };
        to_slot.fill(&key, from_slot.bound_checksum(), payload);
        // From its slot, not from the pool looked up above: the page may be another member's of a shared pool.
        let owner = from_slot.state().pool();
        let owner = if owner == pool.number {
            Some(pool.clone())
        } else {
            self.directory.read().pool(owner).cloned()
        };
        let Some(owner) = owner else { return false };
        if !self.charge_move(&owner, from_slot.bytes(), to_slot.bytes()) {
            return false;
        }
        if owner.is_persistent() {
            to_slot.publish(from_slot.state());
        } else {
            let mut eviction = owner.vm.ephemeral.lock();
            eviction.list.replace(&self.slabs, at, to);
            to_slot.publish(from_slot.state());
        }
        from_slot.retire();
        shard.insert(&key, to);
        count(&self.pages_moved, 1);
        true
    }

    /// A larger slot costs more, and must be within the quota like everything else.
    fn charge_move(&self, owner: &Pool, from: u32, to: u32) -> bool {
        let more = u64::from(to.saturating_sub(from));
        if more == 0 {
            return true;
        }
        if !owner.vm.used.reserve(more, owner.vm.quota_bytes()) {
            return false;
        }
        if owner.is_persistent() && !self.reserve_persistent(&owner.vm, more) {
            owner.vm.used.release(more);
            return false;
        }
        count(&owner.stored.bytes, more);
        true
    }

    /// Reserve persistent bytes. They cannot be taken back, so together with what is guaranteed to the other VMs
    /// they must fit into the arena.
    pub(crate) fn reserve_persistent(&self, vm: &Vm, bytes: u64) -> bool {
        vm.persistent.reserve(bytes, vm.lease_bytes.load(Relaxed)) || {
            let _promises = self.commitments.lock();
            self.extend_lease(vm, bytes) && vm.persistent.reserve(bytes, vm.lease_bytes.load(Relaxed))
        }
    }

    fn extend_lease(&self, vm: &Vm, bytes: u64) -> bool {
        let directory = self.directory.read();
        let used = vm.persistent.used();
        let others = || directory.vms().filter(|other| other.id != vm.id);
        if others().all(|other| other.min_bytes() == 0) {
            // Nothing is promised: the arena itself is the limit.
            vm.lease_bytes.store(used + LEASE_BYTES, Relaxed);
            return true;
        }
        let limit = promisable(self.capacity_bytes());
        let promised = |others: u64, want: u64| others.saturating_add(want.max(vm.min_bytes())) <= limit;
        let committed: u64 = others().map(|other| other.committed_bytes()).sum();
        if promised(committed, used + LEASE_BYTES) {
            vm.lease_bytes.store(used + LEASE_BYTES, Relaxed);
            return true;
        }
        // Take back what the others have been promised and not used.
        let committed: u64 = others()
            .map(|other| {
                other.lease_bytes.store(other.persistent.used(), Relaxed);
                other.committed_bytes()
            })
            .sum();
        let fits = promised(committed, used + bytes);
        if fits {
            vm.lease_bytes.store(used + bytes, Relaxed);
        }
        fits
    }

    /// Bring the backed slabs down to the capacity; the number of slabs now in force.
    pub(crate) fn shrink_to_capacity(&self) -> u32 {
        loop {
            let (backed, capacity) = self.slabs.backed_and_capacity();
            if backed <= capacity {
                return capacity;
            }
            if !self.punch_one() {
                // Persistent pages are in the way.
                self.slabs.set_capacity(backed);
                return backed;
            }
        }
    }

    /// Give slabs back to the host; how many were.
    pub(crate) fn punch_slabs(&self, slabs: u32) -> u32 {
        (0..slabs).take_while(|_| self.punch_one()).count() as u32
    }

    fn punch_one(&self) -> bool {
        loop {
            if self.slabs.punch_spare() {
                return true;
            }
            let compacted = {
                let _alone = self.compactor.lock();
                self.compact_alone()
            };
            if compacted {
                continue;
            }
            let victim = self.furthest_over_share(None, |_| true).or_else(|| {
                // The host goes before guaranteed minima: they are of lent memory.
                let directory = self.directory.read();
                directory.vms().filter(|vm| vm.has_ephemeral()).max_by_key(|vm| vm.pressure()).cloned()
            });
            if !victim.is_some_and(|victim| self.evict_batch(&victim)) && !self.merge() {
                return false;
            }
        }
    }
}
