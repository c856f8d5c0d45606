//! One connection of an NBD device: the transmission phase of the NBD protocol, simple replies only.
//!
//! Specification: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>. The other end is the kernel,
//! or any NBD client that came through [`handshake`].
//!
//! | module | holds |
//! |---|---|
//! | [`device`] | making, recovering and removing devices of this guest's kernel |
//! | [`handshake`] | the beginning of the protocol, for clients that are not the kernel |

pub(in crate::swap) mod device;
pub(in crate::swap) mod handshake;

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{opcode, types};
use tmem_wire::PAGE_BYTES;

use super::{Context, Event, Front};
use crate::swap::core::{Kind, Request, MAX_PAGES};
use crate::swap::ring::{Source, Token};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const REQUEST_BYTES: usize = 28;
const REPLY_BYTES: usize = 16;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
/// Token slots of this front end's own operations.
const RECEIVE: u16 = 0;
const REPLY: u16 = 1;

/// Transmission flags: flush, trim, write-zeroes, and several connections that see each other's writes.
pub(in crate::swap) const FLAGS: u16 = 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    Other,
}

#[derive(Debug, Clone, Copy)]
struct Header {
    command: Command,
    cookie: [u8; 8],
    offset: u64,
    length: u32,
}

impl Header {
    fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Header> {
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if word(0) != REQUEST_MAGIC {
            return None;
        }
        let command = match u16::from_be_bytes([bytes[6], bytes[7]]) {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            6 => Command::WriteZeroes,
            _ => Command::Other,
        };
        let mut cookie = [0; 8];
        cookie.copy_from_slice(&bytes[8..16]);
        let offset = u64::from(word(16)) << 32 | u64::from(word(20));
        Some(Header { command, cookie, offset, length: word(24) })
    }

