//! One stream between the guest and a [`Peer`]: opening, credit, half-closing, ending (virtio 1.3, section 5.10.6).
//!
//! No I/O happens here but through the peer. Packets from the guest come in by [`Connection::receive`]; what is owed to
//! the guest goes out one packet at a time by [`Connection::send`], whenever the guest has room for one.

use std::net::Shutdown;
use std::time::{Duration, Instant};

use super::packet::{Header, Key, Op, Sink, Source, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::peer::{Given, Peer};

/// How long a guest may take to answer a request from the host.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a guest may take to end a stream both sides are done with.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the host may take to read the rest of what a guest that closed has sent; Linux waits as long.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(8);

/// Why a guest's packet ends its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Violation {
    /// More data than the credit it was given.
    #[error("the guest sent more than its credit")]
    Credit,
    /// A packet that makes no sense in the stream's state.
    #[error("the guest sent a packet out of order")]
    State,
    /// Data after the guest said that there is none.
    #[error("the guest sent data after shutting down")]
    AfterShutdown,
}

/// Where a stream is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The host asked, the guest has not answered.
    Opening,
    /// Data flows.
    Open,
    /// A RESET is owed to the guest, and nothing else.
    Ending,
    /// Nothing is left to do: forget it.
    Gone,
}

/// Packets without data that are owed to the guest.
#[derive(Debug, Default, Clone, Copy)]
struct Owed {
    request: bool,
    response: bool,
    shutdown: u32,
    credit_update: bool,
}

/// One stream.
pub struct Connection {
    /// Its ports.
    pub key: Key,
    guest_cid: u64,
    peer: Box<dyn Peer>,
    state: State,
    owed: Owed,
    /// Taken from the guest but not yet by the peer: `backlog[backlog_at..]`.
    backlog: Vec<u8>,
    backlog_at: usize,
    /// Bytes the guest may have under way: what `backlog` may hold.
    buf_alloc: u32,
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest last heard it.
    told: u32,
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    /// `sent` when the guest was last asked for credit, if it has given none since.
    asked_at: Option<u32>,
    /// The host's socket is closed in both directions, not just its sending one.
    hung_up: bool,
    /// The peer may have something to give.
    readable: bool,
    /// SHUTDOWN bits the guest has sent: it will not receive, will not send.
    guest_shut: u32,
    /// SHUTDOWN bits the host has sent or owes.
    host_shut: u32,
    deadline: Option<Instant>,
    /// Whether it stands in the device's line of streams that have something for the guest.
    pub queued: bool,
}

impl Connection {
    /// A stream the guest asked for; the answer is owed.
    pub fn accept(request: &Header, guest_cid: u64, peer: Box<dyn Peer>, buf_alloc: u32) -> Connection {
        let mut connection = Connection::new(request.key(), guest_cid, peer, buf_alloc);
        connection.state = State::Open;
        connection.owed.response = true;
        connection.readable = true;
        connection.learn_credit(request);
        connection
    }

    /// A stream the host asks the guest for.
    pub fn open(key: Key, guest_cid: u64, peer: Box<dyn Peer>, buf_alloc: u32, now: Instant) -> Connection {
        let mut connection = Connection::new(key, guest_cid, peer, buf_alloc);
        connection.owed.request = true;
        connection.deadline = Some(now + OPEN_TIMEOUT);
        connection
    }

    fn new(key: Key, guest_cid: u64, peer: Box<dyn Peer>, buf_alloc: u32) -> Connection {
        Connection {
            key,
            guest_cid,
            peer,
            state: State::Opening,
            owed: Owed::default(),
            backlog: Vec::new(),
            backlog_at: 0,
            buf_alloc,
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            asked_at: None,
            hung_up: false,
            readable: false,
            guest_shut: 0,
            host_shut: 0,
            deadline: None,
            queued: false,
        }
    }

    /// Where the stream is in its life.
    pub fn state(&self) -> State {
        self.state
    }

    /// The peer, for its descriptor.
    pub fn peer(&self) -> &dyn Peer {
        &*self.peer
    }

