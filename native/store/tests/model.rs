//! Random operations on the store and on a plain model of the contract, compared answer by answer, with several VMs,
//! changing limits, and the arena closed and opened again in between.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use proptest::prelude::*;
use tmem_store::{codec, PoolRef, Store, StoreConfig, VmId, VmLimits};
use tmem_wire::{Encoding, FlushStatus, GetStatus, Key, PoolCreate, PoolKind, PutStatus};

const KINDS: [PoolKind; 3] =
    [PoolKind::Persistent, PoolKind::Ephemeral { exclusive: false }, PoolKind::Ephemeral { exclusive: true }];

/// Which pool: VM and kind.
type Place = (usize, usize);

#[derive(Debug, Clone)]
enum Operation {
    Put { place: Place, key: (u8, u32), content: u16, as_lz4: bool },
    Get { place: Place, key: (u8, u32), lz4: bool },
    FlushPage { place: Place, key: (u8, u32) },
    FlushObject { place: Place, object: u8 },
    FlushPool { place: Place },
    FlushEphemeral { vm: usize },
    Freeze { vm: usize, frozen: bool },
    Quota { vm: usize, kib: u64 },
    Reboot { vm: usize },
    Capacity { slabs: u64 },
    Reopen,
}

fn operation() -> impl Strategy<Value = Operation> {
    let place = || (0..2_usize, 0..3_usize);
    let key = || (0..3_u8, prop_oneof![0..6_u32, 60..70_u32, Just(u32::MAX)]);
    prop_oneof![
        40 => (place(), key(), any::<u16>(), any::<bool>())
            .prop_map(|(place, key, content, as_lz4)| Operation::Put { place, key, content, as_lz4 }),
        30 => (place(), key(), any::<bool>()).prop_map(|(place, key, lz4)| Operation::Get { place, key, lz4 }),
        8 => (place(), key()).prop_map(|(place, key)| Operation::FlushPage { place, key }),
        3 => (place(), 0..3_u8).prop_map(|(place, object)| Operation::FlushObject { place, object }),
        1 => place().prop_map(|place| Operation::FlushPool { place }),
        1 => (0..2_usize).prop_map(|vm| Operation::FlushEphemeral { vm }),
        2 => (0..2_usize, any::<bool>()).prop_map(|(vm, frozen)| Operation::Freeze { vm, frozen }),
        3 => (0..2_usize, 0..80_u64).prop_map(|(vm, kib)| Operation::Quota { vm, kib }),
        1 => (0..2_usize).prop_map(|vm| Operation::Reboot { vm }),
        1 => (0..40_u64).prop_map(|slabs| Operation::Capacity { slabs }),
        3 => Just(Operation::Reopen),
    ]
}

