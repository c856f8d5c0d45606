//! The tmem wire protocol, as specified in `docs/protocol.md`.
//!
//! A connection carries frames: a fixed [`Header`] and a body. Nothing here does I/O or keeps state; decoders
//! check bounds before they use anything, because the other end may be a hostile guest.
//!
//! | module | holds |
//! |---|---|
//! | [`header`] | the frame header, operations, flags, frame-level error codes |
//! | [`hello`] | version, feature and limit negotiation |
//! | [`pages`] | put, get and flush batches and their answers |
//! | [`pools`] | creating a pool |
//! | [`control`] | host-to-guest notifications, pressure reports, statistics |

pub mod control;
pub mod header;
pub mod hello;
pub mod pages;
pub mod pools;

pub use control::{Notice, Report, Stats};
pub use header::{ErrorCode, Header, Op, HEADER_BYTES};
pub use hello::{Features, HelloAnswer, HelloRequest, Role};
pub use pages::{Encoding, FlushStatus, GetStatus, Key, ObjectId, PutStatus};
pub use pools::{PoolCreate, PoolKind};

/// Bytes in a page. Fixed: guests with other base page sizes are refused at HELLO.
pub const PAGE_BYTES: usize = 4096;
/// The vsock port (and hybrid-socket suffix) tmemd listens on: "tm" in ASCII.
pub const PORT: u32 = 0x746d;
/// The protocol version this crate speaks.
pub const VERSION: u8 = 1;
/// Most pages (or objects) one frame may carry.
pub const MAX_BATCH: usize = 256;
/// Most bytes a frame's body may have: a full batch of raw pages with their descriptors.
pub const MAX_BODY_BYTES: usize = MAX_BATCH * (PAGE_BYTES + pages::PUT_ENTRY_BYTES);

/// Why bytes from the peer are not a valid frame. Every variant ends the session: after one, the stream's framing
/// cannot be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The first four bytes of a header are not "TMEM".
    #[error("bad magic {0:#010x}, expected \"TMEM\"")]
    BadMagic(u32),
    /// The header's version is not one this crate speaks.
    #[error("protocol version {0} is not supported (this end speaks {VERSION})")]
    BadVersion(u8),
    /// The operation code is not known.
    #[error("unknown operation {0:#04x}")]
    UnknownOp(u8),
    /// The body is longer than [`MAX_BODY_BYTES`].
    #[error("body of {0} bytes is over the limit of {MAX_BODY_BYTES}")]
    BodyTooLong(u32),
    /// The batch is longer than [`MAX_BATCH`], or empty.
    #[error("batch of {0} entries; 1 to {MAX_BATCH} are allowed")]
    BadCount(u16),
    /// The body's length does not fit its operation and count.
    #[error("{op} body has {got} bytes, expected {expected}")]
    BadLength {
        /// Which body was being read.
        op: &'static str,
        /// Bytes the operation and count call for.
        expected: usize,
        /// Bytes that were there.
        got: usize,
    },
    /// A field holds a value the specification does not allow.
    #[error("{field} has the invalid value {value}")]
    BadValue {
        /// The field, in the specification's words.
        field: &'static str,
        /// What it held.
        value: u64,
    },
}

fn exact(op: &'static str, body: &[u8], expected: usize) -> Result<(), WireError> {
    if body.len() == expected {
        Ok(())
    } else {
        Err(WireError::BadLength { op, expected, got: body.len() })
    }
}
