//! Eviction order of one VM's ephemeral pages: SIEVE, with variants that a tuner chooses from.
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
/// With [`Order::Settled`], one page in this many may stay.
const ADMITTED: u32 = 32;

/// What differs between the variants. They share one list, so changing from one to another moves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// SIEVE as published. Best where some pages stay popular.
    Sieve,
    /// New pages go under the hand, to be evicted next, but for one in 32: what is there stays. Best where more is
    /// asked for in turn than fits, as in a loop, where any order of age evicts each page just before its use.
    /// (Bimodal insertion: Qureshi et al., "Adaptive Insertion Policies", ISCA 2007.)
    Settled,
    /// Visited pages become the newest when passed: second chance, close to LRU. Best where interest moves on.
    Recent,
}

/// How a list's nodes are linked.
pub(crate) trait Links {
    fn prev(&self, at: SlotRef) -> SlotRef;
    fn next(&self, at: SlotRef) -> SlotRef;
    fn set_prev(&self, at: SlotRef, to: SlotRef);
    fn set_next(&self, at: SlotRef, to: SlotRef);
    fn visited(&self, at: SlotRef) -> bool;
    fn unvisit(&self, at: SlotRef);
}

impl Links for Slabs {
    fn prev(&self, at: SlotRef) -> SlotRef {
        self.slot(at).prev()
    }

    fn next(&self, at: SlotRef) -> SlotRef {
        self.slot(at).next()
    }

    fn set_prev(&self, at: SlotRef, to: SlotRef) {
        self.slot(at).set_prev(to);
    }

    fn set_next(&self, at: SlotRef, to: SlotRef) {
        self.slot(at).set_next(to);
    }

    fn visited(&self, at: SlotRef) -> bool {
        self.slot(at).state().visited()
    }

    fn unvisit(&self, at: SlotRef) {
        self.slot(at).unvisit();
    }
}

/// The list. `next` points to newer pages, `prev` to older ones.
#[derive(Debug)]
pub(crate) struct Sieve {
    newest: SlotRef,
    oldest: SlotRef,
    hand: SlotRef,
    added: u32,
}

impl Default for Sieve {
    fn default() -> Self {
        Sieve { newest: SlotRef::NONE, oldest: SlotRef::NONE, hand: SlotRef::NONE, added: 0 }
    }
}

impl Sieve {
    /// Add a page.
    pub(crate) fn add(&mut self, links: &impl Links, at: SlotRef, order: Order) {
        self.added = self.added.wrapping_add(1);
        let hand = if self.hand == SlotRef::NONE { self.oldest } else { self.hand };
        if order == Order::Settled && self.added % ADMITTED != 0 && hand != SlotRef::NONE {
            self.join(links, links.prev(hand), at);
            self.join(links, at, hand);
            self.hand = at;
        } else {
            self.join(links, self.newest, at);
            self.join(links, at, SlotRef::NONE);
        }
    }

    /// Take a page off the list.
    pub(crate) fn remove(&mut self, links: &impl Links, at: SlotRef) {
        let (older, newer) = (links.prev(at), links.next(at));
        if self.hand == at {
            self.hand = newer;
        }
        self.join(links, older, newer);
    }

    /// Put a moved page in the place of the old one.
    pub(crate) fn replace(&mut self, links: &impl Links, from: SlotRef, to: SlotRef) {
        let (older, newer) = (links.prev(from), links.next(from));
        self.join(links, older, to);
        self.join(links, to, newer);
        if self.hand == from {
            self.hand = to;
        }
    }

    /// Make two pages neighbours; one of them may be the end of the list.
    fn join(&mut self, links: &impl Links, older: SlotRef, newer: SlotRef) {
        if older == SlotRef::NONE {
            self.oldest = newer;
        } else {
            links.set_next(older, newer);
        }
        if newer == SlotRef::NONE {
            self.newest = older;
        } else {
            links.set_prev(newer, older);
        }
    }

    /// The page to evict next. It stays on the list until it is removed.
    pub(crate) fn victim(&mut self, links: &impl Links, order: Order) -> Option<SlotRef> {
        let mut passes = 0;
        loop {
            let from_oldest = order == Order::Recent || self.hand == SlotRef::NONE;
            let at = if from_oldest { self.oldest } else { self.hand };
            if at == SlotRef::NONE {
                return None;
            }
            if order != Order::Recent {
                self.hand = links.next(at);
            }
            if !links.visited(at) || passes == MAX_PASSES {
                return Some(at);
            }
            links.unvisit(at);
            passes += 1;
            if order == Order::Recent {
                self.remove(links, at);
                self.join(links, self.newest, at);
                self.join(links, at, SlotRef::NONE);
            }
        }
    }
}
