//! Many threads at once: quotas hold at every instant, nothing is lost, nothing leaks.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use tmem_store::{codec, PoolRef, Store, StoreConfig, VmId, VmLimits};
use tmem_wire::{Encoding, GetStatus, Key, PoolCreate, PoolKind, PutStatus};

const INCLUSIVE: PoolKind = PoolKind::Ephemeral { exclusive: false };
const EXCLUSIVE: PoolKind = PoolKind::Ephemeral { exclusive: true };

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as u32 % limit
    }
}

fn page(object: u8, index: u32, version: u32) -> [u8; 4096] {
    let mut page = [0; 4096];
    let mut random = Random(u64::from(object) << 50 | u64::from(version) << 30 | u64::from(index) << 3 | 1);
    let noise = random.below(4096) as usize;
    for byte in &mut page[..noise] {
        *byte = random.below(256) as u8;
    }
    page[..12].copy_from_slice(&[index.to_le_bytes(), version.to_le_bytes(), [object; 4]].concat());
    page
}

fn pool(store: &Store, vm: VmId, kind: PoolKind) -> PoolRef {
    let id = store.create_pool(vm, &PoolCreate::private(kind, &format!("{kind:?}"))).unwrap();
    store.pool(vm, id).unwrap()
}

/// Read a page and check that it is one that was put under this key, whichever version.
fn get(store: &Store, pool: &PoolRef, key: &Key, out: &mut Vec<u8>) -> Option<u32> {
    out.clear();
    match store.get(pool, key, false, out) {
        (GetStatus::Miss, ..) => None,
        (GetStatus::Hit, Encoding::Raw, sum) => {
            let got: [u8; 4096] = out[..].try_into().unwrap();
            let version = u32::from_le_bytes(got[4..8].try_into().unwrap());
            assert_eq!(got, page(key.object[0], key.index, version), "foreign or torn page");
            assert_eq!(sum, codec::checksum(&got));
            Some(version)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_quota_is_never_exceeded_even_for_an_instant() {
    const QUOTA: u64 = 1 << 20;
    let (store, _) = Store::open(&StoreConfig::memfd(32 << 20)).unwrap();
    let limits = VmLimits { quota_bytes: QUOTA, ..VmLimits::default() };
    let vm = store.add_vm("guest", &limits).unwrap();
    let pools = [PoolKind::Persistent, INCLUSIVE, EXCLUSIVE].map(|kind| pool(&store, vm, kind));
    let (done, most) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut looks = 0_u64;
            while !done.load(SeqCst) {
                let used = store.vm_stats(vm).unwrap().used_bytes;
                most.fetch_max(used, SeqCst);
                assert!(used <= QUOTA, "{used} bytes are over the quota");
                looks += 1;
            }
            looks
        });
        let writers: Vec<_> = (0..8_u8)
            .map(|thread| {
                let (store, pools) = (&store, &pools);
                scope.spawn(move || {
                    let (mut random, mut out) = (Random(u64::from(thread) + 1), Vec::new());
                    for _ in 0..4000 {
                        let pool = &pools[random.below(3) as usize];
                        let index = random.below(400);
                        // Half of the keys are fought over.
                        let key = Key { object: [thread * u8::from(index % 2 == 0); 16], index };
                        match random.below(4) {
                            0 => drop(get(store, pool, &key, &mut out)),
                            1 if random.below(4) == 0 => drop(store.flush_page(pool, &key)),
                            _ => {
                                let page = page(key.object[0], index, random.below(1000));
                                store.put(pool, &key, Encoding::Raw, &page, None);
                            }
                        }
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, SeqCst);
        assert!(watcher.join().unwrap() > 100);
    });
    assert!(most.load(SeqCst) > QUOTA / 10 * 9, "the quota was tested");
    let stats = store.vm_stats(vm).unwrap();
    assert!(stats.puts_refused > 0 && stats.pages_evicted > 0);
    assert_eq!(store.remove_vm(vm), Ok(stats.ephemeral_pages + stats.persistent_pages));
    let usage = store.usage();
    assert_eq!((usage.pages, usage.used_bytes, usage.payload_bytes), (0, 0, 0), "nothing leaks");
}

#[test]
fn persistent_pages_stay_while_everything_moves() {
    let (store, _) = Store::open(&StoreConfig::memfd(12 << 20)).unwrap();
    let vm = store.add_vm("guest", &VmLimits::default()).unwrap();
    let other = store.add_vm("neighbour", &VmLimits { weight: 300, ..VmLimits::default() }).unwrap();
    let (swap, cache) = (pool(&store, vm, PoolKind::Persistent), pool(&store, vm, INCLUSIVE));
    let neighbour = pool(&store, other, EXCLUSIVE);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let keepers: Vec<_> = (1..4_u8)
            .map(|thread| {
                let (store, swap) = (&store, &swap);
                scope.spawn(move || {
                    let (mut random, mut out) = (Random(u64::from(thread)), Vec::new());
                    let mut versions = [None; 300];
                    for _ in 0..6000 {
                        let index = random.below(300);
                        let key = Key { object: [thread; 16], index };
                        assert_eq!(get(store, swap, &key, &mut out), versions[index as usize]);
                        let version = random.below(1000);
                        let page = page(thread, index, version);
                        let status = store.put(swap, &key, Encoding::Raw, &page, None);
                        versions[index as usize] = (status == PutStatus::Stored).then_some(version);
                    }
                })
            })
            .collect();
        let churners = [(&cache, 11_u8), (&neighbour, 12)].map(|(pool, thread)| {
            let (store, done) = (&store, &done);
            scope.spawn(move || {
                let (mut random, mut out) = (Random(thread.into()), Vec::new());
                while !done.load(SeqCst) {
                    let key = Key { object: [thread; 16], index: random.below(20_000) };
                    if get(store, pool, &key, &mut out).is_none() {
                        let page = page(thread, key.index, 1);
                        store.put(pool, &key, Encoding::Raw, &page, None);
                    }
                }
            })
        });
        let resizer = scope.spawn(|| {
            let mut round = 0;
            while !done.load(SeqCst) {
                store.set_capacity([5, 12, 8][round % 3] << 20).unwrap();
                store.free_memory(1 << 20);
                round += 1;
            }
        });
        for keeper in keepers {
            keeper.join().unwrap();
        }
        done.store(true, SeqCst);
        resizer.join().unwrap();
        for churner in churners {
            churner.join().unwrap();
        }
    });
    assert!(store.usage().pages_moved > 0, "compaction was tested");
    assert!(store.usage().pages_evicted > 0, "eviction was tested");
    store.remove_vm(vm).unwrap();
    store.remove_vm(other).unwrap();
    assert_eq!(store.usage().used_bytes, 0);
}

#[test]
fn an_exclusive_page_is_given_to_one_only() {
    let (store, _) = Store::open(&StoreConfig::memfd(8 << 20)).unwrap();
    let vm = store.add_vm("guest", &VmLimits::default()).unwrap();
    let pool = pool(&store, vm, EXCLUSIVE);
    let hits = AtomicU64::new(0);
    for index in 0..1000 {
        store.put(&pool, &Key { object: [0; 16], index }, Encoding::Raw, &page(0, index, 7), None);
    }
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut out = Vec::new();
                for index in 0..1000 {
                    let key = Key { object: [0; 16], index };
                    hits.fetch_add(get(&store, &pool, &key, &mut out).is_some().into(), SeqCst);
                }
            });
        }
    });
    assert_eq!(hits.load(SeqCst), 1000);
}

#[test]
fn a_pool_that_is_destroyed_under_its_users_is_empty_afterwards() {
    let (store, _) = Store::open(&StoreConfig::memfd(16 << 20)).unwrap();
    let vm = store.add_vm("guest", &VmLimits::default()).unwrap();
    for round in 0..20_u32 {
        let id = store.create_pool(vm, &PoolCreate::private(INCLUSIVE, "cache")).unwrap();
        let pool = store.pool(vm, id).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..3_u8 {
                let (store, pool) = (&store, &pool);
                scope.spawn(move || {
                    for index in 0..150 {
                        let key = Key { object: [thread; 16], index };
                        store.put(pool, &key, Encoding::Raw, &page(thread, index, round), None);
                    }
                });
            }
            scope.spawn(|| store.destroy_pool(vm, id).unwrap());
        });
        let usage = store.usage();
        assert_eq!((usage.pages, usage.used_bytes), (0, 0));
        assert_eq!(store.vm_stats(vm).unwrap().used_bytes, 0);
    }
}
