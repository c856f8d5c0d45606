//! What a page costs, and the accounts it is booked on: its pool's, its VM's and, if it is persistent, the store's.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

use tmem_wire::{Encoding, PutStatus};

use crate::index::BLOCK_BYTES;
use crate::pool::{count, Pool};
use crate::slot::State;
use crate::store::Store;

/// What a page's reference in the index costs, bytes.
pub(crate) const INDEX_BYTES: u64 = 6;

/// What charging for a page takes.
pub(crate) fn cost(pool: &Pool, slot_bytes: u32) -> u64 {
    // In a shared pool the block may outlive its creator's pages, so every page pays for one.
    let shared = if pool.shared.is_some() { BLOCK_BYTES } else { 0 };
    u64::from(slot_bytes) + INDEX_BYTES + shared
}

/// What a put has reserved so far; given back unless kept.
pub(crate) struct Charge<'a> {
    store: &'a Store,
    pool: &'a Arc<Pool>,
    pub(crate) bytes: u64,
    page: bool,
}

impl<'a> Charge<'a> {
    /// Nothing is reserved yet.
    pub(crate) fn new(store: &'a Store, pool: &'a Arc<Pool>) -> Self {
        Charge { store, pool, bytes: 0, page: false }
    }

    /// Reserve a page of what the VM may have persistent; false if it has them all.
    pub(crate) fn page(&mut self) -> bool {
        self.page = self.pool.vm.reserve_persistent_page();
        self.page
    }

    /// Reserve bytes of the quota, evicting the VM's own ephemeral pages if need be.
    pub(crate) fn bytes(&mut self, bytes: u64) -> Result<(), PutStatus> {
        let vm = &self.pool.vm;
        while !vm.used.reserve(bytes, vm.quota_bytes()) {
            if !self.store.evict_from(vm) {
                return Err(PutStatus::OverQuota);
            }
        }
        if self.pool.is_persistent() && !self.store.reserve_persistent(vm, bytes) {
            vm.used.release(bytes);
            return Err(PutStatus::NoMemory);
        }
        self.bytes += bytes;
        Ok(())
    }

    /// Not so much was needed.
    pub(crate) fn give_back(&mut self, bytes: u64) {
        self.bytes -= bytes;
        self.pool.vm.used.release(bytes);
        if self.pool.is_persistent() {
            self.pool.vm.persistent.release(bytes);
        }
    }

    /// The page is stored: what was reserved is its own now.
    pub(crate) fn keep(mut self) {
        self.bytes = 0;
        self.page = false;
    }
}

impl Drop for Charge<'_> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.give_back(self.bytes);
        }
        if self.page {
            self.pool.vm.persistent_pages.release(1);
        }
    }
}

/// Book a page that has been stored, all but its bytes.
pub(crate) fn add(pool: &Pool, encoding: Encoding, payload_bytes: usize, slot_bytes: u32) {
    let stored = &pool.stored;
    count(&stored.pages, 1);
    count(&stored.bytes, slot_bytes.into());
    count(&stored.payload_bytes, payload_bytes as u64);
    if !pool.is_persistent() {
        pool.vm.ephemeral_pages.charge(1);
    }
    match encoding {
        Encoding::SameFilled => count(&stored.same_filled, 1),
        Encoding::Raw => count(&stored.raw, 1),
        _ => {}
    }
}

/// Book a page found at recovery: no quota refuses it.
pub(crate) fn add_recovered(pool: &Pool, slot_bytes: u32, new_block: bool) {
    let mut bytes = cost(pool, slot_bytes);
    if new_block && pool.shared.is_none() {
        count(&pool.stored.blocks, 1);
        bytes += BLOCK_BYTES;
    }
    pool.vm.used.charge(bytes);
    if pool.is_persistent() {
        pool.vm.persistent.charge(bytes);
        pool.vm.persistent_pages.charge(1);
    }
}

/// Give back all that was booked for a page.
pub(crate) fn uncharge(pool: &Pool, state: State, slot_bytes: u32, block_gone: bool) {
    let stored = &pool.stored;
    stored.pages.fetch_sub(1, Relaxed);
    stored.bytes.fetch_sub(slot_bytes.into(), Relaxed);
    stored.payload_bytes.fetch_sub(state.length() as u64, Relaxed);
    match state.encoding() {
        Encoding::SameFilled => drop(stored.same_filled.fetch_sub(1, Relaxed)),
        Encoding::Raw => drop(stored.raw.fetch_sub(1, Relaxed)),
        _ => {}
    }
    let mut charged = cost(pool, slot_bytes);
    if block_gone && pool.shared.is_none() {
        stored.blocks.fetch_sub(1, Relaxed);
        charged += BLOCK_BYTES;
    }
    if pool.is_persistent() {
        pool.vm.persistent.release(charged);
        pool.vm.persistent_pages.release(1);
    } else {
        pool.vm.ephemeral_pages.release(1);
    }
    pool.vm.used.release(charged);
}
