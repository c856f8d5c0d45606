//! A lane: one thread that serves one queue of the device over one connection to the host.
//!
//! Everything that happens comes out of the lane's io_uring: requests of the kernel, bytes from the host, swap file
//! transfers, a tap on the shoulder from another thread. One round: take what completed, let the core decide, hand
//! over what it decided, wait.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use rustix::event::{eventfd, EventfdFlags};
use tmem_wire::PAGE_BYTES;

use super::core::{Core, Direction, Io, Options, MOVERS, OWN_SLOTS};
use super::front::{Context, Event, Front};
use super::host::{Broken, Connection, Host, Input};
use super::ring::{Buffers, Ring, Source, Token};
use super::shared::Shared;

/// Nothing needs to be looked at more often than this while nothing happens.
const IDLE: Duration = Duration::from_secs(1);
/// While the host owes answers: how finely its silence is measured.
const OWED: Duration = Duration::from_millis(20);
/// While requests wait for a page that another lane holds.
const WAITING: Duration = Duration::from_millis(1);
/// While requests wait for the host to come back.
const AWAY: Duration = Duration::from_millis(50);
/// While reclaim waits for its rate to allow more.
const RECLAIMING: Duration = Duration::from_millis(4);

/// Bytes on their way that surely fit into a socket's buffers, at this end and the other.
const UNBLOCKED_BYTES: usize = 64 * 1024;

/// What other threads leave for a lane.
#[derive(Debug)]
pub(super) struct Post {
    wake: OwnedFd,
    connection: Mutex<Option<Connection>>,
    /// The lane has no connection and wants one.
    pub(super) wants_connection: AtomicBool,
}

impl Post {
    pub(super) fn new() -> io::Result<Arc<Post>> {
        Ok(Arc::new(Post {
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            connection: Mutex::new(None),
            wants_connection: AtomicBool::new(true),
        }))
    }

