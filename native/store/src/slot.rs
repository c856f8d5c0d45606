//! Slots: a header that describes its page completely, and the payload.
//!
//! ```text
//! 0  state     bit 0 valid · 1 visited · 2-3 encoding · 4-15 payload length · 16-31 pool
//! 4  checksum  low half of the page's XXH3-64, XOR the low half of the key's hash
//! 8  prev      eviction list of the VM (ephemeral pages)
//! 12 next      the same; in a free slot, the slab's next free slot
//! 16 index
//! 20 object    16 bytes
//! 36 payload
//! ```
//!
//! A slot belongs to whoever allocated it until its state word is stored with the valid bit; from then on it may be
//! read, changed and freed only under the lock of its key's shard, and its list words only under the list's lock.
//! All header words are atomics, so that compaction and eviction may look before they lock.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use tmem_wire::{Encoding, Key, PAGE_BYTES};

use crate::arena::Arena;
use crate::layout::{HEADER_BYTES, MAX_SLOTS, SLOT_BITS};

/// Names a slot: slab and number within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SlotRef(pub u32);

impl SlotRef {
    /// No slot: slot 8191 of the last slab, which is never given out.
    pub(crate) const NONE: SlotRef = SlotRef(u32::MAX);

    pub(crate) fn new(slab: u32, slot: u32) -> SlotRef {
        debug_assert!(slot < MAX_SLOTS);
        SlotRef(slab << SLOT_BITS | slot)
    }

    pub(crate) fn slab(self) -> u32 {
        self.0 >> SLOT_BITS
    }

    pub(crate) fn slot(self) -> u32 {
        self.0 & (MAX_SLOTS - 1)
    }
}

/// A header's state word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct State(pub u32);

const VALID: u32 = 1;
const VISITED: u32 = 2;

impl State {
    /// A valid page. `length` is implied by the encoding unless it is LZ4.
    pub(crate) fn valid(encoding: Encoding, length: usize, pool: u16) -> State {
        let length = if encoding == Encoding::Lz4 { length as u32 } else { 0 };
        State(VALID | (encoding as u32) << 2 | length << 4 | u32::from(pool) << 16)
    }

    pub(crate) fn is_valid(self) -> bool {
        self.0 & VALID != 0
    }

    pub(crate) fn visited(self) -> bool {
        self.0 & VISITED != 0
    }

    pub(crate) fn encoding(self) -> Encoding {
        match self.0 >> 2 & 3 {
            1 => Encoding::Raw,
            2 => Encoding::SameFilled,
            3 => Encoding::Lz4,
            _ => Encoding::None,
        }
    }

    /// Bytes of payload.
    pub(crate) fn length(self) -> usize {
        match self.encoding() {
            Encoding::Raw => PAGE_BYTES,
            Encoding::SameFilled => 8,
            Encoding::Lz4 => (self.0 >> 4 & 0xfff) as usize,
            Encoding::None => 0,
        }
    }

