//! The contract, rule by rule, against a store of its own.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use tmem_store::{
    codec, AdminError, Attach, Incompressible, PoolError, PoolRef, Store, StoreConfig, VmId, VmLimits,
};
use tmem_wire::{Encoding, FlushStatus, GetStatus, Key, PoolCreate, PoolKind, PutStatus};

const PERSISTENT: PoolKind = PoolKind::Persistent;
const EXCLUSIVE: PoolKind = PoolKind::Ephemeral { exclusive: true };
const INCLUSIVE: PoolKind = PoolKind::Ephemeral { exclusive: false };

fn store(mib: u64) -> Store {
    Store::open(&StoreConfig::memfd(mib << 20)).unwrap().0
}

fn vm(store: &Store, name: &str) -> VmId {
    store.add_vm(name, &VmLimits::default()).unwrap()
}

fn pool(store: &Store, vm: VmId, kind: PoolKind, name: &str) -> PoolRef {
    let id = store.create_pool(vm, &PoolCreate::private(kind, name)).unwrap();
    store.pool(vm, id).unwrap()
}

fn key(index: u32) -> Key {
    Key { object: *b"an object's name", index }
}

/// A page whose compressed size grows with `noise` (0 to 4096 random bytes); different for every `seed`.
fn page(seed: u64, noise: usize) -> [u8; 4096] {
    let mut page = [0; 4096];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for byte in &mut page[..noise.max(16)] {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state as u8;
    }
    page
}

fn put(store: &Store, pool: &PoolRef, key: &Key, page: &[u8; 4096]) -> PutStatus {
    store.put(pool, key, Encoding::Raw, page, None)
}

fn get(store: &Store, pool: &PoolRef, key: &Key) -> Option<[u8; 4096]> {
    let mut out = Vec::new();
    let (status, encoding, sum) = store.get(pool, key, false, &mut out);
    if status == GetStatus::Miss {
        assert!(out.is_empty());
        return None;
    }
    assert_eq!(status, GetStatus::Hit);
    let mut page = [0; 4096];
    match encoding {
        Encoding::Raw => page.copy_from_slice(&out),
        Encoding::SameFilled => codec::fill(u64::from_le_bytes(out.try_into().unwrap()), &mut page),
        other => panic!("unexpected {other:?}"),
    }
    assert_eq!(codec::checksum(&page), sum);
    Some(page)
}

#[test]
fn pages_come_back_whatever_they_hold() {
    let store = store(8);
    let pool = pool(&store, vm(&store, "a"), PERSISTENT, "swap");
    for (index, noise) in (0..=4096).step_by(128).enumerate() {
        let page = page(index as u64, noise);
        assert_eq!(put(&store, &pool, &key(index as u32), &page), PutStatus::Stored);
        assert_eq!(get(&store, &pool, &key(index as u32)), Some(page));
    }
    for word in [0, u64::MAX, 0x0123_4567_89ab_cdef] {
        let mut page = [0; 4096];
        codec::fill(word, &mut page);
        put(&store, &pool, &key(99), &page);
        assert_eq!(get(&store, &pool, &key(99)), Some(page));
    }
    let usage = store.usage();
    assert_eq!(usage.same_filled_pages, 1);
    assert!(usage.payload_bytes * 10 < usage.raw_bytes * 6, "pages are compressed");
}

#[test]
fn a_duplicate_put_replaces() {
    let store = store(8);
    let pool = pool(&store, vm(&store, "a"), INCLUSIVE, "cache");
    for round in 0..100 {
        let page = page(round, round as usize * 40);
        assert_eq!(put(&store, &pool, &key(1), &page), PutStatus::Stored);
        assert_eq!(get(&store, &pool, &key(1)), Some(page));
    }
    assert_eq!(store.usage().pages, 1);
}

#[test]
fn an_exclusive_get_removes_and_others_do_not() {
    let store = store(8);
    let a = vm(&store, "a");
    for (kind, stays) in [(PERSISTENT, true), (INCLUSIVE, true), (EXCLUSIVE, false)] {
        let pool = pool(&store, a, kind, &format!("{kind:?}"));
        put(&store, &pool, &key(1), &page(1, 700));
        assert!(get(&store, &pool, &key(1)).is_some());
        assert_eq!(get(&store, &pool, &key(1)).is_some(), stays, "{kind:?}");
    }
}

