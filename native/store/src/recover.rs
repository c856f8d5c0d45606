//! Opening an arena: formatting a new one, rebuilding everything volatile from an old one.

use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::time::Instant;

use crate::sync::{Mutex, RwLock};
use tmem_wire::Encoding;
use zerocopy::{FromZeros, IntoBytes};

use crate::arena::{Arena, ArenaFile};
use crate::charge;
use crate::config::StoreConfig;
use crate::directory::Directory;
use crate::error::OpenError;
use crate::layout::{
    Classes, Superblock, HEADER_BYTES, HEAD_BYTES, MAGIC, MAX_SLABS, SLAB_BYTES_MAX, SLAB_BYTES_MIN, VERSION,
};
use crate::sieve::Order;
use crate::slabs::Slabs;
use crate::slot::{Slot, SlotRef};
use crate::stats::Recovery;
use crate::store::Store;

/// Most threads that scan slots.
const MAX_SCANNERS: usize = 64;

impl Store {
    /// Open the arena, or make one. What was acknowledged before is served again; see `docs/store.md` for why.
    pub fn open(config: &StoreConfig) -> Result<(Store, Recovery), OpenError> {
        let start = Instant::now();
        if let Some(bytes) = config.slab_bytes {
            if !bytes.is_power_of_two() || !(SLAB_BYTES_MIN..=SLAB_BYTES_MAX).contains(&bytes) {
                return Err(OpenError::Config(format!(
                    "a slab of {bytes} bytes is not a power of two from {SLAB_BYTES_MIN} to {SLAB_BYTES_MAX}"
                )));
            }
        }
        let file = ArenaFile::open(&config.arena)?;
        let length = file.len()?;
        let mut superblock = Superblock::new_zeroed();
        file.read_start(superblock.as_mut_bytes())?;
        // A file with nothing in its head was created, or was being formatted when its creator died.
        let formatted = superblock.as_bytes().iter().all(|&byte| byte == 0);
        if formatted {
            superblock = new_superblock(config);
        } else if let Err(reason) = check_superblock(&superblock, length) {
            let path = file.path().map(Into::into);
            return Err(OpenError::Unusable { path, reason, kept_aside: file.keep_aside() });
        }
        let slab_bytes = superblock.slab_bytes;
        let capacity = config.capacity_bytes / u64::from(slab_bytes);
        if capacity >= MAX_SLABS.into() {
            return Err(OpenError::Config(format!(
                "capacity of {} bytes is over the {} bytes an arena with slabs of {slab_bytes} bytes can have",
                config.capacity_bytes,
                u64::from(MAX_SLABS - 1) * u64::from(slab_bytes)
            )));
        }
        if formatted || length < HEAD_BYTES as u64 {
            file.set_len(HEAD_BYTES as u64)?;
        }
        let arena = file.map(slab_bytes)?;
        if formatted {
            write_superblock(&arena, &superblock);
        }
        let store = Store {
            slabs: Slabs::new(arena, slab_bytes, capacity as u32),
            directory: RwLock::new(Directory::new(superblock.seed)),
            seed: superblock.seed,
            incompressible: config.incompressible,
            compression: AtomicBool::new(config.compression),
            compactor: Mutex::new(()),
            commitments: Mutex::new(()),
            pages_evicted: AtomicU64::new(0),
            pages_moved: AtomicU64::new(0),
            pages_lost: AtomicU64::new(0),
        };
        let mut recovery = Recovery { formatted, ..Recovery::default() };
        if !formatted {
            store.recover(length, &mut recovery);
        }
        recovery.elapsed_us = start.elapsed().as_micros() as u64;
        Ok((store, recovery))
    }

