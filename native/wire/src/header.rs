//! The frame header: 24 bytes before every body, in both directions.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{WireError, MAX_BATCH, MAX_BODY_BYTES, VERSION};

/// Size of [`Header`] on the wire.
pub const HEADER_BYTES: usize = 24;
/// "TMEM" as it stands in the stream.
pub const MAGIC: u32 = u32::from_le_bytes(*b"TMEM");
/// Header flag: this frame answers the request that carried the same tag.
pub const FLAG_ANSWER: u16 = 1;
/// Header flag on PUT requests and GET answers: entries carry page checksums.
pub const FLAG_CHECKSUMS: u16 = 2;
/// Header flag on GET requests: the guest takes LZ4 payloads as they are stored.
pub const FLAG_ACCEPT_LZ4: u16 = 4;

macro_rules! ops {
    ($($(#[$doc:meta])* $name:ident = $value:literal,)*) => {
        /// What a frame asks for or tells.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Op { $($(#[$doc])* $name = $value,)* }

        impl Op {
            /// Every operation, for tables and tests.
            pub const ALL: &'static [Op] = &[$(Op::$name),*];

            /// The operation with this code.
            pub fn from_code(code: u8) -> Option<Op> {
                match code { $($value => Some(Op::$name),)* _ => None }
            }
        }
    };
}

ops! {
    /// First frame of a connection, both ways.
    Hello = 0x01,
    /// Keep-alive; answered with an empty body.
    Ping = 0x02,
    /// Ask for the VM's statistics.
    Stats = 0x03,
    /// Guest to host on the control connection: memory pressure and counters.
    Report = 0x04,
    /// Create a pool, or re-attach to the one of the same name.
    PoolCreate = 0x10,
    /// Destroy a pool and everything in it.
    PoolDestroy = 0x11,
    /// Store pages.
    Put = 0x20,
    /// Fetch pages.
    Get = 0x21,
    /// Forget pages.
    FlushPage = 0x22,
    /// Forget every page of objects.
    FlushObject = 0x23,
    /// Forget every page of a pool.
    FlushPool = 0x24,
    /// Host to guest: give this many persistent pages back.
    Reclaim = 0x40,
    /// Host to guest: the quota changed.
    Quota = 0x41,
    /// Host to guest: the VM was frozen or thawed.
    Frozen = 0x42,
    /// Host to guest: the daemon drains; reconnect later.
    Shutdown = 0x43,
}

/// Frame-level failure of one request; the answer's body is a short UTF-8 message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum ErrorCode {
    /// Not an error.
    Ok = 0,
    /// The frame broke the protocol; the host closes the connection after this answer.
    Protocol = 1,
    /// No such pool in this session's VM.
    NoSuchPool = 2,
    /// A limit (pools, connections, batch, in flight) was exceeded.
    Limit = 3,
    /// The guest may not do this (a shared pool without a grant).
    Denied = 4,
    /// No common protocol version, or a page size the host does not store.
    Unsupported = 5,
    /// A pool of that name exists with other properties.
    Conflict = 6,
    /// The host is draining and takes no new work.
    ShuttingDown = 7,
    /// The host failed; the operation may be tried again.
    Internal = 8,
}

impl ErrorCode {
    /// The error with this code; unknown codes read as [`ErrorCode::Internal`].
    pub fn from_code(code: u16) -> ErrorCode {
        match code {
            0 => Self::Ok,
            1 => Self::Protocol,
            2 => Self::NoSuchPool,
            3 => Self::Limit,
            4 => Self::Denied,
            5 => Self::Unsupported,
            6 => Self::Conflict,
            7 => Self::ShuttingDown,
            _ => Self::Internal,
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: u8,
    op: u8,
    flags: U16,
    tag: U32,
    pool: U32,
    length: U32,
    count: U16,
    status: U16,
}

/// A checked frame header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The operation.
    pub op: Op,
    /// `FLAG_*` bits.
    pub flags: u16,
    /// Chosen by the requester, repeated in the answer. Notices carry 0.
    pub tag: u32,
    /// The pool the frame is about, or 0.
    pub pool: u32,
    /// Bytes of body that follow.
    pub length: u32,
    /// Entries in the body.
    pub count: u16,
    /// In answers, an [`ErrorCode`]; 0 in requests.
    pub status: u16,
}

impl Header {
    /// A request header with no pool, entries or body yet.
    pub fn request(op: Op, tag: u32) -> Header {
        Header { op, flags: 0, tag, pool: 0, length: 0, count: 0, status: 0 }
    }

    /// The header of a successful, so far empty answer to `self`.
    #[must_use]
    pub fn answer(&self) -> Header {
        Header { flags: FLAG_ANSWER, length: 0, count: 0, status: 0, ..*self }
    }

    /// Whether this frame answers a request.
    pub fn is_answer(&self) -> bool {
        self.flags & FLAG_ANSWER != 0
    }

    /// Read a header. Checks magic, version, operation and the limits on length and count, so that a caller may
    /// allocate for the body without further thought.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, WireError> {
        let raw = zerocopy::transmute_ref!(bytes);
        let RawHeader { magic, version, op, flags, tag, pool, length, count, status } = raw;
        if magic.get() != MAGIC {
            return Err(WireError::BadMagic(magic.get()));
        }
        if *version != VERSION {
            return Err(WireError::BadVersion(*version));
        }
        let op = Op::from_code(*op).ok_or(WireError::UnknownOp(*op))?;
        if length.get() as usize > MAX_BODY_BYTES {
            return Err(WireError::BodyTooLong(length.get()));
        }
        if count.get() as usize > MAX_BATCH {
            return Err(WireError::BadCount(count.get()));
        }
        Ok(Header {
            op,
            flags: flags.get(),
            tag: tag.get(),
            pool: pool.get(),
            length: length.get(),
            count: count.get(),
            status: status.get(),
        })
    }

    /// The header as it stands on the wire.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        zerocopy::transmute!(RawHeader {
            magic: MAGIC.into(),
            version: VERSION,
            op: self.op as u8,
            flags: self.flags.into(),
            tag: self.tag.into(),
            pool: self.pool.into(),
            length: self.length.into(),
            count: self.count.into(),
            status: self.status.into(),
        })
    }

    /// Append a whole frame whose body is at hand.
    pub fn write_frame(&self, body: &[u8], out: &mut Vec<u8>) {
        debug_assert!(body.len() <= MAX_BODY_BYTES);
        let header = Header { length: body.len() as u32, ..*self };
        out.extend_from_slice(&header.encode());
        out.extend_from_slice(body);
    }
}