    pub(crate) fn pool(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// One slot of a mapped arena.
#[derive(Clone, Copy)]
pub(crate) struct Slot<'a> {
    arena: &'a Arena,
    offset: usize,
    bytes: u32,
}

impl<'a> Slot<'a> {
    /// The slot `number` of a slab divided into slots of `bytes`.
    pub(crate) fn new(arena: &'a Arena, slab: u32, number: u32, bytes: u32) -> Slot<'a> {
        Slot { arena, offset: arena.slab_offset(slab) + number as usize * bytes as usize, bytes }
    }

    /// Bytes of host memory it takes.
    pub(crate) fn bytes(&self) -> u32 {
        self.bytes
    }

    pub(crate) fn state(&self) -> State {
        State(self.arena.word(self.offset).load(Acquire))
    }

    /// Make the page recoverable. Everything written before is in place when the word is.
    pub(crate) fn publish(&self, state: State) {
        self.arena.word(self.offset).store(state.0, Release);
    }

    /// Make it unrecoverable.
    pub(crate) fn retire(&self) {
        self.arena.word(self.offset).store(0, Release);
    }

    pub(crate) fn visit(&self) {
        let word = self.arena.word(self.offset);
        if word.load(Relaxed) & VISITED == 0 {
            word.fetch_or(VISITED, Relaxed);
        }
    }

    pub(crate) fn unvisit(&self) {
        self.arena.word(self.offset).fetch_and(!VISITED, Relaxed);
    }

    /// The stored checksum, bound to the key's hash.
    pub(crate) fn bound_checksum(&self) -> u32 {
        self.arena.word(self.offset + 4).load(Relaxed)
    }

    pub(crate) fn prev(&self) -> SlotRef {
        SlotRef(self.arena.word(self.offset + 8).load(Relaxed))
    }

    pub(crate) fn set_prev(&self, to: SlotRef) {
        self.arena.word(self.offset + 8).store(to.0, Relaxed);
    }

    pub(crate) fn next(&self) -> SlotRef {
        SlotRef(self.arena.word(self.offset + 12).load(Relaxed))
    }

    pub(crate) fn set_next(&self, to: SlotRef) {
        self.arena.word(self.offset + 12).store(to.0, Relaxed);
    }

    /// The key. May be torn if the slot is not held by its shard's lock or its list's.
    pub(crate) fn key(&self) -> Key {
        let word = |at: usize| self.arena.word(self.offset + at).load(Relaxed);
        let mut object = [0; 16];
        for (i, bytes) in object.chunks_exact_mut(4).enumerate() {
            bytes.copy_from_slice(&word(20 + 4 * i).to_ne_bytes());
        }
        Key { object, index: word(16) }
    }

    /// Fill in everything but the state of a slot this thread owns, and clear the rest of it: what its former owner
    /// left is gone.
    pub(crate) fn fill(&self, key: &Key, bound_checksum: u32, payload: &[u8]) {
        let word = |at: usize, value: u32| self.arena.word(self.offset + at).store(value, Relaxed);
        word(4, bound_checksum);
        word(8, SlotRef::NONE.0);
        word(12, SlotRef::NONE.0);
        word(16, key.index);
        for (i, bytes) in key.object.chunks_exact(4).enumerate() {
            word(20 + 4 * i, u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
        }
        let room = self.bytes as usize - HEADER_BYTES;
        assert!(payload.len() <= room);
        let to = self.payload_ptr();
        // SAFETY: in bounds of the slot as just checked; the slot is this thread's until it is published.
        unsafe {
            std::ptr::copy_nonoverlapping(payload.as_ptr(), to, payload.len());
            std::ptr::write_bytes(to.add(payload.len()), 0, room - payload.len());
        }
    }

    /// The payload.
    ///
    /// # Safety
    /// Nobody may write to the slot meanwhile: the caller holds the lock of the key's shard, or has removed the
    /// page from the index and not yet freed the slot.
    pub(crate) unsafe fn payload(&self, length: usize) -> &'a [u8] {
        let length = length.min(self.bytes as usize - HEADER_BYTES);
        // SAFETY: in bounds of the slot; not written to, by the contract.
        unsafe { std::slice::from_raw_parts(self.payload_ptr(), length) }
    }

    /// Clear a slot this thread owns: what its owner left is gone at once, not only when it is used again.
    pub(crate) fn scrub(&self) {
        let room = self.bytes as usize - HEADER_BYTES;
        for word in 1..HEADER_BYTES / 4 {
            self.arena.word(self.offset + 4 * word).store(0, Relaxed);
        }
        // SAFETY: in bounds of the slot, which is this thread's.
        unsafe { std::ptr::write_bytes(self.payload_ptr(), 0, room) };
    }

    fn payload_ptr(&self) -> *mut u8 {
        self.arena.at(self.offset + HEADER_BYTES)
    }
}
