//! Pools: what a VM sees of one, and the index it may share with other VMs.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::Arc;

use tmem_wire::{PoolCreate, PoolKind};

use crate::config::PoolId;
use crate::index::Index;
use crate::stats::{Counters, PoolStats};
use crate::vm::Vm;

/// A VM's membership in a pool; its only one, if the pool is private. Slots name it, so every page is charged to
/// the VM that put it.
pub(crate) struct Pool {
    pub number: u16,
    pub vm: Arc<Vm>,
    pub kind: PoolKind,
    pub shared: Option<[u8; 16]>,
    pub name: [u8; 32],
    pub index: Arc<Index>,
    /// Being destroyed: nothing may be added.
    pub gone: AtomicBool,
    pub stored: Stored,
    pub counters: PoolCounters,
}

/// What a VM has in a pool now.
#[derive(Default)]
pub(crate) struct Stored {
    pub pages: AtomicU64,
    /// Bytes of slots.
    pub bytes: AtomicU64,
    /// Bytes of payload.
    pub payload_bytes: AtomicU64,
    pub same_filled: AtomicU64,
    pub raw: AtomicU64,
    /// Blocks of the index (private pools).
    pub blocks: AtomicU64,
}

/// Live [`Counters`].
#[derive(Default)]
pub(crate) struct PoolCounters {
    pub puts_accepted: AtomicU64,
    pub puts_refused: AtomicU64,
    pub gets_hit: AtomicU64,
    pub gets_missed: AtomicU64,
    pub pages_flushed: AtomicU64,
    pub pages_evicted: AtomicU64,
    pub pages_lost: AtomicU64,
}

impl PoolCounters {
    pub(crate) fn read(&self) -> Counters {
        Counters {
            puts_accepted: self.puts_accepted.load(Relaxed),
            puts_refused: self.puts_refused.load(Relaxed),
            gets_hit: self.gets_hit.load(Relaxed),
            gets_missed: self.gets_missed.load(Relaxed),
            pages_flushed: self.pages_flushed.load(Relaxed),
            pages_evicted: self.pages_evicted.load(Relaxed),
            pages_lost: self.pages_lost.load(Relaxed),
        }
    }
}

pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Relaxed);
}

impl Pool {
    pub(crate) fn new(number: u16, vm: Arc<Vm>, spec: &PoolCreate, index: Arc<Index>) -> Pool {
        Pool {
            number,
            vm,
            kind: normal_kind(spec),
            shared: spec.shared,
            name: spec.name,
            index,
            gone: AtomicBool::new(false),
            stored: Stored::default(),
            counters: PoolCounters::default(),
        }
    }

    pub(crate) fn is_persistent(&self) -> bool {
        self.kind == PoolKind::Persistent
    }

    /// Ephemeral, and pages stay when they are fetched: their eviction order matters.
    pub(crate) fn is_inclusive(&self) -> bool {
        self.kind == PoolKind::Ephemeral { exclusive: false }
    }

    pub(crate) fn id(&self) -> PoolId {
        // Pool 0 on the wire means "no pool".
        PoolId(u32::from(self.number) + 1)
    }

    pub(crate) fn matches(&self, spec: &PoolCreate) -> bool {
        self.kind == normal_kind(spec) && self.shared == spec.shared
    }

    pub(crate) fn stats(&self) -> PoolStats {
        let end = self.name.iter().position(|&byte| byte == 0).unwrap_or(self.name.len());
        PoolStats {
            id: self.id(),
            name: String::from_utf8_lossy(&self.name[..end]).into_owned(),
            kind: self.kind,
            shared: self.shared,
            pages: self.stored.pages.load(Relaxed),
            bytes: self.stored.bytes.load(Relaxed),
            counters: self.counters.read(),
        }
    }
}

/// Shared pools are inclusive: a page one guest took would be missing for the others.
fn normal_kind(spec: &PoolCreate) -> PoolKind {
    match (spec.kind, spec.shared) {
        (PoolKind::Ephemeral { .. }, Some(_)) => PoolKind::Ephemeral { exclusive: false },
        (kind, _) => kind,
    }
}

/// A pool a VM may use, resolved once and then used for many pages. It stays safe to use when the pool is destroyed
/// meanwhile: puts are refused and gets miss.
#[derive(Clone)]
pub struct PoolRef(pub(crate) Arc<Pool>);

impl PoolRef {
    /// Its id.
    pub fn id(&self) -> PoolId {
        self.0.id()
    }

    /// Ephemeral or persistent.
    pub fn kind(&self) -> PoolKind {
        self.0.kind
    }
}
