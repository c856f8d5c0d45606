//! The state machine of one lane, without I/O of its own.
//!
//! A lane serves the requests of one queue of the block device over one connection to the host. Lanes share the
//! page table and nothing else; holding a page's entry is what keeps them (and a lane's own operations) apart.
//! [`Core`] decides; an [`Io`] carries out. Nothing here allocates once it is made.
//!
//! | module | holds |
//! |---|---|
//! | [`slot`] | what is known of one operation under way |
//! | [`serve`] | reads, writes and discards of the kernel |
//! | [`tidy`] | reclaim, flushing of stale copies, ageing |
//!
//! The order of steps is what makes stale data impossible:
//! - write: mark stale with the key's epoch → put → stored: at the host, mark cleared; refused: the host has
//!   nothing under that key any more, mark cleared, then the swap file; connection lost: the swap file, and the mark
//!   stays until that key was flushed. A page that carries the mark is never put.
//! - reclaim: get → write the file → in the file, marked stale → flush → mark cleared.
//! - discard: mark stale → flush → absent, mark cleared; without a connection: absent, marked stale.

mod serve;
mod slot;
mod tidy;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tmem_wire::pages::{GET_ENTRY_BYTES, KEY_BYTES, PUT_ENTRY_BYTES};
use tmem_wire::{Features, Header, HelloAnswer, Key, Op, WireError, HEADER_BYTES, MAX_BATCH, PAGE_BYTES};

use super::shared::Shared;
use crate::page::Encoder;
use slot::{Job, Slot};
use tidy::Tidy;

/// Most pages in one read or write.
pub const MAX_PAGES: usize = 16;
/// Slots of a lane's own for reclaim and flushing, after those of its front end.
pub const OWN_SLOTS: usize = MOVERS + 1;
/// Those of them that move pages, which are the first; the last has no data.
pub const MOVERS: usize = 2;
/// Puts that may be given up at a time; more wait for their answers.
const ABANDONED: usize = 64;
/// Epochs move on at most this often when puts are given up, so that they do not come round too soon.
const EPOCH_PERIOD: Duration = Duration::from_millis(50);
/// Space a lane needs for requests on their way to the host: the largest put, and a small one behind it.
pub const OUT_BYTES: usize = put_bytes(MAX_PAGES) + keys_bytes(MAX_BATCH);

const fn put_bytes(pages: usize) -> usize {
    HEADER_BYTES + pages * (PUT_ENTRY_BYTES + PAGE_BYTES)
}

const fn got_bytes(pages: usize) -> usize {
    HEADER_BYTES + pages * (GET_ENTRY_BYTES + PAGE_BYTES)
}

const fn keys_bytes(keys: usize) -> usize {
    HEADER_BYTES + keys * KEY_BYTES
}

/// Space a lane needs for one answer of the host.
pub const ANSWER_BYTES: usize = got_bytes(MAX_PAGES);

/// What the kernel wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Pages into the slot's buffer.
    Read,
    /// Pages from the slot's buffer.
    Write,
    /// Pages forgotten.
    Discard,
}

/// A request for consecutive pages; reads and writes have at most [`MAX_PAGES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What.
    pub kind: Kind,
    /// First page.
    pub first: u32,
    /// How many, at least one.
    pub pages: u32,
}

/// Which way pages go between a slot's buffer and the swap file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// Carries out what [`Core`] decides.
pub trait Io {
    /// The buffer that takes requests to the host.
    fn requests(&mut self) -> &mut Vec<u8>;
    /// The buffer that takes requests to the host, and the data of a slot that has any.
    fn frame(&mut self, slot: usize) -> (&mut Vec<u8>, &mut [u8]);
    /// Move `pages` pages between the slot's buffer, from its page `at`, and the swap file, from its page `index`;
    /// [`Core::file_done`] tells the end. Never called for more than [`MAX_PAGES`] transfers of a slot at a time.
    fn file(&mut self, slot: usize, direction: Direction, at: usize, pages: usize, index: u32);
    /// The front end's request in this slot is done; the slot is free.
    fn complete(&mut self, slot: usize, ok: bool);
}

/// A connection that said HELLO and has its pool.
#[derive(Debug, Clone, Copy)]
pub struct Session {
    /// The pool.
    pub pool: u32,
    /// What both ends can do.
    pub features: Features,
    /// Most keys in a flush.
    pub max_batch: usize,
    /// Most unanswered requests.
    pub max_in_flight: usize,
    /// Most bytes of unanswered requests, or of the answers they will get.
    pub window_bytes: usize,
}