#[test]
fn frozen_refuses_puts_and_a_duplicate_put_flushes() {
    let store = store(8);
    let a = vm(&store, "a");
    let pool = pool(&store, a, PERSISTENT, "swap");
    put(&store, &pool, &key(1), &page(1, 700));
    put(&store, &pool, &key(2), &page(2, 700));
    store.set_frozen(a, true).unwrap();
    assert_eq!(put(&store, &pool, &key(1), &page(3, 700)), PutStatus::Frozen);
    assert_eq!(get(&store, &pool, &key(1)), None);
    assert_eq!(get(&store, &pool, &key(2)), Some(page(2, 700)));
    assert_eq!(store.flush_page(&pool, &key(2)), FlushStatus::Flushed);
    store.set_frozen(a, false).unwrap();
    assert_eq!(put(&store, &pool, &key(1), &page(3, 700)), PutStatus::Stored);
}

#[test]
fn flushes_take_what_they_name_and_nothing_else() {
    let store = store(16);
    let a = vm(&store, "a");
    let (one, two) = (pool(&store, a, PERSISTENT, "one"), pool(&store, a, INCLUSIVE, "two"));
    for index in 0..300 {
        put(&store, &one, &key(index), &page(index.into(), 300));
        put(&store, &two, &key(index * 1000), &page(index.into(), 300));
        put(&store, &one, &Key { object: [7; 16], index }, &page(9, 300));
    }
    assert_eq!(store.flush_page(&one, &key(5)), FlushStatus::Flushed);
    assert_eq!(store.flush_page(&one, &key(5)), FlushStatus::Absent);
    assert_eq!(store.flush_object(&one, &key(0).object), 299);
    assert_eq!(store.flush_object(&one, &key(0).object), 0);
    assert!(get(&store, &one, &Key { object: [7; 16], index: 3 }).is_some());
    assert_eq!(store.flush_pool(&two), 300);
    assert_eq!(store.flush_ephemeral(a), 0);
    assert_eq!(store.destroy_pool(a, one.id()), Ok(300));
    let usage = store.usage();
    assert_eq!((usage.pages, usage.used_bytes, usage.payload_bytes), (0, 0, 0));
    assert_eq!(put(&store, &one, &key(1), &page(1, 1)), PutStatus::NoMemory, "the pool is gone");
}

#[test]
fn a_vm_does_not_reach_another_vms_pool() {
    let store = store(8);
    let (a, b) = (vm(&store, "a"), vm(&store, "b"));
    let of_a = pool(&store, a, PERSISTENT, "swap");
    let of_b = pool(&store, b, PERSISTENT, "swap");
    put(&store, &of_a, &key(1), &page(1, 500));
    assert!(store.pool(b, of_a.id()).is_none());
    assert_eq!(store.destroy_pool(b, of_a.id()), Err(PoolError::NoSuchPool));
    assert_eq!(get(&store, &of_b, &key(1)), None);
    assert_eq!(store.flush_pool(&of_b), 0);
    assert!(get(&store, &of_a, &key(1)).is_some());
}

#[test]
fn a_shared_pool_needs_a_grant_and_is_charged_to_who_puts() {
    let store = store(8);
    let (a, b) = (vm(&store, "a"), vm(&store, "b"));
    let spec = PoolCreate { shared: Some([9; 16]), ..PoolCreate::private(EXCLUSIVE, "shared") };
    assert_eq!(store.create_pool(a, &spec), Err(PoolError::Denied));
    store.grant_shared([9; 16], a).unwrap();
    store.grant_shared([9; 16], b).unwrap();
    let of_a = store.pool(a, store.create_pool(a, &spec).unwrap()).unwrap();
    let of_b = store.pool(b, store.create_pool(b, &spec).unwrap()).unwrap();
    put(&store, &of_a, &key(1), &page(1, 500));
    assert_eq!(get(&store, &of_b, &key(1)), Some(page(1, 500)), "shared");
    assert_eq!(get(&store, &of_a, &key(1)), Some(page(1, 500)), "and inclusive");
    assert_eq!(store.vm_stats(b).unwrap().used_bytes, 0);
    put(&store, &of_b, &key(1), &page(2, 500));
    assert_eq!(store.vm_stats(a).unwrap().used_bytes, 0, "replaced by the other member");
    put(&store, &of_a, &key(2), &page(3, 500));
    assert!(store.revoke_shared([9; 16], b));
    assert_eq!(get(&store, &of_a, &key(1)), None, "a member's pages leave with it");
    assert_eq!(get(&store, &of_a, &key(2)), Some(page(3, 500)));
    let persistent = PoolCreate { kind: PERSISTENT, ..spec };
    assert_eq!(
        store.create_pool(a, &PoolCreate { name: [b'x'; 32], ..persistent }),
        Err(PoolError::Unsupported)
    );
}

