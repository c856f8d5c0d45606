//! A guess which pages tmem has, so that a page it cannot have costs no round trip.
//!
//! One bit for each hash value of a key: set when the host acknowledges a put, cleared when a get misses. A wrong
//! "yes" costs a get, a wrong "no" a hit; neither is an error.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use tmem_wire::{Key, PAGE_BYTES};
use zerocopy::FromZeros;

/// Bits in the map for each page of the guest's memory: an eighth of them is set when the host holds twice as much.
const BITS_A_PAGE: u64 = 16;
/// Fewest and most bits; more would be resident memory for nothing.
const BITS: (u64, u64) = (1 << 18, 1 << 23);
/// How many misses it takes to believe that nothing is left from before this program started.
const DOUBT: i32 = 4096;
/// How many misses a hit makes up for.
const HIT_WEIGHT: i32 = 8;

/// The map. Its memory becomes resident as it is used.
pub(crate) struct Presence {
    /// A power of two of them.
    words: Box<[AtomicU64]>,
    /// Above zero, pages put by an earlier run of this program are expected and every page is asked for.
    doubt: AtomicI32,
}

impl Presence {
    /// Nothing is known. For a guest of so much memory.
    pub(crate) fn new(memory_kib: u64) -> Presence {
        let pages = memory_kib / (PAGE_BYTES as u64 >> 10);
        let bits = (pages * BITS_A_PAGE).next_power_of_two().clamp(BITS.0, BITS.1);
        // The allocator's zeroed memory is not touched before its first use. Failing here is failing to start.
        let words = <[AtomicU64]>::new_box_zeroed_with_elems(bits as usize / 64).unwrap_or_else(|_| {
            std::alloc::handle_alloc_error(std::alloc::Layout::new::<[u64; BITS.1 as usize / 64]>())
        });
        Presence { words, doubt: AtomicI32::new(DOUBT) }
    }

    /// The word of a key's bit, and the bit.
    fn slot(&self, key: &Key) -> (&AtomicU64, u64) {
        let mut half = [0; 8];
        half.copy_from_slice(&key.object[..8]);
        let mixed = (u64::from_le_bytes(half) ^ u64::from(key.index).wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .wrapping_mul(0xd6e8_feb8_6659_fd93);
        let bits = self.words.len() * 64;
        let bit = (mixed >> (64 - bits.trailing_zeros())) as usize;
        (&self.words[bit / 64], 1 << (bit % 64))
    }

    /// Whether a page is worth asking for.
    pub(crate) fn likely(&self, key: &Key) -> bool {
        self.has(key) || self.doubt.load(Ordering::Relaxed) > 0
    }

    /// Whether the host stored a page while this program ran, and is not known to have lost it.
    pub(crate) fn has(&self, key: &Key) -> bool {
        let (word, bit) = self.slot(key);
        word.load(Ordering::Relaxed) & bit != 0
    }

    /// The host stored a page.
    pub(crate) fn stored(&self, key: &Key) {
        let (word, bit) = self.slot(key);
        word.fetch_or(bit, Ordering::Relaxed);
    }

    /// The host has a page.
    pub(crate) fn hit(&self, key: &Key) {
        let (word, bit) = self.slot(key);
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::Relaxed);
            if self.doubt.load(Ordering::Relaxed) > 0 {
                self.doubt.fetch_add(HIT_WEIGHT, Ordering::Relaxed);
            }
        }
    }

    /// The host had a page and gave it away.
    pub(crate) fn taken(&self, key: &Key) {
        let (word, bit) = self.slot(key);
        self.hit(key);
        word.fetch_and(!bit, Ordering::Relaxed);
    }

    /// The host does not have a page.
    pub(crate) fn missed(&self, key: &Key) {
        let (word, bit) = self.slot(key);
        if word.load(Ordering::Relaxed) & bit != 0 {
            word.fetch_and(!bit, Ordering::Relaxed);
        } else if self.doubt.load(Ordering::Relaxed) > 0 {
            self.doubt.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_the_first_misses_only_what_was_stored_is_likely() {
        let presence = Presence::new(1 << 20);
        let key = |index| Key { object: [7; 16], index };
        assert!(presence.likely(&key(1)), "an earlier run may have put it");
        for index in 0..DOUBT as u32 {
            presence.missed(&key(index));
        }
        assert!(!presence.likely(&key(1)));
        presence.stored(&key(1));
        assert!(presence.likely(&key(1)));
        assert!(!presence.likely(&key(2)));
        presence.missed(&key(1));
        assert!(!presence.likely(&key(1)));
    }

    #[test]
    fn keys_spread() {
        for (memory_kib, fewest) in [(1 << 30, 99_000), (150 << 10, 94_000)] {
            let presence = Presence::new(memory_kib);
            let slots: std::collections::HashSet<_> = (0..100_000)
                .map(|index| {
                    let (word, bit) = presence.slot(&Key { object: [3; 16], index });
                    (std::ptr::from_ref(word), bit)
                })
                .collect();
            assert!(slots.len() > fewest, "{} for {memory_kib} KiB", slots.len());
        }
    }
}
