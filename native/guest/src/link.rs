//! A connection to tmemd: blocking frames over vsock or a unix socket, with HELLO behind it.
//!
//! [`Link`] is one connection, used by one thread at a time or [split](Link::split) into a [`LinkReader`] and a
//! [`LinkWriter`]. Buffers are allocated when it connects and never again, so that it can serve pages while the
//! guest has no memory to give. The caller builds requests with `tmem_wire`'s writers in a buffer of its own:
//!
//! ```text
//! let mut link = Link::connect(&endpoint, &hello(Role::FileCache, "tmem-guest fs")?, Duration::from_secs(5))?;
//! let pool = link.create_pool(&PoolCreate::private(kind, "cache0"))?;
//! let (mut reader, mut writer) = link.split()?;
//! write_keys(Op::Get, tag, pool, true, &keys, &mut out);
//! writer.send(&out)?;
//! let (header, body) = reader.recv("the answer to a get")?;
//! ```

mod backoff;
mod endpoint;
mod lowat;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use tmem_wire::{
    ErrorCode, Features, Header, HelloAnswer, HelloRequest, Op, PoolCreate, Role, WireError, HEADER_BYTES,
    MAX_BODY_BYTES, VERSION,
};

pub use backoff::Backoff;
pub use endpoint::{Address, Endpoint, VSOCK_WINDOW_BYTES, VSOCK_WRITE_BYTES};
pub use lowat::LowWater;