#[test]
fn pools_are_found_again_by_name_and_properties() {
    let store = store(8);
    let a = vm(&store, "a");
    let id = store.create_pool(a, &PoolCreate::private(PERSISTENT, "swap")).unwrap();
    assert_eq!(store.create_pool(a, &PoolCreate::private(PERSISTENT, "swap")), Ok(id));
    assert_eq!(store.create_pool(a, &PoolCreate::private(EXCLUSIVE, "swap")), Err(PoolError::Conflict));
    let mut last = Ok(id);
    for number in 0..100 {
        last = store.create_pool(a, &PoolCreate::private(EXCLUSIVE, &format!("{number}")));
    }
    assert_eq!(last, Err(PoolError::Limit));
}

#[test]
fn a_new_boot_destroys_what_the_old_one_left() {
    let store = store(8);
    let a = vm(&store, "a");
    store.attach_boot(a, [1; 16]);
    let pool = pool(&store, a, PERSISTENT, "swap");
    put(&store, &pool, &key(1), &page(1, 500));
    assert_eq!(store.attach_boot(a, [1; 16]), Attach::Same);
    assert!(get(&store, &pool, &key(1)).is_some());
    assert_eq!(store.attach_boot(a, [2; 16]), Attach::Fresh { pools_destroyed: 1, pages: 1 });
    assert_eq!(get(&store, &pool, &key(1)), None);
    assert_eq!(store.usage().used_bytes, 0);
}

#[test]
fn lz4_from_the_guest_is_checked_and_passed_on() {
    let store = store(8);
    let pool = pool(&store, vm(&store, "a"), PERSISTENT, "swap");
    let content = page(3, 900);
    let mut block = [0; codec::BLOCK_MAX];
    let bytes = codec::compress(&content, &mut block).unwrap();
    let sum = codec::checksum(&content);
    assert_eq!(store.put(&pool, &key(1), Encoding::Lz4, &block[..bytes], Some(sum)), PutStatus::Stored);
    assert_eq!(get(&store, &pool, &key(1)), Some(content));
    let mut out = vec![1, 2, 3];
    assert_eq!(store.get(&pool, &key(1), true, &mut out), (GetStatus::Hit, Encoding::Lz4, sum));
    assert_eq!(out[3..], block[..bytes]);
    // Refused, and the old page is gone: a truncated block, a wrong checksum, no block at all.
    assert_eq!(store.put(&pool, &key(1), Encoding::Lz4, &block[..bytes - 1], None), PutStatus::Corrupt);
    assert_eq!(get(&store, &pool, &key(1)), None);
    assert_eq!(store.put(&pool, &key(1), Encoding::Lz4, &block[..bytes], Some(!sum)), PutStatus::Corrupt);
    assert_eq!(store.put(&pool, &key(1), Encoding::Lz4, &[], None), PutStatus::Corrupt);
    assert_eq!(store.put(&pool, &key(1), Encoding::Raw, &content[1..], None), PutStatus::Corrupt);
    assert_eq!(store.put(&pool, &key(1), Encoding::Raw, &content, Some(!sum)), PutStatus::Corrupt);
}

#[test]
fn incompressible_pages_are_refused_by_configuration() {
    let config = StoreConfig { incompressible: Incompressible::Refuse, ..StoreConfig::memfd(8 << 20) };
    let (store, _) = Store::open(&config).unwrap();
    let pool = pool(&store, vm(&store, "a"), PERSISTENT, "swap");
    put(&store, &pool, &key(1), &page(1, 500));
    assert_eq!(put(&store, &pool, &key(1), &page(1, 4096)), PutStatus::Incompressible);
    assert_eq!(get(&store, &pool, &key(1)), None);
}

