//! What a guest's stream ends in: a unix socket of the host, or a service of this process.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::packet::{Sink, Source};

/// The host's end of one stream. Nothing here blocks.
pub trait Peer: Send {
    /// Take data the guest sent, as much as there is room for; 0 if there is none now.
    ///
    /// # Errors
    /// The stream is broken towards the host: no more data can be taken, ever.
    fn take(&mut self, data: &mut dyn Source) -> io::Result<usize>;

    /// Put up to `limit` bytes for the guest into `room`.
    ///
    /// # Errors
    /// The stream is broken towards the guest.
    fn give(&mut self, room: &mut dyn Sink, limit: usize) -> io::Result<Given>;

    /// The guest has agreed to a stream the host asked for; `host_port` is the host's end of it.
    ///
    /// # Errors
    /// The host is gone.
    fn opened(&mut self, host_port: u32) -> io::Result<()>;

    /// The guest will send (`Write`) or take (`Read`) no more.
    fn shutdown(&mut self, how: Shutdown);

    /// The descriptor whose readiness says when to try again, if there is one.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;

    /// Another thread has something for this peer, or its [`Peer::deadline`] has come. Returns whether there is
    /// something to give.
    fn wake(&mut self, now: Instant) -> bool;

    /// When [`Peer::wake`] is to be called even if nothing happens.
    fn deadline(&self) -> Option<Instant>;
}

/// What [`Peer::give`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Given {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// Nothing ever again.
    End,
}

/// A unix socket.
pub struct Stream {
    socket: UnixStream,
}

impl Stream {
    /// Take over a connected socket.
    ///
    /// # Errors
    /// It cannot be made non-blocking.
    pub fn new(socket: UnixStream) -> io::Result<Stream> {
        socket.set_nonblocking(true)?;
        Ok(Stream { socket })
    }
}

impl Peer for Stream {
    fn take(&mut self, data: &mut dyn Source) -> io::Result<usize> {
        let mut taken = 0;
        while data.remaining() > 0 {
            match data.write_to(&self.socket) {
                Ok(0) => break,
                Ok(bytes) => taken += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(taken)
    }

    fn give(&mut self, room: &mut dyn Sink, limit: usize) -> io::Result<Given> {
        match room.read_from(&self.socket, limit) {
            Ok(0) => Ok(Given::End),
            Ok(bytes) => Ok(Given::Bytes(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Given::Nothing),
            Err(error) => Err(error),
        }
    }

    fn opened(&mut self, host_port: u32) -> io::Result<()> {
        // The convention of hybrid sockets. Nothing was written before, so the socket takes a line whole.
        io::Write::write_all(&mut &self.socket, format!("OK {host_port}\n").as_bytes())
    }

    fn shutdown(&mut self, how: Shutdown) {
        // Fails only if the other end is gone, which reading will tell.
        let _ = self.socket.shutdown(how);
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }

    fn wake(&mut self, _now: Instant) -> bool {
        false
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }
}

/// What a service made of its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Step {
    /// Bytes of input used up; the rest is presented again, with what has arrived since.
    pub consumed: usize,
    /// Call again no later than this from now, with or without more input.
    pub again_in: Option<Duration>,
    /// The service has ended: give the guest what was answered, then close.
    pub closed: bool,
}

/// One stream's end inside this process, without I/O of its own.
pub trait Service: Send {
    /// Work on `input`, whose last `fresh` bytes are new; append answers to `out`. Called with whatever is there, also
    /// with nothing new when the service asked to be woken. It must bound what it appends: it is called again once the
    /// guest has taken that.
    fn feed(&mut self, input: &[u8], fresh: usize, out: &mut Vec<u8>) -> Step;

    /// Most bytes of input to hold for it now; at least one byte more than it has left unused.
    fn max_input_bytes(&self) -> usize;

    /// The guest has taken some of the answers.
    fn taken(&mut self) {}

    /// Nothing is held in the buffers. Returns whether they are to be freed.
    fn idle(&mut self) -> bool {
        false
    }
}

/// The service gets no more input while this many bytes of answers wait for the guest.
const MAX_OUT_BYTES: usize = crate::limits::OUT_HIGH_WATER;

/// A service as a peer: its buffers, and nothing else.
pub struct Local {
    service: Box<dyn Service>,
    input: Vec<u8>,
    /// Bytes of `input` already used up.
    used: usize,
    out: Vec<u8>,
    /// Bytes of `out` the guest has been given.
    given: usize,
    again_at: Option<Instant>,
    /// The service has ended.
    closed: bool,
    /// The guest sends no more.
    ended: bool,
}

impl Local {
    /// A stream that ends in `service`.
    pub fn new(service: Box<dyn Service>) -> Local {
        Local {
            service,
            input: Vec::new(),
            used: 0,
            out: Vec::new(),
            given: 0,
            again_at: None,
            closed: false,
            ended: false,
        }
    }

    /// Let the service work until it wants more input or has answered enough.
    fn run(&mut self, fresh: usize) {
        if !self.closed && self.out.len() < MAX_OUT_BYTES {
            let step = self.service.feed(&self.input[self.used..], fresh, &mut self.out);
            self.used += step.consumed.min(self.input.len() - self.used);
            self.closed = step.closed;
            self.again_at = step.again_in.map(|wait| Instant::now() + wait);
        }
        if self.used == self.input.len() || self.closed {
            self.input.clear();
            self.used = 0;
        }
        if self.input.is_empty() && self.out.is_empty() && self.service.idle() {
            self.input = Vec::new();
            self.out = Vec::new();
        }
    }
}

impl Peer for Local {
    fn take(&mut self, data: &mut dyn Source) -> io::Result<usize> {
        if self.closed {
            // As a socket would: what is sent to a closed service is lost.
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut taken = 0;
        loop {
            let held = self.input.len() - self.used;
            let bytes = data.remaining().min(self.service.max_input_bytes().saturating_sub(held));
            if bytes == 0 {
                return Ok(taken);
            }
            if self.used > 0 && self.input.len() + bytes > self.input.capacity() {
                self.input.drain(..self.used);
                self.used = 0;
            }
            let start = self.input.len();
            self.input.resize(start + bytes, 0);
            data.copy_to(&mut self.input[start..]);
            taken += bytes;
            self.run(bytes);
            if self.closed {
                return Ok(taken);
            }
        }
    }

    fn give(&mut self, room: &mut dyn Sink, limit: usize) -> io::Result<Given> {
        if self.given == self.out.len() {
            return Ok(if self.closed || self.ended { Given::End } else { Given::Nothing });
        }
        let bytes = limit.min(room.room()).min(self.out.len() - self.given);
        room.put(&self.out[self.given..self.given + bytes]);
        self.given += bytes;
        self.service.taken();
        if self.given == self.out.len() {
            self.out.clear();
            self.given = 0;
            // What was held back while answers waited can go on now.
            if self.used < self.input.len() {
                self.run(0);
            }
        }
        Ok(Given::Bytes(bytes))
    }

    fn opened(&mut self, _host_port: u32) -> io::Result<()> {
        Ok(())
    }

    fn shutdown(&mut self, how: Shutdown) {
        // Whole requests are answered already, or will be as `give` makes room; one cut short by the end is none.
        self.ended |= how != Shutdown::Read;
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn wake(&mut self, _now: Instant) -> bool {
        self.again_at = None;
        self.run(0);
        self.closed || self.ended || self.given < self.out.len()
    }

    fn deadline(&self) -> Option<Instant> {
        self.again_at
    }
}
