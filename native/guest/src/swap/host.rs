//! A lane's end of a connection to the host: bytes in and out of the ring, never blocking.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use tmem_wire::{Header, Op, WireError, HEADER_BYTES};

use crate::link::LowWater;

use super::core::{Session, ANSWER_BYTES, OUT_BYTES};
use super::ring::{Ring, Source, Token};

/// Largest frame a lane takes from the host; announced in its HELLO.
pub(super) const FRAME_BYTES: usize = ANSWER_BYTES;
/// Tag of keep-alive pings; slots count from 0.
const PING_TAG: u32 = u32::MAX;

/// A connection that is ready to be used.
#[derive(Debug)]
pub(super) struct Connection {
    /// The socket, HELLO and pool behind it.
    pub(super) socket: OwnedFd,
    /// What the core needs to know.
    pub(super) session: Session,
    /// Most bytes for one `send()`.
    pub(super) write_bytes: Option<usize>,
    /// When its receiver is woken.
    pub(super) low_water: LowWater,
    /// The host wants to hear something this often; zero: it does not care.
    pub(super) keep_alive: Duration,
}

/// Why a connection is given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("tmemd closed it")]
    Closed,
    #[error("{0}")]
    Io(std::io::Error),
    #[error("tmemd broke the protocol: {0}")]
    Wire(#[from] WireError),
    #[error("{0}")]
    Answer(#[from] super::core::AnswerError),
    #[error("no answer for {0:?} with requests unanswered")]
    Silent(Duration),
}

/// The connection and its buffers, which are reused from one connection to the next.
#[allow(clippy::struct_excessive_bools)] // what is under way, each by itself
pub(super) struct Host {
    connection: Option<Connection>,
    /// Closed for both, waiting for the ring to give the buffers back.
    closing: Option<OwnedFd>,
    /// Requests on their way, and how much of them is sent; requests that follow them.
    out: [Vec<u8>; 2],
    filling: usize,
    sent: usize,
    sending: bool,
    /// What is being sent is all there is to send.
    sending_last: bool,
    receiving: bool,
    /// The kernel had no memory to tell of what comes, so it is to wait for it.
    look_first: bool,
    input: Input,
    last_sent: Instant,
    last_heard: Instant,
    pinged: bool,
}

impl Host {
    pub(super) fn new(now: Instant) -> Host {
        Host {
            connection: None,
            closing: None,
            out: [Vec::with_capacity(OUT_BYTES), Vec::with_capacity(OUT_BYTES)],
            filling: 0,
            sent: 0,
            sending: false,
            sending_last: false,
            receiving: false,
            look_first: false,
            input: Input { buffer: vec![0; FRAME_BYTES], start: 0, end: 0, lacking: 0 },
            last_sent: now,
            last_heard: now,
            pinged: false,
        }
    }

    /// The buffer that takes requests.
    pub(super) fn requests(&mut self) -> &mut Vec<u8> {
        &mut self.out[self.filling]
    }

    /// Whether a new connection can be taken.
    pub(super) fn is_vacant(&self) -> bool {
        self.connection.is_none() && self.closing.is_none()
    }

    /// Use this connection.
    pub(super) fn adopt(&mut self, connection: Connection, ring: &mut Ring, now: Instant) {
        debug_assert!(self.is_vacant());
        for out in &mut self.out {
            out.clear();
        }
        (self.sent, self.pinged) = (0, false);
        (self.input.end, self.input.lacking) = (0, 0);
        (self.last_sent, self.last_heard) = (now, now);
        self.connection = Some(connection);
        self.receive(ring);
    }

    /// Give the connection up. Buffers come back through the ring.
    pub(super) fn drop_connection(&mut self) {
        if let Some(connection) = self.connection.take() {
            // Ends what the ring still does with it. If it is closed already, so is that.
            let _ = rustix::net::shutdown(&connection.socket, rustix::net::Shutdown::Both);
            self.closing = Some(connection.socket);
            self.close();
        }
    }

    fn close(&mut self) {
        if !self.sending && !self.receiving {
            self.closing = None;
        }
    }

    fn receive(&mut self, ring: &mut Ring) {
        let Some(connection) = &mut self.connection else { return };
        let socket = connection.socket.as_raw_fd();
        // If that fails the socket is of no use, and receiving says so.
        let _ = connection.low_water.set(&connection.socket, self.input.lacking);
        let space = &mut self.input.buffer[self.input.end..];
        // SAFETY: `input` is neither moved nor resized, and its tail is used again only after the completion.
        unsafe { ring.receive(socket, space, self.look_first, Token::new(Source::Receive, 0)) };
        self.receiving = true;
    }

    /// Send what was written and is not on its way yet.
    pub(super) fn send(&mut self, ring: &mut Ring, now: Instant) {
        let Some(connection) = &self.connection else { return };
        if self.sending {
            return;
        }
        if self.sent == self.out[1 - self.filling].len() {
            self.out[1 - self.filling].clear();
            self.sent = 0;
            self.filling = 1 - self.filling;
        }
        let rest = &self.out[1 - self.filling][self.sent..];
        if rest.is_empty() {
            return;
        }
        let bytes = rest.len().min(connection.write_bytes.unwrap_or(usize::MAX));
        let entry = opcode::Send::new(types::Fd(connection.socket.as_raw_fd()), rest.as_ptr(), bytes as u32)
            .flags(libc::MSG_NOSIGNAL);
        // SAFETY: this buffer is not the one being filled; it is cleared only after its last completion.
        unsafe { ring.push(entry.build(), Token::new(Source::Send, 0)) };
        self.sending = true;
        self.sending_last = bytes == rest.len() && self.out[self.filling].is_empty();
        self.last_sent = now;
    }

    /// Whether a send is under way after which there is nothing more to send.
    pub(super) fn is_sending_last(&self) -> bool {
        self.sending && self.sending_last
    }

    /// A send is over.
    pub(super) fn was_sent(&mut self, result: i32) -> Result<(), Broken> {
        self.sending = false;
        if self.connection.is_none() {
            self.close();
            return Ok(());
        }
        self.sent += bytes(result)?;
        Ok(())
    }

    /// A receive is over; the input so far is lent out, to be given back with [`Host::give_back`]. `None` if the
    /// connection was given up meanwhile.
    pub(super) fn received(&mut self, result: i32, now: Instant) -> Result<Option<Input>, Broken> {
        self.receiving = false;
        if self.connection.is_none() {
            self.close();
            return Ok(None);
        }
        self.look_first = result == -libc::EAGAIN;
        let got = if self.look_first { 0 } else { bytes(result)? };
        if got > 0 {
            self.last_heard = now;
        } else if !self.look_first {
            return Err(Broken::Closed);
        }
        let mut input = std::mem::take(&mut self.input);
        input.end += got;
        Ok(Some(input))
    }

    /// Return the input, from which whole frames were taken, and wait for more.
    pub(super) fn give_back(&mut self, mut input: Input, ring: &mut Ring) {
        input.buffer.copy_within(input.start..input.end, 0);
        input.end -= input.start;
        input.start = 0;
        self.input = input;
        if self.connection.is_some() {
            self.receive(ring);
        }
    }

    /// Whether a frame is an answer for the core. Notices are for the control connection; here they are not heeded.
    pub(super) fn is_for_core(&mut self, header: &Header) -> bool {
        if header.op == Op::Ping && header.tag == PING_TAG {
            self.pinged = false;
            return false;
        }
        header.is_answer()
    }

    /// Ping a host that wants to hear something, and notice one that is silent for `patience`.
    pub(super) fn keep_alive(
        &mut self,
        in_flight: usize,
        patience: Duration,
        now: Instant,
    ) -> Result<(), Broken> {
        let Some(connection) = &self.connection else { return Ok(()) };
        let keep_alive = connection.keep_alive;
        let quiet = now.duration_since(self.last_sent);
        if in_flight == 0 && !self.pinged {
            self.last_heard = now;
        } else if now.duration_since(self.last_heard) > patience {
            return Err(Broken::Silent(patience));
        }
        if !keep_alive.is_zero() && !self.pinged && in_flight == 0 && quiet >= keep_alive {
            Header::request(Op::Ping, PING_TAG).write_frame(&[], self.requests());
            self.pinged = true;
        }
        Ok(())
    }
}

/// Bytes from the host; whole frames are taken from the start.
#[derive(Debug, Default)]
pub(super) struct Input {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// What the frame that has begun still lacks, as far as is known.
    lacking: usize,
}

impl Input {
    /// The next whole frame, if there is one.
    pub(super) fn frame(&mut self) -> Result<Option<(Header, &[u8])>, Broken> {
        self.lacking = 0;
        let Some(head) = self.buffer[self.start..self.end].first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::decode(head)?;
        let body = self.start + HEADER_BYTES;
        let next = body + header.length as usize;
        if next - self.start > FRAME_BYTES {
            return Err(WireError::BodyTooLong(header.length).into());
        }
        if next > self.end {
            self.lacking = next - self.end;
            return Ok(None);
        }
        self.start = next;
        Ok(Some((header, &self.buffer[body..next])))
    }
}

fn bytes(result: i32) -> Result<usize, Broken> {
    usize::try_from(result).map_err(|_| Broken::Io(std::io::Error::from_raw_os_error(-result)))
}