    /// The core's request, if it is one that a device of so many pages can serve; else the error to answer.
    fn request(&self, pages: u32) -> Result<Request, u32> {
        let page_bytes = PAGE_BYTES as u64;
        let kind = match self.command {
            Command::Read => Kind::Read,
            Command::Write => Kind::Write,
            Command::Trim | Command::WriteZeroes => Kind::Discard,
            Command::Disconnect | Command::Flush | Command::Other => return Err(EINVAL),
        };
        let (offset, length) = (self.offset, u64::from(self.length));
        let aligned = offset % page_bytes == 0 && length % page_bytes == 0;
        let inside = offset.checked_add(length).is_some_and(|end| end <= u64::from(pages) * page_bytes);
        let small = kind == Kind::Discard || length <= (MAX_PAGES * PAGE_BYTES) as u64;
        if length == 0 || !aligned || !inside || !small {
            return Err(EINVAL);
        }
        Ok(Request { kind, first: (offset / page_bytes) as u32, pages: (length / page_bytes) as u32 })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiving {
    /// A request's header.
    Header,
    /// A write's data, into this slot.
    Data(usize),
    /// A write's data that nobody wants, into this slot; then this error is answered.
    Refuse(usize, u32),
    /// A header stands there, but no slot is free.
    Full,
    /// The peer is gone.
    Over,
}

#[derive(Debug, Clone, Copy, Default)]
struct Answer {
    cookie: [u8; 8],
    error: u32,
    /// Bytes of data after the header.
    data: usize,
}

/// One connection.
pub(in crate::swap) struct Nbd {
    socket: OwnedFd,
    depth: usize,
    used: Vec<bool>,
    answers: Vec<Answer>,
    state: Receiving,
    header: Box<[u8; REQUEST_BYTES]>,
    /// Bytes there of what is being received.
    got: usize,
    queue: VecDeque<usize>,
    /// The slot whose reply is being sent, the reply's header, and how much of both is sent.
    sending: Option<usize>,
    reply: Box<[u8; REPLY_BYTES]>,
    sent: usize,
}

impl Nbd {
    /// Serve this socket with `depth` slots.
    pub(in crate::swap) fn new(socket: OwnedFd, depth: usize) -> Nbd {
        Nbd {
            socket,
            depth,
            used: vec![false; depth],
            answers: vec![Answer::default(); depth],
            state: Receiving::Header,
            header: Box::new([0; REQUEST_BYTES]),
            got: 0,
            queue: VecDeque::with_capacity(depth),
            sending: None,
            reply: Box::new([0; REPLY_BYTES]),
            sent: 0,
        }
    }

    fn take_slot(&mut self, header: &Header) -> Option<usize> {
        let slot = self.used.iter().position(|used| !used)?;
        self.used[slot] = true;
        self.answers[slot] = Answer { cookie: header.cookie, error: 0, data: 0 };
        Some(slot)
    }

    fn receive(&mut self, context: &mut Context<'_>) {
        let (to, bytes) = match self.state {
            Receiving::Header => (self.header.as_mut_ptr(), REQUEST_BYTES),
            Receiving::Data(slot) => (context.buffers.address(slot, 0), self.data_bytes()),
            // Data nobody wants overwrites itself.
            Receiving::Refuse(slot, _) => {
                let rest = (self.data_bytes() - self.got).min(MAX_PAGES * PAGE_BYTES);
                let to = context.buffers.address(slot, 0);
                let entry = opcode::Recv::new(types::Fd(self.socket.as_raw_fd()), to, rest as u32).build();
                // SAFETY: the slot is this front end's until it is answered.
                unsafe { context.ring.push(entry, Token::new(Source::Front, RECEIVE)) };
                return;
            }
            Receiving::Full | Receiving::Over => return,
        };
        let rest = (bytes - self.got) as u32;
        // SAFETY: `got` is less than the size of what `to` points at.
        let to = unsafe { to.add(self.got) };
        let entry = opcode::Recv::new(types::Fd(self.socket.as_raw_fd()), to, rest).flags(libc::MSG_WAITALL);
        // SAFETY: header and slot are not touched until the completion.
        unsafe { context.ring.push(entry.build(), Token::new(Source::Front, RECEIVE)) };
    }

    fn data_bytes(&self) -> usize {
        Header::decode(&self.header).map_or(0, |header| header.length as usize)
    }

    /// A header is complete: what comes next?
    fn parse(&mut self, context: &mut Context<'_>) -> Event {
        let Some(header) = Header::decode(&self.header) else {
            log::error!("nbd: the peer sent no NBD request; closing");
            return self.over();
        };
        if header.command == Command::Disconnect {
            return self.over();
        }
        let Some(slot) = self.take_slot(&header) else {
            self.state = Receiving::Full;
            return Event::Nothing;
        };
        self.got = 0;
        self.state = Receiving::Header;
        let request = header.request(context.pages);
        match (header.command, request) {
            // Nothing is held back that a flush could bring out.
            (Command::Flush, _) => self.queue.push_back(slot),
            (Command::Write, Ok(_)) => self.state = Receiving::Data(slot),
            (Command::Write, Err(error)) if header.length > 0 => self.state = Receiving::Refuse(slot, error),
            (_, Ok(request)) => {
                if request.kind == Kind::Read {
                    self.answers[slot].data = header.length as usize;
                }
                self.receive(context);
                return Event::Request(slot, request);
            }
            (_, Err(error)) => {
                self.answers[slot].error = error;
                self.queue.push_back(slot);
            }
        }
        self.receive(context);
        self.send(context);
        Event::Nothing
    }

    fn received(&mut self, context: &mut Context<'_>, result: i32) -> Event {
        let Ok(got @ 1..) = usize::try_from(result) else { return self.over() };
        self.got += got;
        match self.state {
            Receiving::Header if self.got == REQUEST_BYTES => return self.parse(context),
            Receiving::Data(slot) if self.got == self.data_bytes() => {
                self.got = 0;
                self.state = Receiving::Header;
                let request = Header::decode(&self.header).and_then(|h| h.request(context.pages).ok());
                self.receive(context);
                // It was decoded from the same bytes before.
                return request.map_or(Event::Nothing, |request| Event::Request(slot, request));
            }
            Receiving::Refuse(slot, error) if self.got == self.data_bytes() => {
                self.got = 0;
                self.state = Receiving::Header;
                self.answers[slot].error = error;
                self.queue.push_back(slot);
                self.send(context);
            }
            _ => {}
        }
        self.receive(context);
        Event::Nothing
    }

    fn over(&mut self) -> Event {
        self.state = Receiving::Over;
        // Whatever is still under way ends unheard.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        Event::Over
    }

    /// Send the next reply, or what is left of the present one.
    fn send(&mut self, context: &mut Context<'_>) {
        if self.sending.is_some() {
            return;
        }
        let Some(slot) = self.queue.pop_front() else { return };
        let Answer { cookie, error, .. } = self.answers[slot];
        self.reply[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
        self.reply[4..8].copy_from_slice(&error.to_be_bytes());
        self.reply[8..].copy_from_slice(&cookie);
        self.sending = Some(slot);
        self.sent = 0;
        self.send_part(context, slot);
    }

    fn send_part(&mut self, context: &mut Context<'_>, slot: usize) {
        let data = self.answers[slot].data;
        let (from, bytes, more) = if self.sent < REPLY_BYTES {
            (self.reply[self.sent..].as_ptr(), REPLY_BYTES - self.sent, data > 0)
        } else {
            let at = self.sent - REPLY_BYTES;
            // SAFETY: less than the reply's data, which fits the slot's buffer.
            (unsafe { context.buffers.address(slot, 0).add(at) }.cast_const(), data - at, false)
        };
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL | if more { libc::MSG_MORE } else { 0 };
        let entry = opcode::Send::new(types::Fd(self.socket.as_raw_fd()), from, bytes as u32).flags(flags);
        // SAFETY: the reply's header and the slot stay as they are until the reply is sent.
        unsafe { context.ring.push(entry.build(), Token::new(Source::Front, REPLY)) };
    }

    fn was_sent(&mut self, context: &mut Context<'_>, result: i32) -> Event {
        let (Some(slot), Ok(sent @ 1..)) = (self.sending, usize::try_from(result)) else {
            return self.over();
        };
        self.sent += sent;
        if self.sent < REPLY_BYTES + self.answers[slot].data {
            self.send_part(context, slot);
            return Event::Nothing;
        }
        self.sending = None;
        self.used[slot] = false;
        self.send(context);
        if self.state == Receiving::Full {
            return self.parse(context);
        }
        Event::Nothing
    }
}

impl Front for Nbd {
    fn start(&mut self, context: &mut Context<'_>) {
        debug_assert!(self.depth > 0);
        self.receive(context);
    }

    fn event(&mut self, context: &mut Context<'_>, completion: Option<(Token, i32)>) -> Event {
        match completion {
            Some((token, result)) if token.slot == RECEIVE => self.received(context, result),
            Some((_, result)) => self.was_sent(context, result),
            None => Event::Nothing,
        }
    }

    fn complete(&mut self, context: &mut Context<'_>, slot: usize, ok: bool) {
        if !ok {
            self.answers[slot].error = EIO;
            self.answers[slot].data = 0;
        }
        self.queue.push_back(slot);
        if self.state != Receiving::Over {
            self.send(context);
        }
    }
}