fn page(content: u16) -> [u8; 4096] {
    let mut page = [0; 4096];
    if content % 5 == 0 {
        codec::fill(content.into(), &mut page);
        return page;
    }
    let mut state = u32::from(content) * 2 + 1;
    for byte in page.iter_mut().take(usize::from(content) % 4096) {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    page[..2].copy_from_slice(&content.to_le_bytes());
    page
}

fn wire_key((object, index): (u8, u32)) -> Key {
    Key { object: [object; 16], index }
}

/// The contract, without memory limits: what may be there.
#[derive(Default)]
struct Model {
    pages: HashMap<(Place, (u8, u32)), u16>,
    frozen: [bool; 2],
}

struct Subject {
    store: Store,
    vms: [VmId; 2],
    pools: Vec<PoolRef>,
}

fn limits(kib: u64) -> VmLimits {
    VmLimits { quota_bytes: kib << 10, ..VmLimits::default() }
}

impl Subject {
    fn open(path: &Path) -> Subject {
        let (store, _) = Store::open(&StoreConfig::file(path, 4 << 20)).unwrap();
        let vm = |name: &str| store.find_vm(name).unwrap_or_else(|| store.add_vm(name, &limits(60)).unwrap());
        let vms = [vm("one"), vm("two")];
        let mut subject = Subject { store, vms, pools: vec![] };
        subject.find_pools();
        subject
    }

    fn find_pools(&mut self) {
        self.pools.clear();
        for vm in self.vms {
            for kind in KINDS {
                let id =
                    self.store.create_pool(vm, &PoolCreate::private(kind, &format!("{kind:?}"))).unwrap();
                self.pools.push(self.store.pool(vm, id).unwrap());
            }
        }
    }

    fn pool(&self, (vm, kind): Place) -> &PoolRef {
        &self.pools[vm * 3 + kind]
    }
}

fn apply(model: &mut Model, subject: &mut Subject, path: &Path, operation: &Operation) {
    let store = &subject.store;
    match *operation {
        Operation::Put { place, key, content, as_lz4 } => {
            let content_page = page(content);
            let sum = codec::checksum(&content_page);
            let mut block = [0; 4095];
            let block =
                as_lz4.then(|| codec::compress(&content_page, &mut block)).flatten().map(|n| &block[..n]);
            let (encoding, payload) =
                block.map_or((Encoding::Raw, &content_page[..]), |b| (Encoding::Lz4, b));
            let status = store.put(subject.pool(place), &wire_key(key), encoding, payload, Some(sum));
            assert_eq!(status == PutStatus::Frozen, model.frozen[place.0]);
            if status == PutStatus::Stored {
                model.pages.insert((place, key), content);
            } else {
                model.pages.remove(&(place, key));
            }
        }
        Operation::Get { place, key, lz4 } => {
            let mut out = vec![9];
            let (status, encoding, sum) = store.get(subject.pool(place), &wire_key(key), lz4, &mut out);
            let expected = model.pages.get(&(place, key)).copied();
            let mut got = [0; 4096];
            match encoding {
                Encoding::None => assert_eq!(out.len(), 1),
                Encoding::Raw => got.copy_from_slice(&out[1..]),
                Encoding::SameFilled => {
                    codec::fill(u64::from_le_bytes(out[1..].try_into().unwrap()), &mut got);
                }
                Encoding::Lz4 => assert!(lz4 && codec::decompress(&out[1..], &mut got)),
            }
            if status == GetStatus::Hit {
                let expected = expected.unwrap();
                assert!(got == page(expected) && sum == codec::checksum(&got));
                if place.1 == 2 {
                    model.pages.remove(&(place, key));
                }
            } else {
                assert_eq!(status, GetStatus::Miss);
                // get-get: what missed stays away. Only ephemeral pages may miss without a reason.
                assert!(expected.is_none() || place.1 != 0, "a persistent page is gone");
                model.pages.remove(&(place, key));
            }
        }
        Operation::FlushPage { place, key } => {
            let status = store.flush_page(subject.pool(place), &wire_key(key));
            let had = model.pages.remove(&(place, key)).is_some();
            assert!(status == FlushStatus::Absent || had, "flushed what was not there");
            assert!(status == FlushStatus::Flushed || !had || place.1 != 0);
        }
        Operation::FlushObject { place, object } => {
            let pages = store.flush_object(subject.pool(place), &[object; 16]);
            forget(model, pages, place, |key| key.0 == object);
        }
        Operation::FlushPool { place } => {
            let pages = store.flush_pool(subject.pool(place));
            forget(model, pages, place, |_| true);
        }
        Operation::FlushEphemeral { vm } => {
            store.flush_ephemeral(subject.vms[vm]);
            model.pages.retain(|(place, _), _| place.0 != vm || place.1 == 0);
        }
        Operation::Freeze { vm, frozen } => {
            store.set_frozen(subject.vms[vm], frozen).unwrap();
            model.frozen[vm] = frozen;
        }
        Operation::Quota { vm, kib } => store.set_limits(subject.vms[vm], &limits(kib)).unwrap(),
        Operation::Reboot { vm } => {
            store.attach_boot(subject.vms[vm], new_boot());
            model.pages.retain(|(place, _), _| place.0 != vm);
            subject.find_pools();
        }
        Operation::Capacity { slabs } => drop(store.set_capacity(slabs << 16).unwrap()),
        Operation::Reopen => {
            subject.pools.clear();
            let old = std::mem::replace(subject, Subject::open(&path.with_extension("other")));
            drop(old);
            *subject = Subject::open(path);
        }
    }
    consistent(subject);
}

/// An id that was not used before.
fn new_boot() -> [u8; 16] {
    static BOOTS: AtomicU64 = AtomicU64::new(1);
    u128::from(BOOTS.fetch_add(1, Relaxed)).to_le_bytes()
}

fn forget(model: &mut Model, pages: u64, place: Place, which: impl Fn(&(u8, u32)) -> bool) {
    let before = model.pages.len();
    model.pages.retain(|(at, key), _| *at != place || !which(key));
    let had = (before - model.pages.len()) as u64;
    assert!(pages <= had, "flushed {pages} pages where at most {had} can be");
    assert!(pages == had || place.1 != 0, "a persistent page was gone before it was flushed");
}

fn consistent(subject: &Subject) {
    let usage = subject.store.usage();
    let (mut pages, mut used) = (0, 0);
    for vm in subject.vms {
        let stats = subject.store.vm_stats(vm).unwrap();
        pages += stats.ephemeral_pages + stats.persistent_pages;
        used += stats.used_bytes;
        assert!(stats.used_bytes <= stats.limits.quota_bytes || stats.ephemeral_pages == 0, "{stats:?}");
    }
    assert_eq!((usage.pages, usage.used_bytes), (pages, used));
    assert!(usage.backed_bytes <= usage.capacity_bytes);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_store_does_what_the_model_does(operations in proptest::collection::vec(operation(), 1..300)) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("arena");
        let (mut model, mut subject) = (Model::default(), Subject::open(&path));
        for operation in &operations {
            apply(&mut model, &mut subject, &path, operation);
        }
    }
}
