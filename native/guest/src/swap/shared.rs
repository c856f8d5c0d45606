//! What the keeper, the serving process and its threads share: the page table and the counters, in one locked
//! mapping that the keeper made before it forked. It survives a serving process that dies.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use rustix::mm::{mlock, mmap_anonymous, MapFlags, ProtFlags};

use super::table::{Table, Word, EPOCHS};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters since the device was made.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $name: AtomicU64,)* }

        impl Counters {
            /// Every counter with its name.
            pub fn each(&self, mut tell: impl FnMut(&'static str, u64)) {
                $(tell(stringify!($name), self.$name.load(Ordering::Relaxed));)*
            }
        }
    };
}

counters! {
    /// Pages the host stored.
    puts,
    /// Pages the host refused.
    refused,
    /// Pages written to the swap file on behalf of the kernel.
    writes_file,
    /// Pages that went to the swap file because the host did not answer in time.
    hedged,
    /// Pages read from the host for the kernel.
    reads_host,
    /// Pages read from the swap file for the kernel.
    reads_file,
    /// Pages the kernel discarded.
    discards,
    /// Pages moved from the host to the swap file by reclaim.
    reclaimed,
    /// Pages the host did not have any more.
    lost,
    /// Requests that failed.
    io_errors,
    /// Connections to the host that broke.
    disconnects,
    /// Times the serving process was started again.
    restarts,
}

/// State beside the table.
#[derive(Debug, Default)]
pub struct State {
    /// Counters since the device was made.
    pub counters: Counters,
    /// The epoch of keys for pages that are put now.
    epoch: AtomicU32,
    /// Pages that reclaim shall still move.
    pub reclaim_left: AtomicU64,
    /// Pages reclaim was asked for in all.
    pub reclaim_asked: AtomicU64,
    /// New pages go to the swap file only.
    pub draining: AtomicBool,
    /// Some entries may be marked stale; the sweeper looks at them once it can.
    pub sweep_wanted: AtomicBool,
    /// The host's pool was emptied of an earlier device's pages.
    pub pool_clean: AtomicBool,
    /// Lanes with a working connection, one bit each.
    pub connected: AtomicU64,
    /// The host turned out to have lost the pages it held.
    pub host_lost_pages: AtomicBool,
    /// Number of the block device plus one; zero if there is none yet.
    pub device: AtomicU32,
    /// The device is to go, and no serving process has refused yet.
    pub end_wanted: AtomicBool,
}

/// The mapping.
#[derive(Debug, Clone, Copy)]
pub struct Shared {
    /// Everything but the table.
    pub state: &'static State,
    /// The table.
    pub table: Table,
}

impl Shared {
    /// Map and lock memory for a device of `pages` pages. The mapping lives as long as any process that has it.
    pub fn map(pages: u32) -> io::Result<Shared> {
        let table_at = size_of::<State>().next_multiple_of(64);
        let bytes = table_at + pages as usize * size_of::<Word>();
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
            )
        }?;
        // SAFETY: the mapping was just made and is never unmapped. Failure is told by `protect`, which checks all.
        let _ = unsafe { mlock(base, bytes) };
        // SAFETY: page-aligned, large enough, all zero, which is a valid value for atomics; never unmapped.
        let state = unsafe { &*base.cast::<State>() };
        // SAFETY: as above; the table starts after the state, on a multiple of 64 bytes.
        #[allow(clippy::cast_ptr_alignment)]
        let table = unsafe {
            std::slice::from_raw_parts(base.cast::<u8>().add(table_at).cast::<Word>(), pages as usize)
        };
        Ok(Shared { state, table: Table::new(table) })
    }

    /// The epoch for new keys.
    pub fn epoch(&self) -> u32 {
        self.state.epoch.load(Ordering::Acquire) % EPOCHS
    }

    /// A connection broke: puts that were on their way may still arrive, so their keys are not used again.
    pub fn next_epoch(&self) {
        self.state.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// Add to a counter.
    pub fn count(&self, counter: impl FnOnce(&Counters) -> &AtomicU64, by: u64) {
        if by > 0 {
            counter(&self.state.counters).fetch_add(by, Ordering::Relaxed);
        }
    }
}
