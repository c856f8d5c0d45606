//! A VM: its limits, what is charged to it, and its ephemeral pages in eviction order.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

use crate::sync::Mutex;
use tmem_wire::PAGE_BYTES;

use crate::config::{VmId, VmLimits};
use crate::stats::Counters;
use crate::tuner::Eviction;

/// Bytes in use, with an upper bound that holds at every instant.
#[derive(Debug, Default)]
pub(crate) struct Account(AtomicU64);

impl Account {
    /// Charge `bytes` unless that would exceed `limit`.
    pub(crate) fn reserve(&self, bytes: u64, limit: u64) -> bool {
        self.0
            .fetch_update(Relaxed, Relaxed, |used| used.checked_add(bytes).filter(|&total| total <= limit))
            .is_ok()
    }

    /// Charge `bytes` that are in use already (recovery).
    pub(crate) fn charge(&self, bytes: u64) {
        self.0.fetch_add(bytes, Relaxed);
    }

    /// Take back a charge.
    pub(crate) fn release(&self, bytes: u64) {
        self.0.fetch_sub(bytes, Relaxed);
    }

    pub(crate) fn used(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A registered VM.
pub(crate) struct Vm {
    pub id: VmId,
    pub name: String,
    quota_bytes: AtomicU64,
    min_bytes: AtomicU64,
    weight: AtomicU32,
    persistent_max_bytes: AtomicU64,
    /// Host memory charged.
    pub used: Account,
    /// Of that, for persistent pages.
    pub persistent: Account,
    /// Persistent bytes up to which the VM may grow without asking whether the arena can bear it.
    pub lease_bytes: AtomicU64,
    pub persistent_pages: Account,
    pub ephemeral: Mutex<Eviction>,
    pub ephemeral_pages: Account,
    pub frozen: AtomicBool,
    /// Removed: nothing may be added.
    pub gone: AtomicBool,
    pub boot: Mutex<Option<[u8; 16]>>,
    /// Counters of pools that are gone.
    pub past: Mutex<Counters>,
}

impl Vm {
    pub(crate) fn new(id: VmId, name: String, limits: &VmLimits) -> Vm {
        let vm = Vm {
            id,
            name,
            quota_bytes: AtomicU64::new(0),
            min_bytes: AtomicU64::new(0),
            weight: AtomicU32::new(1),
            persistent_max_bytes: AtomicU64::new(0),
            used: Account::default(),
            persistent: Account::default(),
            lease_bytes: AtomicU64::new(0),
            persistent_pages: Account::default(),
            ephemeral: Mutex::default(),
            ephemeral_pages: Account::default(),
            frozen: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            boot: Mutex::new(None),
            past: Mutex::default(),
        };
        vm.set_limits(limits);
        vm
    }

    pub(crate) fn set_limits(&self, limits: &VmLimits) {
        self.quota_bytes.store(limits.quota_bytes, SeqCst);
        self.min_bytes.store(limits.min_bytes, SeqCst);
        self.weight.store(limits.weight.max(1), SeqCst);
        self.persistent_max_bytes.store(limits.persistent_max_bytes, SeqCst);
    }

    pub(crate) fn limits(&self) -> VmLimits {
        VmLimits {
            quota_bytes: self.quota_bytes.load(Relaxed),
            min_bytes: self.min_bytes.load(Relaxed),
            weight: self.weight.load(Relaxed),
            persistent_max_bytes: self.persistent_max_bytes.load(Relaxed),
        }
    }

    pub(crate) fn quota_bytes(&self) -> u64 {
        self.quota_bytes.load(Relaxed)
    }

    pub(crate) fn min_bytes(&self) -> u64 {
        self.min_bytes.load(Relaxed)
    }

    /// Whether there is anything to evict. Not exact while pages come and go.
    pub(crate) fn has_ephemeral(&self) -> bool {
        self.ephemeral_pages.used() > 0
    }

    /// Bytes used per unit of weight: who has most is furthest over its share.
    pub(crate) fn pressure(&self) -> u64 {
        self.used.used() / u64::from(self.weight.load(Relaxed))
    }

    /// Bytes the arena cannot take from the VM, or has promised it.
    pub(crate) fn committed_bytes(&self) -> u64 {
        self.min_bytes().max(self.lease_bytes.load(Relaxed)).max(self.persistent.used())
    }

    /// Count one persistent page more, within what the guest may have beyond its RAM.
    pub(crate) fn reserve_persistent_page(&self) -> bool {
        self.persistent_pages.reserve(1, self.persistent_max_bytes.load(Relaxed) / PAGE_BYTES as u64)
    }
}
