//! What the store gives back leaves the process: the figure an administrator sees falls. One test only, because the
//! figure is the whole process's.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use tmem_store::{PoolRef, Store, StoreConfig, VmLimits};
use tmem_wire::{Encoding, GetStatus, Key, PoolCreate, PoolKind, PutStatus};

const MIB: u64 = 1 << 20;
/// What of the arena's head may be touched meanwhile.
const HEAD: u64 = 64 << 10;

/// `RssShmem`: what `top` and `ps` count as shared, bytes.
fn shared_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// A page that does not compress.
fn page(seed: u32) -> [u8; 4096] {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
}

fn fill(store: &Store, pool: &PoolRef, count: u32) {
    for index in 0..count {
        let key = Key { object: [1; 16], index };
        assert_eq!(store.put(pool, &key, Encoding::Raw, &page(index), None), PutStatus::Stored);
    }
}

#[test]
fn memory_that_is_given_back_leaves_the_process() {
    let (store, _) = Store::open(&StoreConfig::memfd(64 * MIB)).unwrap();
    let vm = store.add_vm("guest", &VmLimits::default()).unwrap();
    let pool = |kind, name| {
        let id = store.create_pool(vm, &PoolCreate::private(kind, name)).unwrap();
        store.pool(vm, id).unwrap()
    };
    let cache = pool(PoolKind::Ephemeral { exclusive: false }, "cache");
    let swap = pool(PoolKind::Persistent, "swap");
    let empty = shared_bytes();
    fill(&store, &swap, 1000);
    fill(&store, &cache, 12_000);
    let full = shared_bytes() - empty;
    assert!(full > 50 * MIB, "13 000 pages are in {full} bytes");

    assert!(store.free_memory(16 * MIB) >= 16 * MIB);
    let after = shared_bytes() - empty;
    // A little less: not every byte of a slab has been touched.
    assert!(after + 16 * MIB * 99 / 100 <= full, "16 MiB freed of {full} bytes, and {after} are left");

    assert_eq!(store.set_capacity(8 * MIB), Ok(8 * MIB));
    let after = shared_bytes() - empty;
    assert!(after <= 8 * MIB + HEAD, "{after} bytes at a capacity of 8 MiB");
    let mut out = Vec::new();
    for index in 0..1000 {
        out.clear();
        let key = Key { object: [1; 16], index };
        assert_eq!(store.get(&swap, &key, false, &mut out).0, GetStatus::Hit);
        assert_eq!(out, page(index));
    }

    store.set_capacity(64 * MIB).unwrap();
    assert!(shared_bytes() - empty <= 8 * MIB + HEAD, "growing takes nothing by itself");
    fill(&store, &cache, 12_000);
    assert!(shared_bytes() - empty > 50 * MIB);
    store.remove_vm(vm).unwrap();
    store.set_capacity(0).unwrap();
    let after = shared_bytes().saturating_sub(empty);
    assert!(after < MIB / 4, "{after} bytes when nothing is stored");
}