impl Session {
    /// What of the host's limits matters here; an error says which limit is too small to work with.
    pub fn new(
        limits: &HelloAnswer,
        pool: u32,
        window_bytes: Option<usize>,
    ) -> Result<Session, &'static str> {
        let max_batch = (limits.max_batch as usize).min(MAX_BATCH);
        if max_batch < MAX_PAGES {
            return Err("the host's batches are too small");
        }
        if (limits.max_frame_bytes as usize) < put_bytes(MAX_PAGES) {
            return Err("the host's frames are too small");
        }
        Ok(Session {
            pool,
            features: limits.features,
            max_batch,
            max_in_flight: (limits.max_in_flight as usize).max(1),
            window_bytes: window_bytes.unwrap_or(usize::MAX),
        })
    }
}

/// The host answered what cannot be; the connection is to be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// The frame is malformed.
    #[error("tmemd broke the protocol: {0}")]
    Wire(#[from] WireError),
    /// Nothing with this tag and operation is awaited.
    #[error("tmemd answered {op:?} with tag {tag}, which was not asked")]
    Unasked {
        /// The answer's operation.
        op: Op,
        /// The answer's tag.
        tag: u32,
    },
    /// The host failed the request as a whole.
    #[error("tmemd failed a {op:?} with code {status}")]
    Failed {
        /// The operation.
        op: Op,
        /// The error code.
        status: u16,
    },
}

/// How a lane behaves.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Compress pages before they are put.
    pub compress: bool,
    /// Ask the host for pages as it keeps them, compressed.
    pub accept_lz4: bool,
    /// Most pages reclaim moves in a second.
    pub reclaim_pages_per_s: u32,
    /// A put that is not answered for so long is written to the swap file instead, and so is what follows until the
    /// host answers again. The answer may depend on it: the guest's vsock driver takes memory for what it receives,
    /// and may be waiting for pages to be written by this very lane.
    pub hedge: Duration,
}

/// The state machine of one lane.
pub struct Core {
    shared: Shared,
    lane: usize,
    options: Options,
    slots: Vec<Slot>,
    front: usize,
    waiting: VecDeque<usize>,
    session: Option<Session>,
    in_flight: usize,
    in_flight_bytes: usize,
    /// Puts that were given up but may still be answered: tag and bytes.
    abandoned: Vec<(u32, usize)>,
    /// A put was given up, and the host has not answered anything since.
    stalled: bool,
    now: Instant,
    encoder: Encoder,
    keys: Vec<Key>,
    tidy: Tidy,
}

impl Core {
    /// A lane with `front` slots for its front end and [`OWN_SLOTS`] more, numbered after them. Lane 0 is the one
    /// that does reclaim and flushing.
    pub fn new(shared: Shared, lane: usize, front: usize, options: Options, now: Instant) -> Core {
        let slots = front + OWN_SLOTS;
        Core {
            shared,
            lane,
            options,
            slots: vec![Slot::default(); slots],
            front,
            waiting: VecDeque::with_capacity(slots),
            session: None,
            in_flight: 0,
            in_flight_bytes: 0,
            abandoned: Vec::with_capacity(ABANDONED),
            stalled: false,
            now,
            encoder: Encoder::new(options.compress),
            keys: Vec::with_capacity(MAX_BATCH),
            tidy: Tidy::new(now),
        }
    }

    /// Take a request into a free slot; a write's data stands in the slot's buffer.
    pub fn submit(&mut self, io: &mut impl Io, s: usize, request: Request) {
        debug_assert!(s < self.front && self.slots[s].job == Job::Idle);
        debug_assert!(request.first + request.pages <= self.shared.table.pages());
        self.slots[s].begin(request);
        if !self.start(io, s) {
            self.waiting.push_back(s);
        }
    }

    /// The front end's slots that are free.
    pub fn free_slot(&self) -> Option<usize> {
        self.slots[..self.front].iter().position(|slot| slot.job == Job::Idle)
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.slots.iter().all(|slot| slot.job == Job::Idle)
    }

    /// Unanswered requests.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Bytes of unanswered requests, or of the answers they will get.
    pub fn in_flight_bytes(&self) -> usize {
        self.in_flight_bytes
    }

    /// Whether some request could not begin: a page is held elsewhere, the link is full, or the host is away.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether reclaim has something to do soon.
    pub fn is_reclaiming(&self) -> bool {
        self.lane == 0 && self.session.is_some() && self.reclaim_left() > 0
    }

    /// A connection is there.
    pub fn connected(&mut self, session: Session, now: Instant) {
        debug_assert!(self.session.is_none());
        self.session = Some(session);
        self.shared.state.connected.fetch_or(1 << self.lane, std::sync::atomic::Ordering::Relaxed);
        self.tidy.connected(&self.shared, now);
    }

