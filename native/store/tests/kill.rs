//! Kill -9 at random instants: what was acknowledged is there, what was flushed is not, nothing else is ever returned.
//!
//! A child process (this test binary again) works on an arena with several threads and writes to a shared file what
//! it is about to do with each key, and what was acknowledged. The test kills it, opens the arena and compares.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use rustix::mm::{MapFlags, ProtFlags};
use tmem_store::{codec, PoolRef, Store, StoreConfig, VmId, VmLimits};
use tmem_wire::{Encoding, GetStatus, Key, PoolCreate, PoolKind, PutStatus};

const THREADS: u32 = 3;
const KEYS: u32 = 600;
const POOLS: [(PoolKind, &str); 3] = [
    (PoolKind::Persistent, "swap"),
    (PoolKind::Ephemeral { exclusive: false }, "inclusive"),
    (PoolKind::Ephemeral { exclusive: true }, "exclusive"),
];
const NOTHING_PENDING: u32 = u32::MAX;
const ABSENT: u32 = 0;

/// What is known of one key: the version that was acknowledged, and the one under way. Version 0 is "absent".
struct Entry {
    acknowledged: AtomicU32,
    pending: AtomicU32,
}

/// The shared file. It survives the child as the arena does.
struct Log {
    entries: &'static [Entry],
    operations: &'static AtomicU64,
}

impl Log {
    fn open(path: &Path) -> Log {
        let count = POOLS.len() * (THREADS * KEYS) as usize;
        let bytes = 8 + count * size_of::<Entry>();
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        let fresh = file.metadata().unwrap().len() == 0;
        file.set_len(bytes as u64).unwrap();
        // SAFETY: a new mapping that is never unmapped; all sharing is through atomics.
        let log = unsafe {
            let flags = ProtFlags::READ | ProtFlags::WRITE;
            let at =
                rustix::mm::mmap(std::ptr::null_mut(), bytes, flags, MapFlags::SHARED, &file, 0).unwrap();
            let entries = std::slice::from_raw_parts(at.cast::<u8>().add(8).cast(), count);
            Log { entries, operations: &*at.cast() }
        };
        if fresh {
            for entry in log.entries {
                entry.pending.store(NOTHING_PENDING, SeqCst);
            }
        }
        log
    }

    fn entry(&self, pool: usize, thread: u32, index: u32) -> &Entry {
        &self.entries[(pool as u32 * THREADS * KEYS + thread * KEYS + index) as usize]
    }
}

fn key(thread: u32, index: u32) -> Key {
    // Some keys share a block, some do not.
    let spread = if index % 3 == 0 { 1000 } else { 1 };
    Key { object: u128::from(thread).to_le_bytes(), index: index * spread }
}

/// The content of a version of a page; every size class occurs, and same-filled pages.
fn page(pool: usize, key: &Key, version: u32) -> [u8; 4096] {
    let mut page = [0; 4096];
    let mut state = u64::from(version) << 32 | u64::from(key.index) << 4 | pool as u64;
    state = (state ^ u64::from(key.object[0]) << 60).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    if version % 8 == 0 {
        codec::fill(state, &mut page);
        return page;
    }
    let noise = (state >> 40) as usize % 4200;
    for byte in page.iter_mut().take(noise.max(8)) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state as u8;
    }
    page
}

fn config(path: &Path, mib: u64) -> StoreConfig {
    StoreConfig::file(path, mib << 20)
}

fn pools(store: &Store) -> (VmId, Vec<PoolRef>) {
    let vm = store.add_vm("hammered", &VmLimits::default()).unwrap();
    let pools = POOLS.iter().map(|(kind, name)| {
        let id = store.create_pool(vm, &PoolCreate::private(*kind, name)).unwrap();
        store.pool(vm, id).unwrap()
    });
    (vm, pools.collect())
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as u32 % limit
    }
}

