//! The index of a pool: which slot holds which page.
//!
//! A pool's pages are spread over shards by object and block, a block being 64 pages in a row. Each shard is an
//! ordered map from (object, block) to a bitmap and the slots of the bits that are set. So neighbouring pages share
//! an entry (about 5.5 bytes a page when a block is full, no key copies), an object's pages are found without
//! looking at anybody else's, and everything about one block is under one lock.

use std::collections::BTreeMap;

use crate::sync::{Mutex, MutexGuard};
use tmem_wire::{Key, ObjectId};

use crate::slot::SlotRef;

/// Pages in a block.
const BLOCK_PAGES: u32 = 64;
/// Shards of a pool.
const SHARDS: usize = 64;
/// What a block costs beside its pages' references, bytes: key, bitmap, vector, share of the map's nodes.
pub(crate) const BLOCK_BYTES: u64 = 80;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct BlockId {
    object: ObjectId,
    block: u32,
}

impl BlockId {
    fn of(key: &Key) -> BlockId {
        BlockId { object: key.object, block: key.index / BLOCK_PAGES }
    }
}

#[derive(Debug, Default)]
struct Block {
    present: u64,
    /// One a set bit, in order.
    slots: Vec<SlotRef>,
}

impl Block {
    fn rank(&self, bit: u32) -> usize {
        (self.present & ((1 << bit) - 1)).count_ones() as usize
    }

    fn get(&self, bit: u32) -> Option<SlotRef> {
        (self.present >> bit & 1 == 1).then(|| self.slots[self.rank(bit)])
    }

    fn insert(&mut self, bit: u32, slot: SlotRef) -> Option<SlotRef> {
        let rank = self.rank(bit);
        if self.present >> bit & 1 == 1 {
            return Some(std::mem::replace(&mut self.slots[rank], slot));
        }
        if self.slots.len() == self.slots.capacity() {
            // Half as much again, so that a filling block wastes less than doubling would.
            let more = (self.slots.len() / 2).clamp(2, 16).min(BLOCK_PAGES as usize - self.slots.len());
            self.slots.reserve_exact(more.max(1));
        }
        self.slots.insert(rank, slot);
        self.present |= 1 << bit;
        None
    }

    fn remove(&mut self, bit: u32) -> Option<SlotRef> {
        let slot = self.get(bit)?;
        self.slots.remove(self.rank(bit));
        self.present &= !(1 << bit);
        if self.slots.len() * 4 <= self.slots.capacity() {
            self.slots.shrink_to(self.slots.len() + 2);
        }
        Some(slot)
    }
}

/// Part of a pool's index.
#[derive(Debug, Default)]
pub(crate) struct Shard {
    blocks: BTreeMap<BlockId, Block>,
}

/// What an insertion did.
pub(crate) struct Inserted {
    /// The slot that held the page before.
    pub old: Option<SlotRef>,
    /// Whether the block is new.
    pub new_block: bool,
}

/// What a removal did.
pub(crate) struct Removed {
    pub slot: SlotRef,
    /// Whether the block is gone.
    pub block_gone: bool,
}

impl Shard {
    pub(crate) fn get(&self, key: &Key) -> Option<SlotRef> {
        self.blocks.get(&BlockId::of(key))?.get(key.index % BLOCK_PAGES)
    }

    pub(crate) fn insert(&mut self, key: &Key, slot: SlotRef) -> Inserted {
        let mut new_block = false;
        let block = self.blocks.entry(BlockId::of(key)).or_insert_with(|| {
            new_block = true;
            Block::default()
        });
        Inserted { old: block.insert(key.index % BLOCK_PAGES, slot), new_block }
    }

    pub(crate) fn remove(&mut self, key: &Key) -> Option<Removed> {
        let id = BlockId::of(key);
        let block = self.blocks.get_mut(&id)?;
        let slot = block.remove(key.index % BLOCK_PAGES)?;
        let block_gone = block.present == 0;
        if block_gone {
            self.blocks.remove(&id);
        }
        Some(Removed { slot, block_gone })
    }