#[test]
fn compression_is_switched_at_run_time() {
    let store = store(8);
    let pool = pool(&store, vm(&store, "a"), PERSISTENT, "swap");
    store.set_compression(false);
    put(&store, &pool, &key(1), &page(1, 500));
    assert_eq!(store.usage().payload_bytes, 4096);
    store.set_compression(true);
    put(&store, &pool, &key(2), &page(2, 500));
    assert!(store.usage().payload_bytes < 4096 + 700);
    assert_eq!(get(&store, &pool, &key(1)), Some(page(1, 500)));
    assert_eq!(get(&store, &pool, &key(2)), Some(page(2, 500)));
}

#[test]
fn a_quota_evicts_the_vms_own_ephemeral_pages_and_refuses_persistent_ones() {
    let store = store(32);
    let (a, b) = (vm(&store, "a"), vm(&store, "b"));
    let limits = VmLimits { quota_bytes: 1 << 20, ..VmLimits::default() };
    store.set_limits(a, &limits).unwrap();
    let (cache, swap) = (pool(&store, a, INCLUSIVE, "cache"), pool(&store, a, PERSISTENT, "swap"));
    let of_b = pool(&store, b, INCLUSIVE, "cache");
    put(&store, &of_b, &key(1), &page(1, 2000));
    for index in 0..1000 {
        assert_eq!(put(&store, &cache, &key(index), &page(index.into(), 2000)), PutStatus::Stored);
        assert!(store.vm_stats(a).unwrap().used_bytes <= 1 << 20);
    }
    assert!(store.vm_stats(a).unwrap().pages_evicted > 400);
    let mut stored = 0;
    while put(&store, &swap, &key(stored), &page(stored.into(), 2000)) == PutStatus::Stored {
        stored += 1;
    }
    let stats = store.vm_stats(a).unwrap();
    assert_eq!((stats.ephemeral_pages, stats.persistent_pages), (0, stored.into()));
    assert!(stats.used_bytes > (1 << 20) - 3000);
    for index in 0..stored {
        assert_eq!(get(&store, &swap, &key(index)), Some(page(index.into(), 2000)));
    }
    // At the quota a page can still be replaced.
    assert_eq!(put(&store, &swap, &key(0), &page(77, 2000)), PutStatus::Stored);
    assert!(get(&store, &of_b, &key(1)).is_some(), "the neighbour lost nothing");
    // Refused pages do not leave an old version behind.
    let used = store.vm_stats(a).unwrap().used_bytes;
    store.set_limits(a, &VmLimits { quota_bytes: used, ..limits }).unwrap();
    assert_eq!(put(&store, &swap, &key(1), &page(78, 4096)), PutStatus::OverQuota);
    assert_eq!(get(&store, &swap, &key(1)), None);
}

#[test]
fn persistent_pages_are_limited_by_what_they_are_to_the_guest() {
    let store = store(8);
    let limits = VmLimits { persistent_max_bytes: 10 * 4096, ..VmLimits::default() };
    let a = store.add_vm("a", &limits).unwrap();
    let swap = pool(&store, a, PERSISTENT, "swap");
    for index in 0..10 {
        assert_eq!(put(&store, &swap, &key(index), &[0; 4096]), PutStatus::Stored);
    }
    assert_eq!(put(&store, &swap, &key(10), &[0; 4096]), PutStatus::OverQuota);
    assert_eq!(put(&store, &swap, &key(9), &page(9, 100)), PutStatus::Stored, "replacing is not growing");
    store.flush_page(&swap, &key(3));
    assert_eq!(put(&store, &swap, &key(10), &[0; 4096]), PutStatus::Stored);
}

#[test]
fn weights_share_the_arena_in_proportion() {
    let store = store(32);
    let names = [("one", 100), ("two", 200), ("four", 400)];
    let pools: Vec<_> = names
        .iter()
        .map(|&(name, weight)| {
            let vm = store.add_vm(name, &VmLimits { weight, ..VmLimits::default() }).unwrap();
            (vm, weight, pool(&store, vm, INCLUSIVE, "cache"))
        })
        .collect();
    for index in 0..30_000 {
        for (_, _, pool) in &pools {
            put(&store, pool, &key(index), &page(index.into(), 2000));
        }
    }
    let used: Vec<f64> =
        pools.iter().map(|(vm, ..)| store.vm_stats(*vm).unwrap().used_bytes as f64).collect();
    let total: f64 = used.iter().sum();
    for ((_, weight, _), used) in pools.iter().zip(&used) {
        let share = f64::from(*weight) / 700.0;
        assert!((used / total - share).abs() < 0.02, "weight {weight} has {:.3}", used / total);
    }
    assert!(total > 0.85 * 32.0 * f64::from(1 << 20), "only {total} bytes in use");
}

