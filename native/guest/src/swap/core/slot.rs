//! What is known of one operation under way.

use std::time::Instant;

use tmem_wire::{Op, MAX_BATCH};

use super::{Kind, Request, MAX_PAGES};

/// What a slot does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Job {
    /// Nothing.
    #[default]
    Idle,
    /// A read for the kernel.
    Read,
    /// A write for the kernel.
    Write,
    /// A discard for the kernel.
    Discard,
    /// Reclaim of host pages.
    Move,
    /// Flushing of stale copies.
    Sweep,
}

/// One operation.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Slot {
    pub(super) job: Job,
    /// Reads, writes and moves: number of pages. Discards: what is left is `at..end`.
    pub(super) pages: usize,
    /// The pages, for reads, writes and moves.
    pub(super) index: [u32; MAX_PAGES],
    /// Their checksums, for writes and moves.
    pub(super) sums: [u32; MAX_PAGES],
    /// Pages (bits) whose entries the slot holds; reads, writes and moves.
    pub(super) held: u32,
    /// Pages (bits) in the outstanding frame; reads, writes and moves.
    pub(super) host: u32,
    /// Discards and sweeps: the first page of the chunk under way, the next page to look at, the end.
    pub(super) chunk: u32,
    pub(super) at: u32,
    pub(super) end: u32,
    /// Discards and sweeps: held pages of the chunk, all in the outstanding frame.
    pub(super) flush: Bits,
    /// The outstanding frame and its share of the window.
    pub(super) frame: Option<Op>,
    pub(super) frame_bytes: usize,
    pub(super) sent_at: Option<Instant>,
    /// Counts the slot's frames, so that their tags differ. Survives the operations.
    pub(super) turn: u16,
    /// Outstanding transfers to or from the swap file.
    pub(super) files: u32,
    /// Some part failed.
    pub(super) failed: bool,
    /// Once everything outstanding is over, start again from the beginning.
    pub(super) again: bool,
}

impl Slot {
    pub(super) fn begin(&mut self, request: Request) {
        let Request { kind, first, pages } = request;
        let job = match kind {
            Kind::Read => Job::Read,
            Kind::Write => Job::Write,
            Kind::Discard => Job::Discard,
        };
        *self = Slot { job, at: first, end: first + pages, turn: self.turn, ..Slot::default() };
        if job != Job::Discard {
            self.pages = pages as usize;
            for (index, page) in self.index[..pages as usize].iter_mut().zip(first..) {
                *index = page;
            }
        }
    }

    /// The tag of this slot's latest frame.
    pub(super) fn tag(&self, s: usize) -> u32 {
        u32::from(self.turn) << 16 | s as u32
    }

    /// Split pages (bits) into runs that are consecutive on the device too: `(at, pages)`.
    pub(super) fn runs(&self, mask: u32) -> impl Iterator<Item = (usize, usize)> {
        let Slot { pages, index, .. } = *self;
        let mut next = 0;
        std::iter::from_fn(move || {
            let at = (next..pages).find(|i| mask & 1 << i != 0)?;
            let mut end = at + 1;
            while end < pages && mask & 1 << end != 0 && index[end] == index[end - 1] + 1 {
                end += 1;
            }
            next = end;
            Some((at, end - at))
        })
    }
}

/// The positions of the bits that are set.
pub(super) fn ones(mask: u32) -> impl Iterator<Item = usize> {
    (0..u32::BITS as usize).filter(move |i| mask & 1 << i != 0)
}

/// A bit for each page of a chunk.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Bits([u64; MAX_BATCH / 64]);

impl Bits {
    pub(super) fn set(&mut self, bit: u32) {
        self.0[bit as usize / 64] |= 1 << (bit % 64);
    }

    pub(super) fn iter(self) -> impl Iterator<Item = u32> {
        (0..MAX_BATCH as u32).filter(move |bit| self.0[*bit as usize / 64] & 1 << (bit % 64) != 0)
    }
}
