//! What the store tells about itself. Bytes are bytes of host memory unless named `raw_bytes`.

use tmem_wire::PoolKind;

use crate::config::{PoolId, VmLimits};

/// The whole store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Most bytes of slabs the arena may take.
    pub capacity_bytes: u64,
    /// Bytes of slabs that are backed by host memory now, in use or kept for reuse.
    pub backed_bytes: u64,
    /// Bytes charged to VMs: slots with headers, and index.
    pub used_bytes: u64,
    /// Bytes of encoded pages, headers not counted.
    pub payload_bytes: u64,
    /// Bytes of headers, index and lists.
    pub metadata_bytes: u64,
    /// Pages stored.
    pub pages: u64,
    /// Pages stored, at 4096 bytes each.
    pub raw_bytes: u64,
    /// Pages that are one repeated word.
    pub same_filled_pages: u64,
    /// Pages stored as they are.
    pub raw_pages: u64,
    /// Ephemeral pages evicted since the store was opened.
    pub pages_evicted: u64,
    /// Pages moved by compaction since the store was opened.
    pub pages_moved: u64,
    /// Pages found damaged by their checksum since the store was opened.
    pub pages_lost: u64,
}

/// One VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmStats {
    /// Its name.
    pub name: String,
    /// What it may use.
    pub limits: VmLimits,
    /// Host memory charged to it, bytes.
    pub used_bytes: u64,
    /// Of these, for persistent pages.
    pub persistent_bytes: u64,
    /// Its pages at 4096 bytes each.
    pub raw_bytes: u64,
    /// Pages in ephemeral pools.
    pub ephemeral_pages: u64,
    /// Pages in persistent pools.
    pub persistent_pages: u64,
    /// Pools it has.
    pub pools: u64,
    /// Puts accepted.
    pub puts_accepted: u64,
    /// Puts refused.
    pub puts_refused: u64,
    /// Gets that hit.
    pub gets_hit: u64,
    /// Gets that missed.
    pub gets_missed: u64,
    /// Pages flushed by the guest.
    pub pages_flushed: u64,
    /// Ephemeral pages evicted.
    pub pages_evicted: u64,
    /// Pages found damaged.
    pub pages_lost: u64,
    /// Whether it is frozen.
    pub frozen: bool,
}

/// One pool of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolStats {
    /// Its id.
    pub id: PoolId,
    /// The guest's name for it.
    pub name: String,
    /// Ephemeral or persistent. Shared pools are inclusive.
    pub kind: PoolKind,
    /// UUID, if it is shared.
    pub shared: Option<[u8; 16]>,
    /// Pages this VM has in it.
    pub pages: u64,
    /// Bytes of slots of these pages.
    pub bytes: u64,
    /// Operations on it.
    pub counters: Counters,
}

/// Operations on a pool since it was created or the daemon was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Puts accepted.
    pub puts_accepted: u64,
    /// Puts refused.
    pub puts_refused: u64,
    /// Gets that hit.
    pub gets_hit: u64,
    /// Gets that missed.
    pub gets_missed: u64,
    /// Pages flushed by the guest.
    pub pages_flushed: u64,
    /// Ephemeral pages evicted.
    pub pages_evicted: u64,
    /// Pages found damaged.
    pub pages_lost: u64,
}

impl std::ops::AddAssign for Counters {
    fn add_assign(&mut self, other: Counters) {
        self.puts_accepted += other.puts_accepted;
        self.puts_refused += other.puts_refused;
        self.gets_hit += other.gets_hit;
        self.gets_missed += other.gets_missed;
        self.pages_flushed += other.pages_flushed;
        self.pages_evicted += other.pages_evicted;
        self.pages_lost += other.pages_lost;
    }
}

/// What opening found in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recovery {
    /// Whether the arena was new (or empty) and has been formatted.
    pub formatted: bool,
    /// VMs found.
    pub vms: u64,
    /// Pools found.
    pub pools: u64,
    /// Persistent pages found.
    pub persistent_pages: u64,
    /// Ephemeral pages found.
    pub ephemeral_pages: u64,
    /// Slots given back: half written, duplicates of a page that was being replaced, or of pools that are gone.
    pub reclaimed_slots: u64,
    /// How long it took, microseconds.
    pub elapsed_us: u64,
}
