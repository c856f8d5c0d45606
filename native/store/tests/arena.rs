//! What stands in the arena's memory: little but payload, and nothing of those who left.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use tmem_store::{PoolRef, Store, StoreConfig, VmId, VmLimits};
use tmem_wire::{Encoding, Key, PoolCreate, PoolKind, PutStatus};

const MARK: &[u8; 16] = b"left by a guest!";

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }
}

/// A page of which `noise` bytes do not compress, with something at its end.
fn page(seed: u64, noise: usize, end: &[u8; 16]) -> [u8; 4096] {
    let mut page = [0; 4096];
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for byte in &mut page[..noise] {
        *byte = random.next() as u8;
    }
    page[4080..].copy_from_slice(end);
    page
}

fn pool(store: &Store, vm: VmId, kind: PoolKind, name: &str) -> PoolRef {
    let id = store.create_pool(vm, &PoolCreate::private(kind, name)).unwrap();
    store.pool(vm, id).unwrap()
}

fn put(store: &Store, pool: &PoolRef, index: u32, page: &[u8; 4096]) {
    let key = Key { object: [2; 16], index };
    assert_eq!(store.put(pool, &key, Encoding::Raw, page, None), PutStatus::Stored);
}

/// How often the mark, or what is left of it, stands in the arena's file.
fn marks(path: &std::path::Path) -> usize {
    std::fs::read(path).unwrap().windows(12).filter(|window| *window == &MARK[4..]).count()
}

#[test]
fn what_a_pool_or_a_vm_held_is_overwritten_when_it_goes() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("arena");
    let (store, _) = Store::open(&StoreConfig::file(&path, 16 << 20)).unwrap();
    let vms = ["stays", "goes"].map(|name| store.add_vm(name, &VmLimits::default()).unwrap());
    let stays = pool(&store, vms[0], PoolKind::Persistent, "swap");
    let goes = pool(&store, vms[0], PoolKind::Ephemeral { exclusive: false }, "cache");
    let of_other = pool(&store, vms[1], PoolKind::Persistent, "swap");
    for index in 0..300 {
        for pool in [&stays, &goes, &of_other] {
            put(&store, pool, index, &page(index.into(), index as usize * 13, MARK));
        }
    }
    assert_eq!(marks(&path), 900);
    store.destroy_pool(vms[0], goes.id()).unwrap();
    assert_eq!(marks(&path), 600);
    store.remove_vm(vms[1]).unwrap();
    assert_eq!(marks(&path), 300);
    store.attach_boot(vms[0], [1; 16]);
    assert_eq!(marks(&path), 0);
}

#[test]
fn a_shorter_page_leaves_nothing_of_its_slots_former_owner() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("arena");
    let (store, _) = Store::open(&StoreConfig::file(&path, 16 << 20)).unwrap();
    let pools = ["first", "second"].map(|name| {
        let vm = store.add_vm(name, &VmLimits::default()).unwrap();
        pool(&store, vm, PoolKind::Persistent, "swap")
    });
    // Slots are 64 bytes apart in size: most pages that are 16 bytes shorter take the slot that was freed last.
    for index in 0..400 {
        let noise = 1200 + index as usize * 4;
        put(&store, &pools[0], index, &page(index.into(), noise, MARK));
        store.flush_page(&pools[0], &Key { object: [2; 16], index });
        put(&store, &pools[1], index, &page(index.into(), noise - 16, b"of another guest"));
    }
    // A flush does not overwrite, a put does: what is left are slots that nobody has taken.
    let left = marks(&path);
    assert!(left < 150, "{left} of 400 slots still hold what their former owner left");
    let slots = std::fs::read(&path).unwrap();
    let torn = slots
        .windows(28)
        .filter(|window| window[16..] == MARK[..12] && window[..16] == *b"of another guest")
        .count();
    assert_eq!(torn, 0, "the rest of a slot behind its payload is overwritten");
}

#[test]
fn churn_leaves_the_arena_full_of_payload() {
    const CAPACITY: u64 = 64 << 20;
    let (store, _) = Store::open(&StoreConfig::memfd(CAPACITY)).unwrap();
    let vm = store.add_vm("guest", &VmLimits::default()).unwrap();
    let cache = pool(&store, vm, PoolKind::Ephemeral { exclusive: false }, "cache");
    let mut random = Random(88_172_645_463_325_252);
    let mut written = 0;
    // What the pages hold changes over time, as it does in a guest: classes fall out of use, others come into it.
    while written < 10 * CAPACITY {
        let (from, width) = [(0, 4096), (200, 800), (2500, 1500)][(written / CAPACITY) as usize % 3];
        let noise = (from + random.next() as usize % width).min(4080);
        put(&store, &cache, random.next() as u32 % 100_000, &page(random.next(), noise, MARK));
        written += noise as u64;
    }
    let usage = store.usage();
    assert_eq!(usage.backed_bytes, usage.capacity_bytes);
    let share = usage.payload_bytes as f64 / usage.capacity_bytes as f64;
    assert!(share > 0.92, "only {share:.3} of the arena is payload");
    assert!(usage.pages_evicted > 0 && usage.pages_moved > 0);
}

#[test]
fn same_filled_pages_take_no_payload() {
    let (store, _) = Store::open(&StoreConfig::memfd(4 << 20)).unwrap();
    let vm = store.add_vm("guest", &VmLimits::default()).unwrap();
    let swap = pool(&store, vm, PoolKind::Persistent, "swap");
    for index in 0..10_000 {
        put(&store, &swap, index, &[index as u8; 4096]);
    }
    let usage = store.usage();
    assert_eq!((usage.pages, usage.same_filled_pages), (10_000, 10_000));
    assert!(usage.used_bytes < 10_000 * 55, "{} bytes for 10 000 pages", usage.used_bytes);
}
