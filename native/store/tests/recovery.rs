//! Arenas that are opened again.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use std::path::PathBuf;

use tmem_store::{OpenError, PoolRef, Store, StoreConfig, VmLimits};
use tmem_wire::{Encoding, GetStatus, Key, PoolCreate, PoolKind, PutStatus};

fn open(path: &PathBuf) -> (Store, tmem_store::Recovery) {
    Store::open(&StoreConfig::file(path, 16 << 20)).unwrap()
}

fn key(index: u32) -> Key {
    Key { object: [3; 16], index }
}

fn page(index: u32) -> [u8; 4096] {
    let mut page = [0; 4096];
    for (i, byte) in page.iter_mut().enumerate().take(index as usize % 4096) {
        *byte = ((i as u32).wrapping_mul(index) >> 3) as u8;
    }
    page[..4].copy_from_slice(&index.to_le_bytes());
    page
}

fn fetch(store: &Store, pool: &PoolRef, index: u32) -> GetStatus {
    let mut out = Vec::new();
    let (status, ..) = store.get(pool, &key(index), false, &mut out);
    if status == GetStatus::Hit {
        assert_eq!(out, page(index));
    }
    status
}

#[test]
fn everything_is_there_again_and_nothing_that_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("arena");
    let (store, recovery) = open(&path);
    assert!(recovery.formatted);
    let limits =
        VmLimits { quota_bytes: 8 << 20, min_bytes: 1 << 20, weight: 7, persistent_max_bytes: 1 << 40 };
    let vm = store.add_vm("guest", &limits).unwrap();
    store.attach_boot(vm, [5; 16]);
    store.set_frozen(vm, true).unwrap();
    store.set_frozen(vm, false).unwrap();
    let swap = store.create_pool(vm, &PoolCreate::private(PoolKind::Persistent, "swap")).unwrap();
    let cache = PoolKind::Ephemeral { exclusive: false };
    let cache = store.create_pool(vm, &PoolCreate::private(cache, "cache")).unwrap();
    let (swap_ref, cache_ref) = (store.pool(vm, swap).unwrap(), store.pool(vm, cache).unwrap());
    for index in 0..2000 {
        let status = store.put(&swap_ref, &key(index), Encoding::Raw, &page(index), None);
        assert_eq!(status, PutStatus::Stored, "page {index}: {:?}", store.vm_stats(vm));
        store.put(&cache_ref, &key(index), Encoding::Raw, &page(index), None);
    }
    for index in (0..2000).step_by(3) {
        store.flush_page(&swap_ref, &key(index));
    }
    let before = (store.usage(), store.vm_stats(vm).unwrap());
    drop((store, swap_ref, cache_ref));

    let (store, recovery) = open(&path);
    assert!(!recovery.formatted);
    assert_eq!((recovery.vms, recovery.pools, recovery.reclaimed_slots), (1, 2, 0));
    assert_eq!(store.find_vm("guest"), Some(vm));
    assert_eq!(store.limits(vm), Some(limits));
    assert_eq!(store.attach_boot(vm, [5; 16]), tmem_store::Attach::Same);
    assert_eq!(store.create_pool(vm, &PoolCreate::private(PoolKind::Persistent, "swap")), Ok(swap));
    let after = (store.usage(), store.vm_stats(vm).unwrap());
    assert_eq!(after.0.used_bytes, before.0.used_bytes);
    assert_eq!(after.0.payload_bytes, before.0.payload_bytes);
    assert_eq!(after.1.persistent_bytes, before.1.persistent_bytes);
    assert_eq!(after.1.ephemeral_pages, before.1.ephemeral_pages);
    let swap = store.pool(vm, swap).unwrap();
    for index in 0..2000 {
        let expected = if index % 3 == 0 { GetStatus::Miss } else { GetStatus::Hit };
        assert_eq!(fetch(&store, &swap, index), expected, "page {index}");
    }
    assert_eq!(store.remove_vm(vm), Ok(after.1.ephemeral_pages + after.1.persistent_pages));
    drop((store, swap));
    assert_eq!(open(&path).1.vms, 0);
}

#[test]
fn an_arena_in_use_is_not_opened_twice() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("arena");
    let first = open(&path);
    assert!(matches!(Store::open(&StoreConfig::file(&path, 1 << 20)), Err(OpenError::InUse { .. })));
    drop(first);
    open(&path);
}

/// Does something to an arena's bytes.
type Damage = fn(&mut Vec<u8>);

#[test]
fn unusable_arenas_are_kept_aside_and_said_to_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("arena");
    let damage: [(&str, Damage); 4] = [
        ("version 99", |bytes| bytes[8..12].copy_from_slice(&99_u32.to_le_bytes())),
        ("does not begin like an arena", |bytes| bytes[..8].copy_from_slice(b"ELFELFEL")),
        ("fails its checksum", |bytes| bytes[20] ^= 1),
        ("cut off", |bytes| bytes.truncate(10_000)),
    ];
    for (number, (reason, damage)) in damage.iter().enumerate() {
        drop(open(&path));
        let mut bytes = std::fs::read(&path).unwrap();
        damage(&mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        let error = Store::open(&StoreConfig::file(&path, 16 << 20)).err().unwrap();
        let aside = dir.path().join(format!("arena.damaged-{}", number + 1));
        assert!(error.to_string().contains(reason), "{error}");
        assert!(error.to_string().contains(aside.to_str().unwrap()), "{error}");
        assert_eq!(std::fs::read(&aside).unwrap(), bytes, "kept as it was");
        assert!(open(&path).1.formatted, "and opening again starts afresh");
    }
}

#[test]
fn a_damaged_page_is_lost_not_returned() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("arena");
    let (store, _) = open(&path);
    let vm = store.add_vm("guest", &VmLimits::default()).unwrap();
    let pool = store.create_pool(vm, &PoolCreate::private(PoolKind::Persistent, "swap")).unwrap();
    let swap = store.pool(vm, pool).unwrap();
    for index in 2000..2010 {
        store.put(&swap, &key(index), Encoding::Raw, &page(index), None);
    }
    drop((store, swap));
    let mut bytes = std::fs::read(&path).unwrap();
    // Every stored page begins with its number: damage what follows it, in one of them.
    let at = bytes.windows(8).rposition(|window| window[1..5] == 2005_u32.to_le_bytes()).unwrap();
    bytes[at + 9] ^= 0x55;
    std::fs::write(&path, &bytes).unwrap();
    let (store, _) = open(&path);
    let swap = store.pool(vm, pool).unwrap();
    for index in 2000..2010 {
        let expected = if index == 2005 { GetStatus::Lost } else { GetStatus::Hit };
        assert_eq!(fetch(&store, &swap, index), expected, "page {index}");
    }
    assert_eq!(fetch(&store, &swap, 2005), GetStatus::Miss, "lost once, then absent");
    assert_eq!(store.usage().pages_lost, 1);
}
