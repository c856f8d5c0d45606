//! All streams of one VM: which packet belongs to which, whose turn it is, and how many there may be.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Instant;

use super::connection::{Connection, State};
use super::counters::{add, Counters};
use super::ledger::Ledger;
use super::packet::{Header, Key, Op, Sink, Source, HOST_CID, TYPE_STREAM};
use super::peer::Peer;

/// RESETs for streams that do not exist which may wait for the guest. When as many wait, the guest's packets do too.
const MAX_RESETS: usize = 64;
/// First host port given to streams the host opens; well-known ports lie below.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Opens the host's end of a stream a guest asks for.
pub trait Opener {
    /// What `port` leads to. `token` is what readiness events of the peer's descriptor will carry.
    ///
    /// # Errors
    /// Nothing is there, or the VM has too much open: the guest gets a RESET.
    fn open(&mut self, port: u32, token: u64) -> Result<Opened, Refused>;
}

/// The host's end of a new stream.
pub struct Opened {
    /// What it ends in.
    pub peer: Box<dyn Peer>,
    /// Bytes the guest may have under way.
    pub buf_alloc: u32,
}

/// A guest's request for a stream is turned down.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

struct Slot {
    generation: u32,
    connection: Option<Connection>,
}

/// The streams of a VM.
pub struct Streams {
    guest_cid: u64,
    max_connections: usize,
    slots: Vec<Slot>,
    free: Vec<usize>,
    by_key: HashMap<Key, usize>,
    /// Streams that may have something for the guest, each once.
    line: VecDeque<usize>,
    resets: VecDeque<Header>,
    next_host_port: u32,
    next_deadline: Option<Instant>,
    ledger: Option<Ledger>,
    counters: Arc<Counters>,
}

impl Streams {
    /// No streams yet.
    pub fn new(guest_cid: u64, max_connections: usize, counters: Arc<Counters>) -> Streams {
        Streams {
            guest_cid,
            max_connections,
            slots: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            line: VecDeque::new(),
            resets: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            next_deadline: None,
            ledger: None,
            counters,
        }
    }

    /// Note open streams in `ledger` from now on. Those noted there already are of a process that died: the guest is
    /// told that they are gone.
    pub fn keep_ledger(&mut self, mut ledger: Ledger) {
        for key in ledger.drain() {
            self.resets.push_back(key.packet(self.guest_cid, Op::Reset));
        }
        for (at, slot) in self.slots.iter().enumerate() {
            if let Some(connection) = &slot.connection {
                ledger.note(at, connection.key);
            }
        }
        self.ledger = Some(ledger);
    }

    /// Streams open now.
    pub fn count(&self) -> usize {
        self.by_key.len()
    }