#[test]
#[ignore = "the child of the other tests"]
fn child() {
    let Ok(arena) = std::env::var("TMEM_KILL_ARENA") else { return };
    let mib: u64 = std::env::var("TMEM_KILL_MIB").unwrap().parse().unwrap();
    let seed: u64 = std::env::var("TMEM_KILL_SEED").unwrap().parse().unwrap();
    let log = Log::open(Path::new(&format!("{arena}.log")));
    let (store, _) = Store::open(&config(Path::new(&arena), mib)).unwrap();
    let (_, pools) = pools(&store);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (store, pools, log) = (&store, &pools, &log);
            scope.spawn(move || work(store, pools, log, thread, seed));
        }
        if mib < 16 {
            // Shrinking and growing moves pages while they are being written.
            scope.spawn(|| loop {
                store.set_capacity(mib << 19).unwrap();
                store.set_capacity(mib << 20).unwrap();
            });
        }
    });
}

fn work(store: &Store, pools: &[PoolRef], log: &Log, thread: u32, seed: u64) {
    let mut random = Random(seed.wrapping_mul(31) + u64::from(thread) * 7919 + 1);
    let mut out = Vec::new();
    loop {
        let pool = random.below(3) as usize;
        let index = random.below(KEYS);
        let key = key(thread, index);
        let entry = log.entry(pool, thread, index);
        match random.below(10) {
            0..6 => {
                let version = (entry.acknowledged.load(SeqCst) + 1 + random.below(100)) % 1_000_000;
                let version = version.max(1);
                entry.pending.store(version, SeqCst);
                let page = page(pool, &key, version);
                let status = store.put(&pools[pool], &key, Encoding::Raw, &page, None);
                let now = if status == PutStatus::Stored { version } else { ABSENT };
                entry.acknowledged.store(now, SeqCst);
                entry.pending.store(NOTHING_PENDING, SeqCst);
            }
            6..8 => {
                entry.pending.store(ABSENT, SeqCst);
                store.flush_page(&pools[pool], &key);
                entry.acknowledged.store(ABSENT, SeqCst);
                entry.pending.store(NOTHING_PENDING, SeqCst);
            }
            8 if random.below(200) == 0 => {
                for index in 0..KEYS {
                    log.entry(pool, thread, index).pending.store(ABSENT, SeqCst);
                }
                store.flush_object(&pools[pool], &key.object);
                for index in 0..KEYS {
                    log.entry(pool, thread, index).acknowledged.store(ABSENT, SeqCst);
                    log.entry(pool, thread, index).pending.store(NOTHING_PENDING, SeqCst);
                }
            }
            _ => {
                if pool == 2 {
                    entry.pending.store(ABSENT, SeqCst);
                }
                out.clear();
                let (status, encoding, _) = store.get(&pools[pool], &key, false, &mut out);
                check(pool, &key, status, encoding, &out, &[entry.acknowledged.load(SeqCst)], pool != 0);
                if pool == 2 {
                    entry.acknowledged.store(ABSENT, SeqCst);
                    entry.pending.store(NOTHING_PENDING, SeqCst);
                }
            }
        }
        log.operations.fetch_add(1, SeqCst);
    }
}

/// Whether an answer is one of the `allowed` versions; the version it is.
fn check(
    pool: usize,
    key: &Key,
    status: GetStatus,
    encoding: Encoding,
    payload: &[u8],
    allowed: &[u32],
    may_miss: bool,
) -> u32 {
    let mut got = [0; 4096];
    match (status, encoding) {
        (GetStatus::Miss, _) => {
            assert!(
                may_miss || allowed.contains(&ABSENT),
                "{key:?} of pool {pool} is gone; allowed: {allowed:?}"
            );
            return ABSENT;
        }
        (GetStatus::Hit, Encoding::SameFilled) => {
            codec::fill(u64::from_le_bytes(payload.try_into().unwrap()), &mut got);
        }
        (GetStatus::Hit, Encoding::Raw) => got.copy_from_slice(payload),
        other => panic!("{key:?} of pool {pool}: {other:?}"),
    }
    let version = allowed.iter().find(|&&version| version != ABSENT && page(pool, key, version) == got);
    *version.unwrap_or_else(|| panic!("{key:?} of pool {pool} holds none of the versions {allowed:?}"))
}

