//! Chooses the eviction order that would have served a VM best lately.
//!
//! A sample of the VM's pages, chosen by key, is followed through a small list for every order, of the size that the
//! sample would have in the store. The order with most hits there is used. (Waldspurger et al., "Cache Modeling and
//! Optimization using Miniature Simulations", USENIX ATC 2017.)

use std::cell::Cell;
use std::collections::HashMap;

use crate::sieve::{Links, Order, Sieve};
use crate::slot::SlotRef;

/// Most pages a miniature holds.
const MINIATURE_PAGES: u64 = 512;
/// Of pages that a miniature can follow, at most one in eight is sampled.
const LEAST_SHIFT: u32 = 3;
/// What a hit counts for after one more sampled get.
const DECAY: f32 = 0.999;
/// How much better another order must be, so that equals do not take turns.
const MARGIN: f32 = 1.05;

const ORDERS: [Order; 3] = [Order::Sieve, Order::Settled, Order::Recent];

/// A VM's eviction list, and what is known about how it should be ordered.
#[derive(Debug)]
pub(crate) struct Eviction {
    pub list: Sieve,
    pub order: Order,
    shift: u32,
    miniatures: [Miniature; ORDERS.len()],
    scores: [f32; ORDERS.len()],
}

impl Default for Eviction {
    fn default() -> Self {
        Eviction {
            list: Sieve::default(),
            order: Order::Sieve,
            shift: LEAST_SHIFT,
            miniatures: Default::default(),
            scores: [0.0; ORDERS.len()],
        }
    }
}

/// Whether pages of this hash may be followed at all; the cheap test before the lock.
pub(crate) fn sampled(hash: u64, pages: u64) -> bool {
    hash >> 32 & ((1 << shift(pages)) - 1) == 0
}

fn shift(pages: u64) -> u32 {
    (pages / MINIATURE_PAGES).checked_ilog2().map_or(LEAST_SHIFT, |log| (log + 1).max(LEAST_SHIFT))
}

impl Eviction {
    /// A sampled page was asked for; `pages` is what the VM holds. A miniature that does not have it takes it: had its
    /// order been used, a put would have followed.
    pub(crate) fn asked(&mut self, hash: u64, pages: u64) {
        let most = self.fit(pages);
        for ((score, miniature), order) in self.scores.iter_mut().zip(&mut self.miniatures).zip(ORDERS) {
            *score = *score * DECAY + if miniature.access(hash, order, most) { 1.0 } else { 0.0 };
        }
        let current = ORDERS.iter().position(|order| *order == self.order).unwrap_or(0);
        let best = (0..ORDERS.len()).max_by(|&a, &b| self.scores[a].total_cmp(&self.scores[b])).unwrap_or(0);
        if self.scores[best] > self.scores[current] * MARGIN + 1.0 {
            self.order = ORDERS[best];
        }
    }

    /// A sampled page was put.
    pub(crate) fn put(&mut self, hash: u64, pages: u64) {
        let most = self.fit(pages);
        for (miniature, order) in self.miniatures.iter_mut().zip(ORDERS) {
            if !miniature.by_page.contains_key(&hash) {
                miniature.access(hash, order, most);
            }
        }
    }

    /// Another size of the VM is another sample. Pages a miniature may hold.
    fn fit(&mut self, pages: u64) -> usize {
        if self.shift != shift(pages) {
            self.shift = shift(pages);
            self.miniatures = Default::default();
            self.scores = [0.0; ORDERS.len()];
        }
        (pages >> self.shift).max(1) as usize
    }
}

#[derive(Debug)]
struct Node {
    page: u64,
    prev: Cell<SlotRef>,
    next: Cell<SlotRef>,
    visited: Cell<bool>,
}

/// One order applied to the sample. Nodes go by their position, in place of slots.
#[derive(Debug, Default)]
struct Miniature {
    list: Sieve,
    nodes: Nodes,
    free: Vec<SlotRef>,
    by_page: HashMap<u64, SlotRef>,
}

#[derive(Debug, Default)]
struct Nodes(Vec<Node>);

impl Nodes {
    fn at(&self, at: SlotRef) -> &Node {
        &self.0[at.0 as usize]
    }
}

impl Links for Nodes {
    fn prev(&self, at: SlotRef) -> SlotRef {
        self.at(at).prev.get()
    }

    fn next(&self, at: SlotRef) -> SlotRef {
        self.at(at).next.get()
    }

    fn set_prev(&self, at: SlotRef, to: SlotRef) {
        self.at(at).prev.set(to);
    }

    fn set_next(&self, at: SlotRef, to: SlotRef) {
        self.at(at).next.set(to);
    }

    fn visited(&self, at: SlotRef) -> bool {
        self.at(at).visited.get()
    }

    fn unvisit(&self, at: SlotRef) {
        self.at(at).visited.set(false);
    }
}

impl Miniature {
    /// Whether the page is there; if not, it is taken.
    fn access(&mut self, page: u64, order: Order, most: usize) -> bool {
        if let Some(&at) = self.by_page.get(&page) {
            self.nodes.at(at).visited.set(true);
            return true;
        }
        while self.by_page.len() >= most {
            let Some(at) = self.list.victim(&self.nodes, order) else { break };
            self.by_page.remove(&self.nodes.at(at).page);
            self.drop_node(at);
        }
        let none = Cell::new(SlotRef::NONE);
        let node = Node { page, prev: none.clone(), next: none, visited: Cell::new(false) };
        let at = self.free.pop().unwrap_or(SlotRef(self.nodes.0.len() as u32));
        if at.0 as usize == self.nodes.0.len() {
            self.nodes.0.push(node);
        } else {
            self.nodes.0[at.0 as usize] = node;
        }
        self.by_page.insert(page, at);
        self.list.add(&self.nodes, at, order);
        false
    }

    fn drop_node(&mut self, at: SlotRef) {
        self.list.remove(&self.nodes, at);
        self.free.push(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order chosen after a trace.
    fn learn(trace: impl Iterator<Item = u64>, pages: u64) -> Order {
        let mut eviction = Eviction::default();
        for page in trace {
            let hash = page.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            if sampled(hash, pages) {
                eviction.asked(hash, pages);
            }
        }
        eviction.order
    }

    #[test]
    fn a_loop_larger_than_the_cache_settles() {
        assert_eq!(learn((0..200_000).map(|i| i % 6000), 5000), Order::Settled);
    }

    #[test]
    fn interest_that_moves_on_is_followed() {
        // A window of 2000 pages in random order that moves on by a page every ten requests.
        let mut state = 1_u64;
        let trace = (0..400_000).map(|i| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            i / 10 + (state >> 33) % 4000
        });
        assert_eq!(learn(trace, 3000), Order::Recent);
    }
}
