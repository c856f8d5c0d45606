//! The store's threads in thousands of orders: `RUSTFLAGS="--cfg shuttle" cargo test -p tmem-store --test shuttle`.

#![cfg(shuttle)]
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use std::sync::Arc;

use shuttle::thread;
use tmem_store::{PoolRef, Store, StoreConfig, VmId, VmLimits};
use tmem_wire::{Encoding, GetStatus, Key, PoolCreate, PoolKind, PutStatus};

const INCLUSIVE: PoolKind = PoolKind::Ephemeral { exclusive: false };
const EXCLUSIVE: PoolKind = PoolKind::Ephemeral { exclusive: true };
const SCHEDULES: usize = 400;

fn store(slabs: u64) -> (Arc<Store>, VmId) {
    let config = StoreConfig { slab_bytes: Some(64 << 10), ..StoreConfig::memfd(slabs << 16) };
    let (store, _) = Store::open(&config).unwrap();
    let vm = store.add_vm("guest", &VmLimits::default()).unwrap();
    (Arc::new(store), vm)
}

fn pool(store: &Store, vm: VmId, kind: PoolKind) -> PoolRef {
    let id = store.create_pool(vm, &PoolCreate::private(kind, &format!("{kind:?}"))).unwrap();
    store.pool(vm, id).unwrap()
}

fn key(index: u32) -> Key {
    Key { object: [1; 16], index }
}

/// An incompressible page: fifteen of them fill a slab.
fn page(index: u32, version: u32) -> [u8; 4096] {
    let mut page = [0; 4096];
    let mut state = index.wrapping_mul(2_654_435_761) ^ version.wrapping_mul(40_503) | 1;
    for byte in &mut page {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        *byte = state as u8;
    }
    page[..8].copy_from_slice(&[index.to_le_bytes(), version.to_le_bytes()].concat());
    page
}

fn put(store: &Store, pool: &PoolRef, index: u32, version: u32) -> PutStatus {
    store.put(pool, &key(index), Encoding::Raw, &page(index, version), None)
}

fn get(store: &Store, pool: &PoolRef, index: u32) -> Option<u32> {
    let mut out = Vec::new();
    let (status, ..) = store.get(pool, &key(index), false, &mut out);
    (status == GetStatus::Hit).then(|| {
        let version = u32::from_le_bytes(out[4..8].try_into().unwrap());
        assert!(out == page(index, version), "torn or foreign page");
        version
    })
}

fn explore(scenario: impl Fn() + Send + Sync + Copy + 'static) {
    shuttle::check_random(scenario, SCHEDULES);
    shuttle::check_pct(scenario, SCHEDULES, 3);
}

fn empty(store: &Store, vm: VmId) {
    store.remove_vm(vm).unwrap();
    let usage = store.usage();
    assert_eq!((usage.pages, usage.used_bytes, usage.payload_bytes, usage.raw_pages), (0, 0, 0, 0));
}

#[test]
fn one_page_is_put_flushed_fetched_and_evicted_at_once() {
    explore(|| {
        let (store, vm) = store(2);
        let limits = VmLimits { quota_bytes: 3 * 4500, ..VmLimits::default() };
        store.set_limits(vm, &limits).unwrap();
        let cache = pool(&store, vm, EXCLUSIVE);
        let threads: Vec<_> = (0..3)
            .map(|thread| {
                let (store, cache) = (store.clone(), cache.clone());
                thread::spawn(move || {
                    for round in 0..3 {
                        put(&store, &cache, round % 2, thread);
                        put(&store, &cache, 10 + thread * 3 + round, thread);
                        get(&store, &cache, round % 2);
                        store.flush_page(&cache, &key(1));
                        assert!(store.vm_stats(vm).unwrap().used_bytes <= limits.quota_bytes);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        empty(&store, vm);
    });
}

#[test]
fn persistent_pages_are_moved_while_they_are_replaced_and_fetched() {
    explore(|| {
        let (store, vm) = store(4);
        let swap = pool(&store, vm, PoolKind::Persistent);
        for index in 0..31 {
            assert_eq!(put(&store, &swap, index, 0), PutStatus::Stored);
        }
        // Three slabs, each nearly empty: shrinking moves what is left into one.
        for index in (0..31).filter(|index| index % 15 > 2) {
            store.flush_page(&swap, &key(index));
        }
        let user = {
            let (store, swap) = (store.clone(), swap.clone());
            thread::spawn(move || {
                for version in 1..4 {
                    assert_eq!(get(&store, &swap, 15), Some(version - 1));
                    assert_eq!(put(&store, &swap, 15, version), PutStatus::Stored);
                    assert_eq!(get(&store, &swap, 16), Some(0));
                }
            })
        };
        let shrinker = {
            let store = store.clone();
            thread::spawn(move || {
                store.set_capacity(1 << 16).unwrap();
                store.set_capacity(4 << 16).unwrap();
                store.free_memory(1 << 16);
            })
        };
        user.join().unwrap();
        shrinker.join().unwrap();
        for index in (0..31).filter(|index| index % 15 <= 2) {
            assert_eq!(get(&store, &swap, index), Some(if index == 15 { 3 } else { 0 }));
        }
        empty(&store, vm);
    });
}

#[test]
fn a_pool_is_destroyed_and_a_vm_frozen_under_their_users() {
    explore(|| {
        let (store, vm) = store(3);
        let cache = pool(&store, vm, INCLUSIVE);
        let users: Vec<_> = (0..2)
            .map(|thread| {
                let (store, cache) = (store.clone(), cache.clone());
                thread::spawn(move || {
                    for index in 0..4 {
                        put(&store, &cache, index, thread);
                        get(&store, &cache, index);
                    }
                })
            })
            .collect();
        let admin = {
            let (store, id) = (store.clone(), cache.id());
            thread::spawn(move || {
                store.set_frozen(vm, true).unwrap();
                store.flush_ephemeral(vm);
                store.set_frozen(vm, false).unwrap();
                store.destroy_pool(vm, id).unwrap();
            })
        };
        users.into_iter().for_each(|user| user.join().unwrap());
        admin.join().unwrap();
        assert_eq!(store.usage().used_bytes, 0);
        empty(&store, vm);
    });
}

#[test]
fn two_vms_take_each_others_last_room() {
    explore(|| {
        let (store, one) = store(1);
        let two = store.add_vm("neighbour", &VmLimits::default()).unwrap();
        let pools = [pool(&store, one, INCLUSIVE), pool(&store, two, PoolKind::Persistent)];
        for index in 0..12 {
            put(&store, &pools[0], index, 0);
        }
        let threads: Vec<_> = pools
            .iter()
            .cloned()
            .map(|pool| {
                let store = store.clone();
                thread::spawn(move || {
                    (100..108).filter(|&i| put(&store, &pool, i, 1) == PutStatus::Stored).count()
                })
            })
            .collect();
        let stored: Vec<usize> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(stored[1], 8, "persistent pages displace ephemeral ones");
        for index in 100..108 {
            assert_eq!(get(&store, &pools[1], index), Some(1));
        }
        store.remove_vm(two).unwrap();
        empty(&store, one);
    });
}
