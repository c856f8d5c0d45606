//! What docs/performance.md extrapolates from: start-up at several sizes, the cost of many VMs, and of a shared lock.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use tmem_store::codec::{self, Page};
use tmem_store::{PoolRef, Store, StoreConfig, VmLimits};
use tmem_wire::{Encoding, GetStatus, Key, PoolCreate, PoolKind, PutStatus};

use crate::{cpu_ns, Samples, HEAP};

/// VMs of the store with many.
const VMS: usize = 500;

/// A page as a guest that compresses sends it, so that filling an arena takes little time.
struct Block {
    encoding: Encoding,
    bytes: Vec<u8>,
}

fn blocks(pages: &[Page]) -> Vec<Block> {
    let mut block = [0; codec::STORE_RAW_ABOVE];
    pages
        .iter()
        .map(|page| match codec::compress(page, &mut block) {
            Some(bytes) => Block { encoding: Encoding::Lz4, bytes: block[..bytes].to_vec() },
            None => Block { encoding: Encoding::Raw, bytes: page.to_vec() },
        })
        .collect()
}

fn key(index: usize) -> Key {
    Key { object: *b"benchmark object", index: index as u32 }
}

fn pool_of(store: &Store, name: &str, kind: PoolKind) -> PoolRef {
    let vm = store.add_vm(name, &VmLimits::default()).unwrap();
    let id = store.create_pool(vm, &PoolCreate::private(kind, "bench")).unwrap();
    store.pool(vm, id).unwrap()
}

pub(crate) fn run(pages: &[Page], samples: &mut Samples) {
    let blocks = blocks(pages);
    for gib in [1, 2, 4] {
        recovery(&blocks, gib, samples);
    }
    many_vms(&blocks, samples);
    one_lock(samples);
}

/// Seconds from opening an arena with so many GiB of stored pages until it serves.
fn recovery(blocks: &[Block], gib: u64, samples: &mut Samples) {
    let path = std::path::PathBuf::from(format!("/dev/shm/tmem-bench-{}", std::process::id()));
    // One slab size for all, that of a large arena.
    let config = StoreConfig {
        slab_bytes: Some(2 << 20),
        ..StoreConfig::file(&path, gib * (1300 << 20) + (256 << 20))
    };
    let mut index = 0;
    {
        let (store, _) = Store::open(&config).unwrap();
        let pool = pool_of(&store, "bench", PoolKind::Persistent);
        while store.usage().payload_bytes < gib << 30 {
            for _ in 0..4096 {
                let Block { encoding, bytes } = &blocks[index % blocks.len()];
                assert_eq!(store.put(&pool, &key(index), *encoding, bytes, None), PutStatus::Stored);
                index += 1;
            }
        }
    }
    for _ in 0..5 {
        let start = Instant::now();
        let (store, _) = Store::open(&config).unwrap();
        let vm = store.find_vm("bench").unwrap();
        let pool = store.pool(vm, store.pool_stats(vm)[0].id).unwrap();
        let mut out = Vec::new();
        assert_eq!(store.get(&pool, &key(12345), false, &mut out).0, GetStatus::Hit);
        samples.entry(format!("scale_recovery_{gib}gib_s")).or_default().push(start.elapsed().as_secs_f64());
    }
    samples.insert(format!("scale_recovery_{gib}gib_pages"), vec![index as f64]);
    std::fs::remove_file(&path).unwrap();
}

/// A put into a full arena, which evicts, with one VM and with hundreds; and what a VM with a pool costs by itself.
fn many_vms(blocks: &[Block], samples: &mut Samples) {
    const CAPACITY: u64 = 512 << 20;
    let fill = |count: usize| {
        let (store, _) = Store::open(&StoreConfig::memfd(CAPACITY)).unwrap();
        let heap = HEAP.load(Relaxed);
        let pools: Vec<PoolRef> = (0..count)
            .map(|vm| pool_of(&store, &format!("vm{vm}"), PoolKind::Ephemeral { exclusive: true }))
            .collect();
        let each = (HEAP.load(Relaxed) - heap) / count;
        let mut next = 0;
        while store.usage().pages_evicted == 0 {
            for _ in 0..1024 {
                put(&store, &pools, blocks, next);
                next += 1;
            }
        }
        (store, pools, next, each)
    };
    let (one, many) = (fill(1), fill(VMS));
    samples.insert("scale_vm_bytes".into(), vec![many.3 as f64]);
    let mut next = [one.2, many.2];
    for _ in 0..60 {
        for (at, (store, pools, ..)) in [&one, &many].into_iter().enumerate() {
            const ROUND: usize = 2048;
            let start = cpu_ns();
            for _ in 0..ROUND {
                put(store, pools, blocks, next[at]);
                next[at] += 1;
            }
            let name = format!("scale_put_{}_vms_ns", pools.len());
            samples.entry(name).or_default().push((cpu_ns() - start) / ROUND as f64);
        }
    }
}

fn put(store: &Store, pools: &[PoolRef], blocks: &[Block], next: usize) {
    let Block { encoding, bytes } = &blocks[next % blocks.len()];
    let pool = &pools[next % pools.len()];
    assert_eq!(store.put(pool, &key(next / pools.len()), *encoding, bytes, None), PutStatus::Stored);
}

/// Gets by two threads, each of a page of its own: of different shards, and of one and the same. What the second
/// thread adds in the latter case is what is done outside the lock. Of the operations, a get that is passed on
/// compressed is the one of which most is done under it.
fn one_lock(samples: &mut Samples) {
    let (store, _) = Store::open(&StoreConfig::memfd(64 << 20)).unwrap();
    let pool = pool_of(&store, "bench", PoolKind::Persistent);
    let mut page = [0; 4096];
    for (at, byte) in page.iter_mut().enumerate().take(2200) {
        *byte = (at as u32).wrapping_mul(0x9e37_79b9).rotate_left(at as u32 % 31) as u8;
    }
    // Pages of one block of 64 share a shard.
    for index in 0..64 * 64 {
        store.put(&pool, &key(index), Encoding::Raw, &page, None);
    }
    let rate = |threads: usize, apart: usize| {
        const GETS: usize = 1_000_000;
        let start = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (store, pool) = (&store, &pool);
                scope.spawn(move || {
                    let mut out = Vec::with_capacity(8192);
                    for at in 0..GETS {
                        out.clear();
                        let index = thread * apart + at % 16;
                        assert_eq!(store.get(pool, &key(index), true, &mut out).0, GetStatus::Hit);
                    }
                });
            }
        });
        (threads * GETS) as f64 / start.elapsed().as_secs_f64()
    };
    for _ in 0..5 {
        for (name, threads, apart) in [
            ("scale_gets_1_per_s", 1, 0),
            ("scale_gets_2_apart_per_s", 2, 640),
            ("scale_gets_2_one_shard_per_s", 2, 16),
        ] {
            samples.entry(name.into()).or_default().push(rate(threads, apart));
        }
    }
}