    /// Have the lane look around.
    pub(super) fn wake(&self) {
        // Fails only when it is rung already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Hand over a connection.
    pub(super) fn deliver(&self, connection: Connection) {
        let mut place = self.connection();
        *place = Some(connection);
        self.wants_connection.store(false, Ordering::Release);
        drop(place);
        self.wake();
    }

    /// Have the connector make a connection, unless one lies here already: made for a lane that was not there yet.
    pub(super) fn want_connection(&self) {
        let place = self.connection();
        self.wants_connection.store(place.is_none(), Ordering::Release);
    }

    fn connection(&self) -> MutexGuard<'_, Option<Connection>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a lane is made of.
pub(super) struct Setup {
    pub(super) shared: Shared,
    pub(super) number: usize,
    pub(super) depth: usize,
    pub(super) options: Options,
    /// How long the host may leave requests unanswered.
    pub(super) patience: Duration,
    pub(super) file: RawFd,
    pub(super) post: Arc<Post>,
    /// Rung when the lane wants a connection.
    pub(super) connector: Arc<dyn Fn() + Send + Sync>,
}

/// The part of a lane that carries out what the core decides.
struct Hands {
    ring: Ring,
    buffers: Buffers,
    host: Host,
    file: RawFd,
    done: VecDeque<(usize, bool)>,
}

impl Io for Hands {
    fn requests(&mut self) -> &mut Vec<u8> {
        self.host.requests()
    }

    fn frame(&mut self, slot: usize) -> (&mut Vec<u8>, &mut [u8]) {
        (self.host.requests(), self.buffers.slot(slot))
    }

    fn file(&mut self, slot: usize, direction: Direction, at: usize, pages: usize, index: u32) {
        let (fd, bytes) = (types::Fd(self.file), (pages * PAGE_BYTES) as u32);
        let memory = self.buffers.address(slot, at);
        let offset = u64::from(index) * PAGE_BYTES as u64;
        let entry = match direction {
            Direction::Read => opcode::Read::new(fd, memory, bytes).offset(offset).build(),
            Direction::Write => opcode::Write::new(fd, memory, bytes).offset(offset).build(),
        };
        let token = Token { source: Source::File, slot: slot as u16, at: at as u16, pages: pages as u16 };
        // SAFETY: the slot's buffer lives as long as the ring and is the core's to leave alone until the completion.
        unsafe { self.ring.push(entry, token) };
    }

    fn complete(&mut self, slot: usize, ok: bool) {
        self.done.push_back((slot, ok));
    }
}

/// A lane with its front end.
pub(super) struct Lane<F> {
    setup: Setup,
    core: Core,
    hands: Hands,
    front: F,
    over: bool,
}

impl<F: Front> Lane<F> {
    /// Allocate everything the lane will ever need.
    pub(super) fn new(setup: Setup, front: F) -> io::Result<Lane<F>> {
        let now = Instant::now();
        let slots = setup.depth + OWN_SLOTS;
        let core = Core::new(setup.shared, setup.number, setup.depth, setup.options, now);
        let hands = Hands {
            ring: Ring::new(256)?,
            buffers: Buffers::new(setup.depth + MOVERS)?,
            host: Host::new(now),
            file: setup.file,
            done: VecDeque::with_capacity(slots),
        };
        Ok(Lane { setup, core, hands, front, over: false })
    }

    /// Serve until the device is gone.
    pub(super) fn run(mut self) -> io::Result<()> {
        self.watch();
        self.front.start(&mut context(&mut self.hands, &self.setup));
        (self.setup.connector)();
        loop {
            let now = Instant::now();
            self.adopt(now);
            self.core.poll(&mut self.hands, now);
            self.hand_back();
            self.hands.host.send(&mut self.hands.ring, now);
            if let Err(why) = self.hands.host.keep_alive(self.core.in_flight(), self.setup.patience, now) {
                self.broken(&why);
                continue;
            }
            if self.over && self.core.is_idle() {
                self.core.disconnected(&mut self.hands);
                self.hands.host.drop_connection();
                return self.settle();
            }
            self.hands.ring.wait(self.awaited(), self.pause())?;
            self.core.set_time(Instant::now());
            while let Some((token, result)) = self.hands.ring.completion() {
                self.completed(token, result);
            }
        }
    }

    /// Wait until the kernel is done with all memory it was told of.
    fn settle(mut self) -> io::Result<()> {
        self.setup.post.wake();
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.hands.ring.outstanding() > 0 {
            if Instant::now() > deadline {
                // It will be done at the latest when the process ends; until then the memory must stay.
                std::mem::forget(self.hands);
                return Err(io::Error::other(
                    "the ring did not settle within 5 s after the device went away",
                ));
            }
            self.hands.ring.wait(1, Duration::from_millis(100))?;
            while let Some((token, result)) = self.hands.ring.completion() {
                match token.source {
                    Source::Send => drop(self.hands.host.was_sent(result)),
                    Source::Receive => drop(self.hands.host.received(result, deadline)),
                    Source::Front | Source::File | Source::Wake => {}
                }
            }
        }
        Ok(())
    }

    /// How many completions are worth waking up for. With so little under way, a send completes as it is handed over,
    /// and calls for nothing: to return with it alone would cost every request a system call.
    fn awaited(&self) -> usize {
        let little = self.core.in_flight_bytes() <= UNBLOCKED_BYTES;
        1 + usize::from(little && self.hands.host.is_sending_last())
    }

    fn pause(&self) -> Duration {
        if self.core.is_reclaiming() {
            RECLAIMING
        } else if self.core.has_waiting() {
            if self.hands.host.is_vacant() {
                AWAY
            } else {
                WAITING
            }
        } else if self.core.in_flight() > 0 {
            OWED
        } else {
            IDLE
        }
    }

    fn watch(&mut self) {
        let wake: BorrowedFd<'_> = self.setup.post.wake.as_fd();
        self.hands.ring.poll_readable(wake.as_raw_fd(), Token::new(Source::Wake, 0));
    }

    fn adopt(&mut self, now: Instant) {
        if !self.hands.host.is_vacant() {
            return;
        }
        let fresh = self.setup.post.connection().take();
        if let Some(connection) = fresh {
            let session = connection.session;
            self.hands.host.adopt(connection, &mut self.hands.ring, now);
            self.core.connected(session, now);
        }
    }

    fn broken(&mut self, why: &Broken) {
        log::warn!("lane {}: connection to the host lost: {why}", self.setup.number);
        self.hands.host.drop_connection();
        self.core.disconnected(&mut self.hands);
        self.setup.post.want_connection();
        (self.setup.connector)();
    }

    fn completed(&mut self, token: Token, result: i32) {
        match token.source {
            Source::Front => self.front_event(token, result),
            Source::File => {
                let Token { slot, at, pages, .. } = token;
                let ok = usize::try_from(result) == Ok(usize::from(pages) * PAGE_BYTES);
                if !ok {
                    let errno = if result < 0 { -result } else { libc::ENOSPC };
                    log::error!("swap file: a transfer failed: {}", io::Error::from_raw_os_error(errno));
                }
                self.core.file_done(&mut self.hands, slot.into(), at.into(), pages.into(), ok);
            }
            Source::Send => {
                if let Err(why) = self.hands.host.was_sent(result) {
                    self.broken(&why);
                }
            }
            Source::Receive => self.received(result),
            Source::Wake => {
                let mut count = [0; 8];
                // Nothing to read means that it was read already.
                let _ = rustix::io::read(&self.setup.post.wake, &mut count);
                self.watch();
            }
        }
    }

    fn front_event(&mut self, token: Token, result: i32) {
        let mut completion = Some((token, result));
        loop {
            let event = self.front.event(&mut context(&mut self.hands, &self.setup), completion.take());
            match event {
                Event::Nothing => return,
                Event::Request(slot, request) => self.core.submit(&mut self.hands, slot, request),
                Event::Over => {
                    self.over = true;
                    return;
                }
            }
        }
    }

    fn received(&mut self, result: i32) {
        match self.hands.host.received(result, Instant::now()) {
            Ok(None) => {}
            Ok(Some(mut input)) => {
                let taken = self.take_answers(&mut input);
                let Hands { host, ring, .. } = &mut self.hands;
                if taken.is_err() {
                    // Before the input is given back, so that nothing more is received into it.
                    host.drop_connection();
                }
                host.give_back(input, ring);
                if let Err(why) = taken {
                    self.broken(&why);
                }
            }
            Err(why) => self.broken(&why),
        }
    }

    fn take_answers(&mut self, input: &mut Input) -> Result<(), Broken> {
        while let Some((header, body)) = input.frame()? {
            if self.hands.host.is_for_core(&header) {
                self.core.answered(&mut self.hands, &header, body)?;
            }
        }
        Ok(())
    }

    /// Tell the front end what is done. That may bring new requests, which may be done at once.
    fn hand_back(&mut self) {
        while let Some((slot, ok)) = self.hands.done.pop_front() {
            self.front.complete(&mut context(&mut self.hands, &self.setup), slot, ok);
        }
    }
}

fn context<'a>(hands: &'a mut Hands, setup: &Setup) -> Context<'a> {
    Context { ring: &mut hands.ring, buffers: &mut hands.buffers, pages: setup.shared.table.pages() }
}
