//! Creating a pool. Destroying and flushing one need no body: the header names the pool.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{exact, WireError};

/// What the host promises for the pages of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PoolKind {
    /// The host may drop any page at any moment.
    Ephemeral {
        /// A get removes the page: the guest holds it now.
        exclusive: bool,
    },
    /// An accepted page stays until flushed.
    Persistent,
}

const FLAG_EXCLUSIVE: u8 = 1;
const FLAG_SHARED: u8 = 2;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    kind: u8,
    flags: u8,
    reserved: [u8; 6],
    uuid: [u8; 16],
    name: [u8; 32],
}

/// Bytes of a `POOL_CREATE` request's body. The answer has no body; its header names the pool.
pub const REQUEST_BYTES: usize = 56;

/// A request for a pool. Repeating it with the same name in the same boot gives the same pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolCreate {
    /// Ephemeral or persistent.
    pub kind: PoolKind,
    /// Join the shared pool of this UUID (needs an administrator's grant); `None` for a private pool.
    pub shared: Option<[u8; 16]>,
    /// The guest's name for the pool, printable ASCII padded with NUL; unique within the VM.
    pub name: [u8; 32],
}

impl PoolCreate {
    /// A request for a private pool. Names are cut at 32 bytes.
    pub fn private(kind: PoolKind, name: &str) -> PoolCreate {
        let mut padded = [0; 32];
        for (to, from) in padded.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        PoolCreate { kind, shared: None, name: padded }
    }

    /// Read the body of a `POOL_CREATE` request.
    pub fn decode(body: &[u8]) -> Result<PoolCreate, WireError> {
        exact("POOL_CREATE", body, REQUEST_BYTES)?;
        let raw = Raw::ref_from_bytes(body).map_err(|_| WireError::BadLength {
            op: "POOL_CREATE",
            expected: REQUEST_BYTES,
            got: body.len(),
        })?;
        if raw.flags & !(FLAG_EXCLUSIVE | FLAG_SHARED) != 0 {
            return Err(WireError::BadValue { field: "pool flags", value: raw.flags.into() });
        }
        let exclusive = raw.flags & FLAG_EXCLUSIVE != 0;
        let kind = match raw.kind {
            0 => PoolKind::Ephemeral { exclusive },
            1 if !exclusive => PoolKind::Persistent,
            other => return Err(WireError::BadValue { field: "pool kind", value: other.into() }),
        };
        if raw.name[0] == 0 || raw.name.iter().any(|&b| b != 0 && !(0x20..0x7f).contains(&b)) {
            return Err(WireError::BadValue { field: "pool name", value: raw.name[0].into() });
        }
        let shared = (raw.flags & FLAG_SHARED != 0).then_some(raw.uuid);
        Ok(PoolCreate { kind, shared, name: raw.name })
    }

    /// The body of a `POOL_CREATE` request.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let (kind, mut flags) = match self.kind {
            PoolKind::Ephemeral { exclusive } => (0, if exclusive { FLAG_EXCLUSIVE } else { 0 }),
            PoolKind::Persistent => (1, 0),
        };
        if self.shared.is_some() {
            flags |= FLAG_SHARED;
        }
        zerocopy::transmute!(Raw {
            kind,
            flags,
            reserved: [0; 6],
            uuid: self.shared.unwrap_or([0; 16]),
            name: self.name,
        })
    }
}