    /// The connection is gone. Puts on their way go to the swap file; reads of host pages wait.
    pub fn disconnected(&mut self, io: &mut impl Io) {
        if self.session.take().is_none() {
            return;
        }
        self.shared.next_epoch();
        self.shared.state.connected.fetch_and(!(1 << self.lane), std::sync::atomic::Ordering::Relaxed);
        self.shared.count(|c| &c.disconnects, 1);
        (self.in_flight, self.in_flight_bytes) = (0, 0);
        self.abandoned.clear();
        self.stalled = false;
        for s in 0..self.slots.len() {
            if self.slots[s].frame.take().is_some() {
                self.unanswered(io, s);
            }
        }
    }

    /// The host answered. After an error the caller drops the connection and calls [`Core::disconnected`].
    pub fn answered(&mut self, io: &mut impl Io, header: &Header, body: &[u8]) -> Result<(), AnswerError> {
        let Header { op, tag, status, .. } = *header;
        let s = (tag & u32::from(u16::MAX)) as usize;
        self.stalled = false;
        if self.slots.get(s).is_none_or(|slot| slot.frame != Some(op) || slot.tag(s) != tag) {
            let given_up = self.abandoned.iter().position(|(other, _)| *other == tag && op == Op::Put);
            let Some(at) = given_up else { return Err(AnswerError::Unasked { op, tag }) };
            let (_, bytes) = self.abandoned.swap_remove(at);
            self.in_flight -= 1;
            self.in_flight_bytes -= bytes;
            return Ok(());
        }
        if status != 0 {
            return Err(AnswerError::Failed { op, status });
        }
        match op {
            Op::Put => self.put_answered(io, s, header, body)?,
            Op::Get => self.got(io, s, header, body)?,
            _ => self.flush_answered(io, s, header, body)?,
        }
        Ok(())
    }

    /// A transfer that [`Io::file`] began is over.
    pub fn file_done(&mut self, io: &mut impl Io, s: usize, at: usize, pages: usize, ok: bool) {
        self.slots[s].files -= 1;
        match self.slots[s].job {
            Job::Read => self.file_was_read(io, s, at, pages, ok),
            Job::Write => self.file_was_written(s, at, pages, ok),
            Job::Move => self.moved_to_file(s, at, pages, ok),
            Job::Idle | Job::Discard | Job::Sweep => {}
        }
        self.finish(io, s);
    }

    /// Tell the time. To be called after every wait, before what happened meanwhile is told.
    pub fn set_time(&mut self, now: Instant) {
        self.now = now;
    }

    /// Go on with what waits and with what is nobody's request. To be called after every batch of events, and from
    /// time to time.
    pub fn poll(&mut self, io: &mut impl Io, now: Instant) {
        self.now = now;
        if self.in_flight > self.abandoned.len() {
            self.give_up_puts(io);
        }
        for _ in 0..self.waiting.len() {
            if let Some(s) = self.waiting.pop_front() {
                if !self.start(io, s) {
                    self.waiting.push_back(s);
                }
            }
        }
        if self.lane == 0 {
            self.tidy_up(io, now);
        }
    }

    /// Begin what the slot holds; `false` if it has to wait.
    fn start(&mut self, io: &mut impl Io, s: usize) -> bool {
        match self.slots[s].job {
            Job::Read => self.start_read(io, s),
            Job::Write => self.start_write(io, s),
            Job::Discard => self.discard_on(io, s),
            Job::Move => self.flush_moved(io, s),
            Job::Idle | Job::Sweep => true,
        }
    }

    /// Whether a request with frames of this size, both ways the larger, may be sent now.
    fn room(&self, io: &mut impl Io, bytes: usize) -> bool {
        let Some(session) = &self.session else { return false };
        let out = io.requests();
        out.capacity() - out.len() >= bytes
            && self.in_flight < session.max_in_flight
            && (self.in_flight == 0 || self.in_flight_bytes + bytes <= session.window_bytes)
    }

    /// The tag for the next frame of a slot.
    fn next_tag(&mut self, s: usize) -> u32 {
        let slot = &mut self.slots[s];
        slot.turn = slot.turn.wrapping_add(1);
        slot.tag(s)
    }

    fn sent(&mut self, s: usize, op: Op, bytes: usize) {
        let slot = &mut self.slots[s];
        debug_assert!(slot.frame.is_none());
        slot.frame = Some(op);
        slot.frame_bytes = bytes;
        slot.sent_at = Some(self.now);
        self.in_flight += 1;
        self.in_flight_bytes += bytes;
    }

    /// Take the answer's accounting and the slot's frame off.
    fn take_frame(&mut self, s: usize) {
        self.slots[s].frame = None;
        self.in_flight -= 1;
        self.in_flight_bytes -= self.slots[s].frame_bytes;
    }
}