#[test]
fn a_guaranteed_minimum_is_kept_and_can_always_be_had() {
    let store = store(16);
    let quiet = store.add_vm("quiet", &VmLimits { min_bytes: 4 << 20, ..VmLimits::default() }).unwrap();
    let greedy = vm(&store, "greedy");
    let (quiet_cache, quiet_swap) =
        (pool(&store, quiet, INCLUSIVE, "c"), pool(&store, quiet, PERSISTENT, "s"));
    let (cache, swap) = (pool(&store, greedy, INCLUSIVE, "c"), pool(&store, greedy, PERSISTENT, "s"));
    for index in 0..1000 {
        put(&store, &quiet_cache, &key(index), &page(index.into(), 2000));
    }
    let kept = store.vm_stats(quiet).unwrap().ephemeral_pages;
    for index in 0..20_000 {
        put(&store, &cache, &key(index), &page(index.into(), 2000));
    }
    for index in 0..20_000 {
        put(&store, &swap, &key(index), &page(index.into(), 2000));
    }
    assert_eq!(store.vm_stats(quiet).unwrap().ephemeral_pages, kept, "under its minimum nothing is evicted");
    store.flush_pool(&quiet_cache);
    for index in 0..20_000 {
        put(&store, &swap, &key(100_000 + index), &page(index.into(), 2000));
    }
    let mut stored = 0;
    while put(&store, &quiet_swap, &key(stored), &page(stored.into(), 2000)) == PutStatus::Stored {
        stored += 1;
    }
    let used = store.vm_stats(quiet).unwrap().used_bytes;
    assert!(used >= 4 << 20, "only {used} bytes of the minimum could be had");
}

#[test]
fn minima_must_fit() {
    let store = store(16);
    let big = VmLimits { min_bytes: 12 << 20, ..VmLimits::default() };
    store.add_vm("a", &big).unwrap();
    assert!(matches!(store.add_vm("b", &big), Err(AdminError::Overcommitted { .. })));
    let odd = VmLimits { min_bytes: 2, quota_bytes: 1, ..VmLimits::default() };
    assert!(matches!(store.add_vm("c", &odd), Err(AdminError::Limits(_))));
    assert!(matches!(store.add_vm("", &VmLimits::default()), Err(AdminError::Name { .. })));
    assert!(store.set_capacity(8 << 20).is_err());
}

#[test]
fn capacity_shrinks_without_losing_a_persistent_page_and_grows_again() {
    let store = store(32);
    let a = vm(&store, "a");
    let (cache, swap) = (pool(&store, a, INCLUSIVE, "cache"), pool(&store, a, PERSISTENT, "swap"));
    for index in 0..9000 {
        put(&store, &cache, &key(index), &page(index.into(), index as usize % 4096));
        if index % 4 == 0 {
            put(&store, &swap, &key(index), &page(index.into(), index as usize % 4096));
        }
    }
    let blocks_before = blocks(&store);
    assert_eq!(store.set_capacity(8 << 20), Ok(8 << 20));
    assert!(blocks(&store) <= (8 << 20) + (1 << 20), "the memory went back to the host");
    assert!(blocks_before > 20 << 20);
    for index in (0..9000).step_by(4) {
        assert_eq!(get(&store, &swap, &key(index)), Some(page(index.into(), index as usize % 4096)));
    }
    let least = store.set_capacity(0).unwrap();
    assert!(least > 4 << 20, "persistent pages stay");
    assert!(least < 8 << 20, "and nothing else does: {least}");
    assert_eq!(store.vm_stats(a).unwrap().ephemeral_pages, 0);
    store.set_capacity(64 << 20).unwrap();
    for index in 0..9000 {
        put(&store, &cache, &key(index), &page(index.into(), 3000));
    }
    assert!(store.usage().used_bytes > 30 << 20);
    assert!(store.free_memory(16 << 20) >= 16 << 20);
    assert!(store.set_capacity(u64::MAX).is_err());
}

/// Host memory behind the arena, bytes.
fn blocks(store: &Store) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::File::from(store.arena_fd().try_clone_to_owned().unwrap()).metadata().unwrap().blocks() * 512
}