    /// Keys of a page or more of `object`, or of any object, from `from` on: at most one block's. `from` moves on.
    pub(crate) fn next_keys(
        &self,
        object: Option<&ObjectId>,
        from: &mut Cursor,
        keys: &mut Vec<Key>,
    ) -> bool {
        use std::ops::Bound::{Excluded, Unbounded};
        let start = match (from.0, object) {
            (Some(id), _) => Excluded(id),
            (None, Some(object)) => std::ops::Bound::Included(BlockId { object: *object, block: 0 }),
            (None, None) => Unbounded,
        };
        let Some((id, block)) = self.blocks.range((start, Unbounded)).next() else { return false };
        if object.is_some_and(|object| *object != id.object) {
            return false;
        }
        from.0 = Some(*id);
        let mut bits = block.present;
        while bits != 0 {
            keys.push(Key { object: id.object, index: id.block * BLOCK_PAGES + bits.trailing_zeros() });
            bits &= bits - 1;
        }
        true
    }
}

/// Where a walk through a shard stands.
#[derive(Debug, Default)]
pub(crate) struct Cursor(Option<BlockId>);

/// The shards of one pool (of all its members, if it is shared).
pub(crate) struct Index {
    shards: Box<[Mutex<Shard>]>,
    seed: u64,
}

impl Index {
    pub(crate) fn new(seed: u64) -> Index {
        Index { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), seed }
    }

    /// Hash of a key, secret to this arena: guests cannot aim at a shard.
    pub(crate) fn hash(&self, key: &Key) -> u64 {
        hash(self.seed, &key.object, key.index / BLOCK_PAGES)
    }

    pub(crate) fn lock(&self, key: &Key) -> MutexGuard<'_, Shard> {
        self.shards[self.hash(key) as usize % SHARDS].lock()
    }

    pub(crate) fn shards(&self) -> &[Mutex<Shard>] {
        &self.shards
    }
}

/// Multiply-and-fold over object and number; fast rather than strong, and seeded.
pub(crate) fn hash(seed: u64, object: &ObjectId, number: u32) -> u64 {
    let fold = |a: u64, b: u64| {
        let wide = u128::from(a) * u128::from(b);
        wide as u64 ^ (wide >> 64) as u64
    };
    let [mut low, mut high] = [[0; 8]; 2];
    low.copy_from_slice(&object[..8]);
    high.copy_from_slice(&object[8..]);
    let first = fold(u64::from_le_bytes(low) ^ seed, 0x9e37_79b9_7f4a_7c15 ^ u64::from(number));
    fold(first ^ u64::from_le_bytes(high), 0xd6e8_feb8_6659_fd93 ^ seed.rotate_left(32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(object: u8, index: u32) -> Key {
        Key { object: [object; 16], index }
    }

    #[test]
    fn a_shard_finds_what_was_put_and_forgets_what_was_removed() {
        let mut shard = Shard::default();
        for index in [0, 63, 64, 5, u32::MAX] {
            assert!(shard.insert(&key(1, index), SlotRef(index ^ 7)).old.is_none());
        }
        assert_eq!(shard.get(&key(1, 63)), Some(SlotRef(63 ^ 7)));
        assert_eq!(shard.get(&key(1, 62)), None);
        assert_eq!(shard.get(&key(2, 63)), None);
        assert_eq!(shard.insert(&key(1, 5), SlotRef(9)).old, Some(SlotRef(5 ^ 7)));
        assert_eq!(shard.remove(&key(1, 5)).map(|removed| removed.slot), Some(SlotRef(9)));
        assert!(shard.remove(&key(1, 5)).is_none());
        assert!(shard.remove(&key(1, 64)).is_some_and(|removed| removed.block_gone));
        assert_eq!(shard.get(&key(1, u32::MAX)), Some(SlotRef(u32::MAX ^ 7)));
    }

    #[test]
    fn a_walk_sees_one_objects_keys_only() {
        let mut shard = Shard::default();
        for (object, index) in [(1, 3), (1, 70), (2, 0), (3, 9)] {
            shard.insert(&key(object, index), SlotRef(0));
        }
        let (mut from, mut keys) = (Cursor::default(), Vec::new());
        while shard.next_keys(Some(&[1; 16]), &mut from, &mut keys) {}
        assert_eq!(keys, [key(1, 3), key(1, 70)]);
        let (mut from, mut keys) = (Cursor::default(), Vec::new());
        while shard.next_keys(None, &mut from, &mut keys) {}
        assert_eq!(keys.len(), 4);
    }
}