/// Why a link could not be made, or is of no use any more. After any of them the connection is dropped and made
/// anew; nothing is known about requests that were not answered.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The endpoint cannot be read.
    #[error("{0:?} is no endpoint: expected vsock:CID:PORT or unix:/path")]
    BadEndpoint(String),
    /// Nobody answers there.
    #[error("cannot connect to {endpoint}: {source}")]
    Connect {
        /// Where to.
        endpoint: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The other end is silent.
    #[error("no answer within {timeout:?} while waiting for {awaited}")]
    Timeout {
        /// What did not come.
        awaited: &'static str,
        /// How long it was waited for.
        timeout: Duration,
    },
    /// The other end closed.
    #[error("tmemd closed the connection while this end was waiting for {awaited}")]
    Closed {
        /// What did not come.
        awaited: &'static str,
    },
    /// The kernel failed.
    #[error("the connection failed while this end was waiting for {awaited}: {source}")]
    Io {
        /// What did not come.
        awaited: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The other end does not speak the protocol.
    #[error("tmemd broke the protocol: {0}")]
    Wire(#[from] WireError),
    /// The other end answered something else than what was asked.
    #[error("tmemd answered {got:?} to {asked:?}")]
    Unexpected {
        /// The request.
        asked: Op,
        /// The answer.
        got: Op,
    },
    /// The host refused the request.
    #[error("tmemd refused {op:?} ({code:?}): {message}")]
    Refused {
        /// The request.
        op: Op,
        /// Why, as a code.
        code: ErrorCode,
        /// Why, in the host's words.
        message: String,
    },
    /// The guest's kernel does not tell its boot id.
    #[error("cannot read the boot id from {BOOT_ID_PATH}: {0}")]
    BootId(io::Error),
}

const BOOT_ID_PATH: &str = "/proc/sys/kernel/random/boot_id";

/// The running kernel's boot id.
pub fn boot_id() -> Result<[u8; 16], LinkError> {
    let text = std::fs::read_to_string(BOOT_ID_PATH).map_err(LinkError::BootId)?;
    parse_uuid(text.trim()).ok_or_else(|| LinkError::BootId(io::Error::other("it is no UUID")))
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let mut id = [0; 16];
    let mut digits = text.bytes().filter(|&b| b != b'-').map(|b| (b as char).to_digit(16));
    for byte in &mut id {
        *byte = (digits.next()?? * 16 + digits.next()??) as u8;
    }
    digits.next().is_none().then_some(id)
}

/// A HELLO with everything this crate can do and this guest's boot id. `client` is for the host's logs.
pub fn hello(role: Role, client: &str) -> Result<HelloRequest, LinkError> {
    Ok(HelloRequest::new(role, boot_id()?).named(client))
}

/// A connection that said HELLO.
#[derive(Debug)]
pub struct Link {
    reader: LinkReader,
    writer: LinkWriter,
    limits: HelloAnswer,
}

impl Link {
    /// Connect and say HELLO. `timeout` bounds the connecting, the HELLO, and every later wait until
    /// [`Link::set_timeout`] says otherwise.
    pub fn connect(
        endpoint: &Endpoint,
        request: &HelloRequest,
        timeout: Duration,
    ) -> Result<Link, LinkError> {
        let failed = |source| LinkError::Connect { endpoint: endpoint.to_string(), source };
        let (domain, address) = match &endpoint.address {
            Address::Vsock { cid, port } => (Domain::VSOCK, SockAddr::vsock(*cid, *port)),
            Address::Unix(path) => (Domain::UNIX, SockAddr::unix(path).map_err(failed)?),
        };
        let socket = Socket::new(domain, Type::STREAM, None).map_err(failed)?;
        socket.connect_timeout(&address, timeout).map_err(failed)?;
        Link::over(socket, endpoint, request, timeout)
    }

    /// Say HELLO over a connected stream socket.
    pub fn over(
        socket: Socket,
        endpoint: &Endpoint,
        request: &HelloRequest,
        timeout: Duration,
    ) -> Result<Link, LinkError> {
        let io = |source| LinkError::Io { awaited: "a second descriptor of the connection", source };
        let writer = LinkWriter {
            socket: socket.try_clone().map_err(io)?,
            write_bytes: endpoint.write_bytes,
            timeout,
        };
        let capacity =
            (request.max_frame_bytes as usize).clamp(HEADER_BYTES + 64, HEADER_BYTES + MAX_BODY_BYTES);
        let low_water = LowWater::new(&endpoint.address);
        let reader = LinkReader { socket, buffer: vec![0; capacity], start: 0, end: 0, timeout, low_water };
        let unknown = HelloAnswer {
            version: VERSION,
            page_bytes: 0,
            features: Features(0),
            max_frame_bytes: 0,
            max_batch: 0,
            max_in_flight: 0,
            keep_alive_ms: 0,
            quota_bytes: 0,
        };
        let mut link = Link { reader, writer, limits: unknown };
        link.set_timeout(timeout)?;
        let (_, body) =
            link.call(&Header::request(Op::Hello, 0), &request.encode(), "the answer to HELLO")?;
        link.limits = HelloAnswer::decode(body)?;
        Ok(link)
    }

    /// What the host allows and can do.
    pub fn limits(&self) -> &HelloAnswer {
        &self.limits
    }

    /// Bound every later wait. Zero waits for ever.
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<(), LinkError> {
        self.reader.set_timeout(timeout)?;
        self.writer.set_timeout(timeout)
    }

    /// Send one request and wait for its answer. Only for a link with nothing else in flight. Notices from the
    /// host that come in between are dropped.
    pub fn call(
        &mut self,
        header: &Header,
        body: &[u8],
        awaited: &'static str,
    ) -> Result<(Header, &[u8]), LinkError> {
        let mut frame = Vec::with_capacity(HEADER_BYTES + body.len());
        header.write_frame(body, &mut frame);
        self.call_frame(&frame, header.op, awaited)
    }

    /// Send one request that was built with a writer of `tmem_wire` and wait for its answer, as [`Link::call`].
    pub fn call_frame(
        &mut self,
        frame: &[u8],
        op: Op,
        awaited: &'static str,
    ) -> Result<(Header, &[u8]), LinkError> {
        self.writer.send(frame)?;
        let answer = loop {
            let answer = self.reader.next(awaited)?;
            if answer.is_answer() {
                break answer;
            }
            self.reader.body(&answer);
        };
        let body = self.reader.body(&answer);
        if answer.op != op {
            return Err(LinkError::Unexpected { asked: op, got: answer.op });
        }
        check(&answer, body)?;
        Ok((answer, body))
    }

    /// Create a pool, or attach to the one of that name, and tell its id.
    pub fn create_pool(&mut self, spec: &PoolCreate) -> Result<u32, LinkError> {
        let request = Header::request(Op::PoolCreate, 0);
        let (answer, _) = self.call(&request, &spec.encode(), "the answer to POOL_CREATE")?;
        Ok(answer.pool)
    }

    /// Keep-alive: one empty round trip.
    pub fn ping(&mut self) -> Result<(), LinkError> {
        self.call(&Header::request(Op::Ping, 0), &[], "the answer to PING").map(|_| ())
    }

    /// The two halves, for one thread each. [`LinkWriter::shut_down`] wakes the other half.
    pub fn split(self) -> (LinkReader, LinkWriter) {
        (self.reader, self.writer)
    }

    /// The bare socket without timeouts, for an event loop of one's own, and when its receiver is woken. Bytes the
    /// host sent already would be lost, so nothing may be in flight.
    pub fn into_socket(mut self) -> Result<(OwnedFd, LowWater), LinkError> {
        // An event loop that ever falls back to a blocking call would take a timeout for a broken connection.
        self.set_timeout(Duration::ZERO)?;
        Ok((self.reader.socket.into(), self.reader.low_water))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.socket.as_fd()
    }
}

/// Turn an answer's frame-level failure into an error.
pub fn check(answer: &Header, body: &[u8]) -> Result<(), LinkError> {
    match ErrorCode::from_code(answer.status) {
        ErrorCode::Ok => Ok(()),
        code => Err(LinkError::Refused {
            op: answer.op,
            code,
            message: String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned(),
        }),
    }
}

/// The receiving half. Its buffer holds the largest frame the HELLO allowed the host to send.
#[derive(Debug)]
pub struct LinkReader {
    socket: Socket,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    timeout: Duration,
    low_water: LowWater,
}

impl LinkReader {
    /// Wait for the next frame. The body stays valid until the next call. `awaited` names what is being waited for
    /// in errors.
    pub fn recv(&mut self, awaited: &'static str) -> Result<(Header, &[u8]), LinkError> {
        let header = self.next(awaited)?;
        let body = self.body(&header);
        Ok((header, body))
    }

    /// Bound later waits. Zero waits for ever.
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<(), LinkError> {
        self.timeout = timeout;
        let bound = (!timeout.is_zero()).then_some(timeout);
        self.socket
            .set_read_timeout(bound)
            .map_err(|source| LinkError::Io { awaited: "a receive timeout", source })
    }

    /// Wait until a whole frame stands in the buffer and read its header.
    fn next(&mut self, awaited: &'static str) -> Result<Header, LinkError> {
        self.fill(HEADER_BYTES, awaited)?;
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(&self.buffer[self.start..self.start + HEADER_BYTES]);
        let header = Header::decode(&bytes)?;
        let whole = HEADER_BYTES + header.length as usize;
        if whole > self.buffer.len() {
            return Err(WireError::BodyTooLong(header.length).into());
        }
        self.fill(whole, awaited)?;
        Ok(header)
    }

    /// Take the frame that [`LinkReader::next`] found out of the buffer.
    fn body(&mut self, header: &Header) -> &[u8] {
        let from = self.start + HEADER_BYTES;
        self.start = from + header.length as usize;
        &self.buffer[from..self.start]
    }

    fn fill(&mut self, wanted: usize, awaited: &'static str) -> Result<(), LinkError> {
        if self.start == self.end {
            // So that of a buffer for large frames, small ones use the beginning only.
            (self.start, self.end) = (0, 0);
        }
        if self.start + wanted > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        while self.end - self.start < wanted {
            let lacking = wanted - (self.end - self.start);
            self.low_water
                .set(&self.socket, lacking)
                .map_err(|errno| LinkError::Io { awaited, source: errno.into() })?;
            match rustix::net::recv(
                &self.socket,
                &mut self.buffer[self.end..],
                rustix::net::RecvFlags::empty(),
            ) {
                Ok((0, _)) => return Err(LinkError::Closed { awaited }),
                Ok((got, _)) => self.end += got,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    return Err(LinkError::Timeout { awaited, timeout: self.timeout })
                }
                Err(errno) => return Err(LinkError::Io { awaited, source: errno.into() }),
            }
        }
        Ok(())
    }
}

/// The sending half.
#[derive(Debug)]
pub struct LinkWriter {
    socket: Socket,
    write_bytes: Option<usize>,
    timeout: Duration,
}

impl LinkWriter {
    /// Send whole frames. After an error some of their bytes may be on their way: the link is of no more use.
    pub fn send(&mut self, frames: &[u8]) -> Result<(), LinkError> {
        const AWAITED: &str = "room to send a request";
        let mut rest = frames;
        while !rest.is_empty() {
            let part = &rest[..rest.len().min(self.write_bytes.unwrap_or(usize::MAX))];
            match rustix::net::send(&self.socket, part, rustix::net::SendFlags::NOSIGNAL) {
                Ok(sent) => rest = &rest[sent..],
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    return Err(LinkError::Timeout { awaited: AWAITED, timeout: self.timeout })
                }
                Err(errno) => return Err(LinkError::Io { awaited: AWAITED, source: errno.into() }),
            }
        }
        Ok(())
    }

    /// Bound later waits. Zero waits for ever.
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<(), LinkError> {
        self.timeout = timeout;
        let bound = (!timeout.is_zero()).then_some(timeout);
        self.socket
            .set_write_timeout(bound)
            .map_err(|source| LinkError::Io { awaited: "a send timeout", source })
    }

    /// Close the connection for both halves; a reader that waits sees [`LinkError::Closed`].
    pub fn shut_down(&self) {
        // A connection that is gone already needs no shutting down.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests;
