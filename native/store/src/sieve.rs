//! Eviction order of one VM's ephemeral pages: SIEVE.
//!
//! Pages stand in a list in the order they were put. A hit only sets a page's visited bit. A hand moves from the
//! oldest page to the newest; it clears the bit of a visited page and passes on, and evicts the first that is not
//! visited. Pages that survive stay where they are, so one scan through cold pages, which are never visited, passes
//! by without displacing the hot ones. (Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024.)
//!
//! The links are in the slots' headers; the list's lock protects them.

use crate::slabs::Slabs;
use crate::slot::SlotRef;

/// Most visited pages one eviction passes by: bounds the time the lock is held.
const MAX_PASSES: u32 = 512;

/// The list.
#[derive(Debug)]
pub(crate) struct Sieve {
    newest: SlotRef,
    oldest: SlotRef,
    hand: SlotRef,
}

impl Default for Sieve {
    fn default() -> Self {
        Sieve { newest: SlotRef::NONE, oldest: SlotRef::NONE, hand: SlotRef::NONE }
    }
}

impl Sieve {
    /// Add a page as the newest. `next` points to newer pages, `prev` to older ones.
    pub(crate) fn add(&mut self, slabs: &Slabs, at: SlotRef) {
        let slot = slabs.slot(at);
        slot.set_prev(self.newest);
        slot.set_next(SlotRef::NONE);
        if self.newest == SlotRef::NONE {
            self.oldest = at;
        } else {
            slabs.slot(self.newest).set_next(at);
        }
        self.newest = at;
    }

    /// Take a page off the list.
    pub(crate) fn remove(&mut self, slabs: &Slabs, at: SlotRef) {
        let slot = slabs.slot(at);
        let (older, newer) = (slot.prev(), slot.next());
        if self.hand == at {
            self.hand = newer;
        }
        self.link(slabs, older, newer);
    }

    /// Put a moved page in the place of the old one.
    pub(crate) fn replace(&mut self, slabs: &Slabs, from: SlotRef, to: SlotRef) {
        let (older, newer) = (slabs.slot(from).prev(), slabs.slot(from).next());
        slabs.slot(to).set_prev(older);
        slabs.slot(to).set_next(newer);
        if older == SlotRef::NONE {
            self.oldest = to;
        } else {
            slabs.slot(older).set_next(to);
        }
        if newer == SlotRef::NONE {
            self.newest = to;
        } else {
            slabs.slot(newer).set_prev(to);
        }
        if self.hand == from {
            self.hand = to;
        }
    }

    fn link(&mut self, slabs: &Slabs, older: SlotRef, newer: SlotRef) {
        if older == SlotRef::NONE {
            self.oldest = newer;
        } else {
            slabs.slot(older).set_next(newer);
        }
        if newer == SlotRef::NONE {
            self.newest = older;
        } else {
            slabs.slot(newer).set_prev(older);
        }
    }

    /// The page to evict next. It stays on the list, the hand past it, until it is removed.
    pub(crate) fn victim(&mut self, slabs: &Slabs) -> Option<SlotRef> {
        let mut passes = 0;
        loop {
            let at = if self.hand == SlotRef::NONE { self.oldest } else { self.hand };
            if at == SlotRef::NONE {
                return None;
            }
            let slot = slabs.slot(at);
            self.hand = slot.next();
            if !slot.state().visited() || passes == MAX_PASSES {
                return Some(at);
            }
            slot.unvisit();
            passes += 1;
        }
    }
}