/// Compare the arena with the log, and bring the log up to date with what was under way.
fn compare(arena: &Path, log: &Log, mib: u64) -> (u64, u64) {
    let (store, recovery) = Store::open(&config(arena, mib)).unwrap();
    let (vm, pools) = pools(&store);
    let (mut present, mut under_way, mut out) = (0, 0, Vec::new());
    for (pool, pool_ref) in pools.iter().enumerate() {
        for thread in 0..THREADS {
            for index in 0..KEYS {
                let (key, entry) = (key(thread, index), log.entry(pool, thread, index));
                let (acknowledged, pending) = (entry.acknowledged.load(SeqCst), entry.pending.load(SeqCst));
                let mut allowed = vec![acknowledged];
                if pending != NOTHING_PENDING {
                    under_way += 1;
                    allowed.push(pending);
                    if mib < 16 {
                        // Without room for both, the old version goes before the new one comes.
                        allowed.push(ABSENT);
                    }
                }
                out.clear();
                let (status, encoding, _) = store.get(pool_ref, &key, false, &mut out);
                let version = check(pool, &key, status, encoding, &out, &allowed, pool != 0);
                present += u64::from(version != ABSENT);
                // The exclusive pool's page is out now.
                entry.acknowledged.store(if pool == 2 { ABSENT } else { version }, SeqCst);
                entry.pending.store(NOTHING_PENDING, SeqCst);
            }
        }
    }
    let (usage, stats) = (store.usage(), store.vm_stats(vm).unwrap());
    assert_eq!(recovery.persistent_pages, stats.persistent_pages);
    assert_eq!(usage.pages, stats.persistent_pages + stats.ephemeral_pages);
    assert_eq!(present, recovery.persistent_pages + recovery.ephemeral_pages, "no page but the known ones");
    assert!(usage.backed_bytes <= usage.capacity_bytes);
    (present, under_way)
}

fn kill(points: u64, mib: u64) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let arena = dir.path().join("arena");
    let log = Log::open(&dir.path().join("arena.log"));
    let mut random = Random(points * 1000 + mib);
    let (mut operations, mut under_way, mut present) = (0, 0, 0);
    for point in 0..points {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .env("TMEM_KILL_ARENA", &arena)
            .env("TMEM_KILL_MIB", mib.to_string())
            .env("TMEM_KILL_SEED", point.to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let before = log.operations.load(SeqCst);
        // Mostly while it works, now and then while it starts and recovers.
        if point % 5 != 4 {
            let deadline = Instant::now() + Duration::from_secs(60);
            while log.operations.load(SeqCst) < before + 20 && child.try_wait().unwrap().is_none() {
                assert!(Instant::now() < deadline, "the child did nothing for 60 s");
                std::thread::yield_now();
            }
        }
        std::thread::sleep(Duration::from_micros(u64::from(random.below(40_000))));
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "the child failed by itself: {status}");
        operations += log.operations.load(SeqCst) - before;
        if arena.exists() {
            let (pages, pending) = compare(&arena, &log, mib);
            under_way += pending;
            present = pages;
        }
    }
    println!("{points} kills, {operations} operations, {under_way} under way, {present} pages at the end");
    assert!(operations > points * 20 && under_way > 0 && present > 0);
}

#[test]
fn acknowledged_pages_survive_ten_kills_with_room() {
    kill(10, 64);
}

#[test]
fn acknowledged_pages_survive_ten_kills_under_pressure() {
    kill(10, 6);
}

#[test]
#[ignore = "minutes; make test-long"]
fn acknowledged_pages_survive_two_hundred_kills() {
    kill(100, 64);
    kill(100, 6);
}