    /// Whether another packet from the guest may be taken: each may cost one RESET.
    pub fn has_room(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Take in a packet from the guest.
    pub fn receive(&mut self, header: &Header, data: &mut dyn Source, opener: &mut dyn Opener, now: Instant) {
        add(&self.counters.packets_from_guest, 1);
        if header.src_cid.get() != self.guest_cid || header.dst_cid.get() != HOST_CID {
            // It speaks for another, or to another: there is nobody to answer.
            add(&self.counters.bad_packets, 1);
            return;
        }
        let operation = header.operation();
        if header.kind.get() != TYPE_STREAM || operation.is_none() {
            add(&self.counters.bad_packets, 1);
            self.refuse(header);
            return;
        }
        let key = header.key();
        match (self.by_key.get(&key).copied(), operation) {
            (None, Some(Op::Request)) => self.accept(header, opener),
            (None, Some(Op::Reset)) => {}
            (None, _) => self.refuse(header),
            (Some(at), operation) => {
                let Some(connection) = self.slots[at].connection.as_mut() else { return };
                if operation == Some(Op::Data) {
                    add(&self.counters.bytes_from_guest, data.remaining() as u64);
                }
                if let Err(violation) = connection.receive(header, data, now) {
                    add(&self.counters.violations, 1);
                    tracing::debug!(%violation, ?header, "a guest broke the vsock protocol");
                }
                self.settle(at);
            }
        }
    }

    fn accept(&mut self, request: &Header, opener: &mut dyn Opener) {
        let port = request.dst_port.get();
        let at = self.next_slot();
        let opened = match at {
            Some(at) => opener.open(port, self.token(at)),
            None => Err(Refused(format!("the VM has {} streams open", self.max_connections))),
        };
        match (opened, at) {
            (Ok(Opened { peer, buf_alloc }), Some(at)) => {
                let connection = Connection::accept(request, self.guest_cid, peer, buf_alloc);
                self.insert(at, connection);
            }
            (Err(refused), _) => {
                tracing::debug!(port, %refused, "a stream of a guest is refused");
                add(&self.counters.connections_refused, 1);
                self.refuse(request);
            }
            (Ok(_), None) => {}
        }
    }

    /// Ask the guest for a stream to `guest_port`. `make` is given the token that readiness events will carry.
    ///
    /// # Errors
    /// The VM has too many streams, or `make` fails.
    pub fn open(
        &mut self,
        guest_port: u32,
        buf_alloc: u32,
        now: Instant,
        make: impl FnOnce(u64) -> std::io::Result<Box<dyn Peer>>,
    ) -> Result<(), Refused> {
        let Some(at) = self.next_slot() else {
            add(&self.counters.connections_refused, 1);
            return Err(Refused(format!("the VM has {} streams open", self.max_connections)));
        };
        let mut key = Key { host_port: self.next_host_port, guest_port };
        while self.by_key.contains_key(&key) {
            key.host_port = key.host_port.wrapping_add(1).max(FIRST_HOST_PORT);
        }
        self.next_host_port = key.host_port.wrapping_add(1).max(FIRST_HOST_PORT);
        let peer = make(self.token(at)).map_err(|error| Refused(error.to_string()))?;
        self.insert(at, Connection::open(key, self.guest_cid, peer, buf_alloc, now));
        Ok(())
    }

    fn next_slot(&mut self) -> Option<usize> {
        if self.by_key.len() >= self.max_connections {
            return None;
        }
        if self.free.is_empty() {
            self.slots.push(Slot { generation: 0, connection: None });
            self.free.push(self.slots.len() - 1);
        }
        self.free.last().copied()
    }

    fn insert(&mut self, at: usize, connection: Connection) {
        let taken = self.free.pop();
        debug_assert_eq!(taken, Some(at), "nothing else opens between the two");
        self.by_key.insert(connection.key, at);
        if let Some(ledger) = &mut self.ledger {
            ledger.note(at, connection.key);
        }
        self.slots[at].connection = Some(connection);
        add(&self.counters.connections_opened, 1);
        self.counters.connections.store(self.by_key.len() as u64, Ordering::Relaxed);
        self.settle(at);
    }

    /// After anything happened to a stream: put it in line, note its deadline, or forget it.
    fn settle(&mut self, at: usize) {
        let Some(connection) = self.slots[at].connection.as_mut() else { return };
        if connection.state() == State::Gone {
            let key = connection.key;
            self.slots[at].connection = None;
            self.slots[at].generation = self.slots[at].generation.wrapping_add(1);
            self.free.push(at);
            self.by_key.remove(&key);
            if let Some(ledger) = &mut self.ledger {
                ledger.strike(at);
            }
            self.counters.connections.store(self.by_key.len() as u64, Ordering::Relaxed);
            return;
        }
        if let Some(deadline) = connection.deadline() {
            self.next_deadline = Some(self.next_deadline.map_or(deadline, |next| next.min(deadline)));
        }
        if connection.has_mail() && !connection.queued {
            connection.queued = true;
            self.line.push_back(at);
        }
    }

    fn refuse(&mut self, header: &Header) {
        if header.operation() != Some(Op::Reset) {
            let reset = header.key().packet(self.guest_cid, Op::Reset);
            self.resets.push_back(Header { kind: header.kind, ..reset });
        }
    }

    /// Whether [`Streams::send`] might have a packet.
    pub fn has_mail(&self) -> bool {
        !self.line.is_empty() || !self.resets.is_empty()
    }

    /// The next packet for the guest, its data put into `room`. Streams take turns packet by packet.
    pub fn send(&mut self, room: &mut dyn Sink, now: Instant) -> Option<Header> {
        let before = room.room();
        let header = self.next_packet(room, now)?;
        add(&self.counters.packets_to_guest, 1);
        add(&self.counters.bytes_to_guest, (before - room.room()) as u64);
        Some(header)
    }

    fn next_packet(&mut self, room: &mut dyn Sink, now: Instant) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(at) = self.line.pop_front() {
            let Some(connection) = self.slots[at].connection.as_mut() else { continue };
            connection.queued = false;
            let header = connection.send(room, now);
            self.settle(at);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    fn token(&self, at: usize) -> u64 {
        (u64::from(self.slots[at].generation) << 32) | at as u64
    }

    /// Readiness of a peer's descriptor.
    pub fn ready(&mut self, token: u64, readable: bool, writable: bool, hung_up: bool, now: Instant) {
        let at = (token & u64::from(u32::MAX)) as usize;
        let Some(slot) = self.slots.get_mut(at) else { return };
        let Some(connection) = slot.connection.as_mut() else { return };
        if slot.generation != (token >> 32) as u32 {
            // An event of the stream that was here before.
            return;
        }
        if hung_up {
            connection.hang_up();
        }
        if readable {
            connection.readable();
        }
        if writable {
            connection.writable(now);
        }
        self.settle(at);
    }

    /// Another thread woke services: see which of them have something.
    pub fn wake(&mut self, now: Instant) {
        for at in 0..self.slots.len() {
            if let Some(connection) = self.slots[at].connection.as_mut() {
                if connection.peer().descriptor().is_none() {
                    connection.wake(now);
                    self.settle(at);
                }
            }
        }
    }

    /// When [`Streams::tick`] is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.next_deadline
    }

    /// Do what has become due.
    pub fn tick(&mut self, now: Instant) {
        if self.next_deadline.is_none_or(|next| next > now) {
            return;
        }
        self.next_deadline = None;
        for at in 0..self.slots.len() {
            if let Some(connection) = self.slots[at].connection.as_mut() {
                if connection.deadline().is_some_and(|deadline| deadline <= now) {
                    connection.wake(now);
                }
                self.settle(at);
            }
        }
    }

    /// End all streams and tell the guest.
    pub fn abort_all(&mut self) {
        for at in 0..self.slots.len() {
            if let Some(connection) = self.slots[at].connection.as_mut() {
                connection.abort();
                self.settle(at);
            }
        }
    }

    /// Forget all streams without a word: the guest they led to is gone.
    pub fn clear(&mut self) {
        for slot in &mut self.slots {
            slot.connection = None;
            slot.generation = slot.generation.wrapping_add(1);
        }
        self.free = (0..self.slots.len()).rev().collect();
        self.by_key.clear();
        self.line.clear();
        self.resets.clear();
        self.next_deadline = None;
        if let Some(ledger) = &mut self.ledger {
            ledger.clear();
        }
        self.counters.connections.store(0, Ordering::Relaxed);
    }
}