    /// When something has to happen even if no packet comes.
    pub fn deadline(&self) -> Option<Instant> {
        match (self.deadline, self.peer.deadline()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Take in a packet from the guest.
    ///
    /// # Errors
    /// The guest broke the protocol; the stream ends with a RESET.
    pub fn receive(&mut self, header: &Header, data: &mut dyn Source, now: Instant) -> Result<(), Violation> {
        self.learn_credit(header);
        let outcome = match (self.state, header.operation()) {
            (_, Some(Op::Reset)) => {
                self.end_peer();
                self.state = State::Gone;
                Ok(())
            }
            // An update of the credit has been noted above; and an ended stream hears nothing any more.
            (State::Ending | State::Gone, _) | (State::Open, Some(Op::CreditUpdate)) => Ok(()),
            (State::Opening, Some(Op::Response)) => {
                self.deadline = None;
                self.readable = true;
                if self.peer.opened(self.key.host_port).is_ok() {
                    self.state = State::Open;
                } else {
                    self.abort();
                }
                Ok(())
            }
            (State::Open, Some(Op::Data)) => self.take(data),
            (State::Open, Some(Op::Shutdown)) => {
                self.guest_shuts(header.flags.get() & SHUTDOWN_BOTH, now);
                Ok(())
            }
            (State::Open, Some(Op::CreditRequest)) => {
                self.owed.credit_update = true;
                Ok(())
            }
            _ => Err(Violation::State),
        };
        if outcome.is_err() {
            self.abort();
        }
        outcome
    }

    fn learn_credit(&mut self, header: &Header) {
        self.guest_buf_alloc = header.buf_alloc.get();
        self.guest_fwd_cnt = header.fwd_cnt.get();
        if self.credit() > 0 {
            self.asked_at = None;
        }
    }

    /// Bytes the guest has room for. A guest that claims to have passed on more than it was sent has none.
    fn credit(&self) -> usize {
        let under_way = self.sent.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(under_way) as usize
    }

    fn take(&mut self, data: &mut dyn Source) -> Result<(), Violation> {
        if self.guest_shut & SHUTDOWN_SEND != 0 {
            return Err(Violation::AfterShutdown);
        }
        let length = data.remaining();
        let held = self.received.wrapping_sub(self.forwarded) as usize;
        if length > self.buf_alloc as usize - held {
            return Err(Violation::Credit);
        }
        self.received = self.received.wrapping_add(length as u32);
        if self.host_shut & SHUTDOWN_RECEIVE != 0 {
            // The peer takes nothing any more; the guest was told and will learn when it reads its mail.
            self.forward(length);
            return Ok(());
        }
        if held == 0 {
            self.pass(data);
        }
        let left = data.remaining();
        if left > 0 && self.host_shut & SHUTDOWN_RECEIVE == 0 {
            let start = self.backlog.len();
            self.backlog.resize(start + left, 0);
            data.copy_to(&mut self.backlog[start..]);
        } else {
            self.forward(left);
        }
        Ok(())
    }

    /// Give the peer what it takes.
    fn pass(&mut self, data: &mut dyn Source) {
        match self.peer.take(data) {
            Ok(taken) => self.forward(taken),
            Err(_) => self.host_shuts(SHUTDOWN_RECEIVE),
        }
        // A service may have answered on the spot.
        self.readable |= self.peer.descriptor().is_none();
    }

    /// Count bytes as passed on, and tell the guest once it could run short of credit.
    fn forward(&mut self, bytes: usize) {
        self.forwarded = self.forwarded.wrapping_add(bytes as u32);
        let known_free = self.buf_alloc.saturating_sub(self.received.wrapping_sub(self.told));
        if known_free < self.buf_alloc / 2 && self.forwarded != self.told {
            self.owed.credit_update = true;
        }
    }

    /// The peer may take data again.
    pub fn writable(&mut self, now: Instant) {
        self.drain();
        self.close_if_done(now);
    }

    fn drain(&mut self) {
        while self.backlog_at < self.backlog.len() && self.host_shut & SHUTDOWN_RECEIVE == 0 {
            let backlog = std::mem::take(&mut self.backlog);
            let mut rest = &backlog[self.backlog_at..];
            let before = rest.len();
            self.pass(&mut rest);
            let taken = before - rest.len();
            self.backlog_at += taken;
            self.backlog = backlog;
            if taken == 0 {
                break;
            }
        }
        if self.host_shut & SHUTDOWN_RECEIVE != 0 && self.backlog_at < self.backlog.len() {
            let lost = self.backlog.len() - self.backlog_at;
            self.backlog_at = self.backlog.len();
            self.forward(lost);
        }
        if self.backlog_at == self.backlog.len() {
            // Idle streams hold no buffer.
            self.backlog = Vec::new();
            self.backlog_at = 0;
        }
    }

    /// The peer may have something to give.
    pub fn readable(&mut self) {
        self.readable = true;
    }

    /// Another thread woke the peer, or a deadline has come.
    pub fn wake(&mut self, now: Instant) {
        if self.state == State::Open {
            self.readable |= self.peer.wake(now);
            self.drain();
        }
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.abort();
        }
    }

    fn guest_shuts(&mut self, flags: u32, now: Instant) {
        self.guest_shut |= flags;
        if self.guest_shut & SHUTDOWN_RECEIVE != 0 && self.guest_shut & SHUTDOWN_SEND == 0 {
            self.peer.shutdown(Shutdown::Read);
        }
        self.close_if_done(now);
    }

    /// Pass the guest's end of data on once all data before it is passed on, and end the stream once both are done.
    fn close_if_done(&mut self, now: Instant) {
        if self.state != State::Open || self.guest_shut & SHUTDOWN_SEND == 0 || !self.backlog.is_empty() {
            if self.guest_shut == SHUTDOWN_BOTH {
                // The guest has gone; the peer gets the rest, but not for ever.
                self.deadline.get_or_insert(now + DRAIN_TIMEOUT);
            }
            return;
        }
        if self.guest_shut == SHUTDOWN_BOTH || self.host_shut & SHUTDOWN_SEND != 0 {
            self.abort();
        } else {
            self.peer.shutdown(Shutdown::Write);
            self.readable = true;
        }
    }

    fn host_shuts(&mut self, flags: u32) {
        if self.host_shut | flags != self.host_shut {
            self.host_shut |= flags;
            self.owed.shutdown = self.host_shut;
        }
    }

    /// End the stream at once: a RESET is owed.
    pub fn abort(&mut self) {
        self.end_peer();
        if self.state != State::Gone {
            self.state = State::Ending;
        }
    }

    fn end_peer(&mut self) {
        self.peer.shutdown(Shutdown::Both);
        self.backlog = Vec::new();
        self.backlog_at = 0;
        self.deadline = None;
        self.readable = false;
    }

    /// Whether [`Connection::send`] might have a packet.
    pub fn has_mail(&self) -> bool {
        let owed = &self.owed;
        match self.state {
            State::Gone => false,
            State::Ending => true,
            State::Opening => owed.request,
            State::Open => {
                owed.response
                    || owed.shutdown != 0
                    || owed.credit_update
                    || (self.gives() && (self.credit() > 0 || !self.asked()))
            }
        }
    }

    fn gives(&self) -> bool {
        self.readable && self.host_shut & SHUTDOWN_SEND == 0
    }

    /// Whether the guest was asked for credit since it last had some.
    fn asked(&self) -> bool {
        self.asked_at == Some(self.sent)
    }

    /// The next packet for the guest, its data put into `room`; `None` if there is none.
    pub fn send(&mut self, room: &mut dyn Sink, now: Instant) -> Option<Header> {
        match self.state {
            State::Gone => return None,
            State::Ending => {
                self.state = State::Gone;
                return Some(self.packet(Op::Reset));
            }
            State::Opening => {
                return std::mem::take(&mut self.owed.request).then(|| self.packet(Op::Request));
            }
            State::Open => {}
        }
        if std::mem::take(&mut self.owed.response) {
            return Some(self.packet(Op::Response));
        }
        if self.gives() {
            let credit = self.credit();
            if credit > 0 {
                let limit = credit.min(room.room());
                match self.peer.give(room, limit) {
                    Ok(Given::Bytes(bytes)) => {
                        self.sent = self.sent.wrapping_add(bytes as u32);
                        // Backlog may have waited for the answers to go.
                        if self.peer.descriptor().is_none() && !self.backlog.is_empty() {
                            self.drain();
                        }
                        return Some(self.packet(Op::Data));
                    }
                    Ok(Given::Nothing) => self.readable = false,
                    Ok(Given::End) => {
                        // A service that has ended takes nothing either. Of a half-closed socket, a write will tell.
                        let over = self.hung_up
                            || self.peer.descriptor().is_none()
                            || self.guest_shut & SHUTDOWN_SEND != 0;
                        self.host_shuts(if over { SHUTDOWN_BOTH } else { SHUTDOWN_SEND });
                    }
                    Err(_) => self.host_shuts(SHUTDOWN_BOTH),
                }
            } else if !self.asked() {
                self.asked_at = Some(self.sent);
                return Some(self.packet(Op::CreditRequest));
            }
        }
        if std::mem::take(&mut self.owed.credit_update) {
            return Some(self.packet(Op::CreditUpdate));
        }
        if self.owed.shutdown != 0 {
            let flags = std::mem::take(&mut self.owed.shutdown);
            if flags == SHUTDOWN_BOTH {
                self.deadline.get_or_insert(now + CLOSE_TIMEOUT);
            }
            return Some(Header { flags: flags.into(), ..self.packet(Op::Shutdown) });
        }
        None
    }

    fn packet(&mut self, op: Op) -> Header {
        self.told = self.forwarded;
        self.owed.credit_update = false;
        Header {
            buf_alloc: self.buf_alloc.into(),
            fwd_cnt: self.forwarded.into(),
            ..self.key.packet(self.guest_cid, op)
        }
    }

    /// The other end of the host's socket is closed altogether: nothing will be taken any more.
    pub fn hang_up(&mut self) {
        if self.state == State::Opening {
            self.abort();
        } else {
            self.readable = true;
            self.hung_up = true;
        }
    }
}
