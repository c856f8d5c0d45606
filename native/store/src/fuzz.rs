//! What the fuzz targets in `fuzz/` do, here so that it is also run, on random bytes, by every test run.

use std::os::unix::fs::FileExt;

use tmem_wire::{Encoding, GetStatus, Key, PoolCreate, PoolKind};

use crate::codec::{self, Page};
use crate::layout::{GRANTS, HEAD_BYTES, POOLS, SLAB_BYTES_MIN, SLAB_TABLE, VMS};
use crate::{ArenaBacking, PoolRef, Store, StoreConfig, VmLimits};

const KINDS: [PoolKind; 3] =
    [PoolKind::Persistent, PoolKind::Ephemeral { exclusive: false }, PoolKind::Ephemeral { exclusive: true }];

fn page(number: u8) -> Page {
    let mut page = [0; 4096];
    let mut state = u32::from(number) * 2 + 1;
    for byte in page.iter_mut().take(usize::from(number) * 16) {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    page[0] = number;
    page
}

fn key(number: u8) -> Key {
    Key { object: [number % 5; 16], index: u32::from(number) }
}

fn pools(store: &Store) -> Option<Vec<PoolRef>> {
    let vm = store.find_vm("fuzzed").or_else(|| store.add_vm("fuzzed", &VmLimits::default()).ok())?;
    KINDS
        .iter()
        .map(|kind| {
            let id = store.create_pool(vm, &PoolCreate::private(*kind, &format!("{kind:?}"))).ok()?;
            store.pool(vm, id)
        })
        .collect()
}

/// Overwrite places of an arena with what `data` says, in groups of a place (4 bytes) and a value (4 bytes), then open
/// it.
///
/// # Panics
/// If the store returns a page that was not put under its key: that is what is looked for.
pub fn damaged_arena(data: &[u8]) {
    let config = StoreConfig { slab_bytes: Some(SLAB_BYTES_MIN), ..StoreConfig::memfd(1 << 20) };
    let Ok((store, _)) = Store::open(&config) else { return };
    let Some(refs) = pools(&store) else { return };
    for number in 0..60 {
        for pool in &refs {
            store.put(pool, &key(number), Encoding::Raw, &page(number), None);
        }
    }
    let Ok(fd) = store.arena_fd().try_clone_to_owned() else { return };
    drop((refs, store));
    let file = std::fs::File::from(fd);
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    for group in data.chunks_exact(8) {
        let place = u64::from(u32::from_le_bytes([group[0], group[1], group[2], 0]));
        // Most of an arena is holes: aim at what means something.
        let (start, bytes) = match group[3] % 8 {
            0 => (0, 64),
            1 => (SLAB_TABLE as u64, 64),
            2 => (VMS as u64, 1024),
            3 => (POOLS as u64, 512),
            4 => (GRANTS as u64, 64),
            _ => (HEAD_BYTES as u64, length.saturating_sub(HEAD_BYTES as u64).max(4)),
        };
        let _ = file.write_all_at(&group[4..8], start + place % bytes);
    }
    let config = StoreConfig { arena: ArenaBacking::Adopt(file.into()), ..config };
    let Ok((store, recovery)) = Store::open(&config) else { return };
    let usage = store.usage();
    assert_eq!(usage.pages, recovery.persistent_pages + recovery.ephemeral_pages);
    let Some(refs) = pools(&store) else { return };
    let mut out = Vec::new();
    for number in 0..60 {
        for pool in &refs {
            out.clear();
            let (status, encoding, _) = store.get(pool, &key(number), false, &mut out);
            if status == GetStatus::Hit {
                assert!(decoded(encoding, &out) == Some(page(number)), "page {number} is wrong");
            }
            store.put(pool, &key(number), Encoding::Raw, &page(number), None);
        }
    }
    let _ = store.set_capacity(2 * u64::from(SLAB_BYTES_MIN));
    for (vm, _) in store.vms() {
        let _ = store.remove_vm(vm);
    }
    assert_eq!(store.usage().pages, 0);
}

fn decoded(encoding: Encoding, payload: &[u8]) -> Option<Page> {
    let mut page = [0; 4096];
    match encoding {
        Encoding::Raw => payload.try_into().ok(),
        Encoding::SameFilled => {
            codec::fill(u64::from_le_bytes(payload.try_into().ok()?), &mut page);
            Some(page)
        }
        Encoding::Lz4 => codec::decompress(payload, &mut page).then_some(page),
        Encoding::None => None,
    }
}

/// Run the operations that `data` spells: an operation, a number that names a key or an amount, and for blocks a length
/// and that many bytes.
///
/// # Panics
/// If an answer breaks the contract.
pub fn operations(data: &[u8]) {
    let config = StoreConfig { slab_bytes: Some(SLAB_BYTES_MIN), ..StoreConfig::memfd(512 << 10) };
    let Ok((store, _)) = Store::open(&config) else { return };
    let Some(mut refs) = pools(&store) else { return };
    let Some(vm) = store.find_vm("fuzzed") else { return };
    let (mut rest, mut out, mut quota_bytes) = (data, Vec::new(), u64::MAX);
    while let [operation, number, tail @ ..] = rest {
        rest = tail;
        let (pool, key) = (&refs[usize::from(*operation) % 3], key(*number));
        out.clear();
        match operation / 3 % 14 {
            0 => drop(store.put(pool, &key, Encoding::Raw, &page(*number), None)),
            1 | 2 => {
                let [length, tail @ ..] = rest else { return };
                let payload = &tail[..tail.len().min(usize::from(*length) * 17)];
                rest = &tail[payload.len()..];
                let encoding = if operation & 128 == 0 { Encoding::Lz4 } else { Encoding::SameFilled };
                let status = store.put(pool, &key, encoding, payload, None);
                let (got, encoding, _) = store.get(pool, &key, true, &mut out);
                let stored = status == tmem_wire::PutStatus::Stored;
                assert_eq!(got == GetStatus::Hit, stored, "what was not stored is not there");
                assert!(!stored || decoded(encoding, &out).is_some(), "what was stored decodes");
            }
            3 => drop(store.flush_page(pool, &key)),
            4 => drop(store.flush_object(pool, &key.object)),
            5 => drop(store.set_capacity(u64::from(*number) << 14)),
            6 => drop(store.free_memory(u64::from(*number) << 12)),
            7 => {
                let limits = VmLimits { quota_bytes: u64::from(*number) << 11, ..VmLimits::default() };
                if store.set_limits(vm, &limits).is_ok() {
                    // Persistent pages stay when a quota falls below them; nothing is added until they fit.
                    quota_bytes = limits.quota_bytes.max(store.usage().used_bytes);
                }
            }
            8 => drop(store.set_frozen(vm, number % 2 == 1)),
            9 => store.set_compression(number % 2 == 1),
            10 => drop(store.flush_ephemeral(vm)),
            11 => {
                store.attach_boot(vm, [*number; 16]);
                let Some(again) = pools(&store) else { return };
                refs = again;
            }
            _ => {
                let (_, encoding, _) = store.get(pool, &key, false, &mut out);
                assert!(encoding == Encoding::None || decoded(encoding, &out).is_some());
            }
        }
        let usage = store.usage();
        assert!(usage.backed_bytes <= usage.capacity_bytes);
        assert!(usage.used_bytes <= quota_bytes, "the quota holds");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that cannot go on has failed

    use proptest::prelude::*;

    /// Inputs that libFuzzer found to reach what others do not, and those that once failed.
    fn seeds(target: &str) -> Vec<Vec<u8>> {
        let directory = format!("{}/fuzz/seeds/{target}", env!("CARGO_MANIFEST_DIR"));
        let files = std::fs::read_dir(directory).unwrap();
        files.map(|file| std::fs::read(file.unwrap().path()).unwrap()).collect()
    }

    #[test]
    fn damage_found_by_fuzzing_is_noticed() {
        let seeds = seeds("arena");
        assert!(!seeds.is_empty());
        for seed in seeds {
            super::damaged_arena(&seed);
        }
    }

    #[test]
    fn operations_found_by_fuzzing_do_not_break_the_store() {
        let seeds = seeds("operations");
        assert!(!seeds.is_empty());
        for seed in seeds {
            super::operations(&seed);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn damage_is_noticed(data in proptest::collection::vec(any::<u8>(), 8..400)) {
            super::damaged_arena(&data);
        }

        #[test]
        fn nothing_a_guest_does_breaks_the_store(data in proptest::collection::vec(any::<u8>(), 1..4000)) {
            super::operations(&data);
        }
    }
}