    fn recover(&self, length: u64, recovery: &mut Recovery) {
        {
            let mut directory = self.directory.write();
            directory.recover(self.slabs.arena());
            recovery.vms = directory.vms().count() as u64;
            recovery.pools = directory.pools().count() as u64;
        }
        let slabs = ((length - HEAD_BYTES as u64) / self.slab_bytes()).min(MAX_SLABS.into()) as u32;
        let next = AtomicU32::new(0);
        let totals = Mutex::new((Recovery::default(), Vec::new()));
        let scanners = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_SCANNERS);
        std::thread::scope(|scope| {
            for _ in 0..scanners.min(slabs as usize / 4 + 1) {
                scope.spawn(|| {
                    let (mut found, mut unassigned) = (Recovery::default(), Vec::new());
                    loop {
                        let slab = next.fetch_add(1, Relaxed);
                        if slab >= slabs {
                            break;
                        }
                        match self.slabs.arena().slab_class(slab).load(Acquire) {
                            0 => unassigned.push(slab),
                            class => self.scan_slab(slab, class - 1, &mut found),
                        }
                    }
                    let mut totals = totals.lock();
                    totals.0.persistent_pages += found.persistent_pages;
                    totals.0.ephemeral_pages += found.ephemeral_pages;
                    totals.0.reclaimed_slots += found.reclaimed_slots;
                    totals.1.append(&mut unassigned);
                });
            }
        });
        let (found, unassigned) = totals.into_inner();
        recovery.persistent_pages = found.persistent_pages;
        recovery.ephemeral_pages = found.ephemeral_pages;
        recovery.reclaimed_slots = found.reclaimed_slots;
        self.slabs.finish_adoption(slabs, unassigned);
        // A smaller capacity than the arena was left with is as if it had been set at run time.
        self.shrink_to_capacity();
    }

    /// Index the pages of one slab. Only headers are read.
    fn scan_slab(&self, slab: u32, class: u8, found: &mut Recovery) {
        let arena = self.slabs.arena();
        let classes = self.slabs.classes();
        if usize::from(class) >= classes.len() {
            // Not a class of this layout: nothing in it can be told apart.
            arena.slab_class(slab).store(0, Relaxed);
            found.reclaimed_slots += 1;
            self.slabs.adopt_spare(slab);
            return;
        }
        arena.populate(slab);
        let (bytes, slots) = (classes.slot_bytes(class), classes.slots(class));
        let mut free = Vec::new();
        let directory = self.directory.read();
        for number in 0..slots {
            let slot = Slot::new(arena, slab, number, bytes);
            let state = slot.state();
            let pool = state.is_valid().then(|| directory.pool(state.pool())).flatten();
            let fits = state.encoding() != Encoding::None
                && (1..=bytes as usize - HEADER_BYTES).contains(&state.length());
            let (Some(pool), true) = (pool, fits) else {
                if state.is_valid() {
                    slot.retire();
                    found.reclaimed_slots += 1;
                }
                free.push(number as u16);
                continue;
            };
            let key = slot.key();
            let at = SlotRef::new(slab, number);
            let mut shard = pool.index.lock(&key);
            if shard.get(&key).is_some() {
                // The page was being replaced or moved. Neither version had been given up yet; one must go now, lest
                // both be found again after a flush.
                slot.retire();
                found.reclaimed_slots += 1;
                free.push(number as u16);
                continue;
            }
            let inserted = shard.insert(&key, at);
            if pool.is_persistent() {
                found.persistent_pages += 1;
            } else {
                found.ephemeral_pages += 1;
                slot.unvisit();
                pool.vm.ephemeral.lock().list.add(&self.slabs, at, Order::Sieve);
            }
            drop(shard);
            charge::add(pool, state.encoding(), state.length(), bytes);
            charge::add_recovered(pool, bytes, inserted.new_block);
        }
        self.slabs.adopt(slab, class, &free);
    }
}

fn new_superblock(config: &StoreConfig) -> Superblock {
    let slab_bytes = config.slab_bytes.unwrap_or(match config.capacity_bytes {
        // Small arenas have few slabs, and every class in use has one that is partly filled.
        ..=0x400_0000 => SLAB_BYTES_MIN,
        0x400_0001..=0x20_0000_0000 => 256 << 10,
        _ => SLAB_BYTES_MAX,
    });
    // The standard library's per-process random keys: unpredictable to guests, which is all that is needed.
    let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::process::id());
    let mut superblock = Superblock {
        magic: MAGIC,
        version: VERSION,
        slab_bytes,
        seed,
        classes_hash: Classes::new(slab_bytes).hash(),
        check: 0,
    };
    superblock.check = check(&superblock);
    superblock
}

fn check(superblock: &Superblock) -> u64 {
    xxhash_rust::xxh3::xxh3_64(&superblock.as_bytes()[..std::mem::offset_of!(Superblock, check)])
}

/// Why an arena with this superblock cannot be used, if so.
fn check_superblock(superblock: &Superblock, length: u64) -> Result<(), String> {
    if superblock.magic != MAGIC {
        return Err("it does not begin like an arena".into());
    }
    if superblock.version != VERSION {
        return Err(format!(
            "it has layout version {}, and this tmemd reads version {VERSION}",
            superblock.version
        ));
    }
    if superblock.check != check(superblock) {
        return Err("its superblock fails its checksum".into());
    }
    let slab_bytes = superblock.slab_bytes;
    if !slab_bytes.is_power_of_two() || !(SLAB_BYTES_MIN..=SLAB_BYTES_MAX).contains(&slab_bytes) {
        return Err(format!("its slabs have {slab_bytes} bytes"));
    }
    if superblock.classes_hash != Classes::new(slab_bytes).hash() {
        return Err("its slabs are divided differently".into());
    }
    if length < HEAD_BYTES as u64 {
        return Err(format!("it is cut off after {length} bytes"));
    }
    Ok(())
}

/// The magic goes last: an arena that has it is formatted.
fn write_superblock(arena: &Arena, superblock: &Superblock) {
    use std::sync::atomic::Ordering::Release;
    for (i, bytes) in superblock.as_bytes().chunks_exact(4).enumerate().skip(2) {
        let word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        arena.word(4 * i).store(word, Release);
    }
    arena.long(0).store(superblock.magic, Release);
}
