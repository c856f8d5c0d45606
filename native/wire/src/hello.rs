//! HELLO: the first frame of a connection settles version, features and limits.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{exact, WireError, HEADER_BYTES, MAX_BODY_BYTES, PAGE_BYTES, VERSION};

/// Optional abilities; the connection uses those both ends named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u64);

impl Features {
    /// Payloads may be LZ4 blocks made by the guest, and stored blocks may be sent as they are.
    pub const LZ4: u64 = 1;
    /// Pages carry an XXH3 checksum from putter to getter.
    pub const CHECKSUMS: u64 = 2;
    /// Every feature this crate knows.
    pub const ALL: Features = Features(Self::LZ4 | Self::CHECKSUMS);

    /// The features both ends have.
    #[must_use]
    pub fn common(self, other: Features) -> Features {
        Features(self.0 & other.0)
    }

    /// Whether `bit` is among them.
    pub fn has(self, bit: u64) -> bool {
        self.0 & bit == bit
    }
}

/// What a connection is for. Separate connections keep one kind of traffic from delaying another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// The agent's: notices from the host, reports from the guest.
    Control = 0,
    /// The swap shim's.
    Swap = 1,
    /// The file cache's.
    FileCache = 2,
}

impl Role {
    /// The role with this code.
    pub fn from_code(code: u8) -> Option<Role> {
        match code {
            0 => Some(Role::Control),
            1 => Some(Role::Swap),
            2 => Some(Role::FileCache),
            _ => None,
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRequest {
    version_min: u8,
    version_max: u8,
    role: u8,
    reserved: u8,
    page_bytes: U32,
    features: U64,
    boot_id: [u8; 16],
    max_frame_bytes: U32,
    reserved2: U32,
    client: [u8; 24],
}

/// Bytes of a HELLO request's body.
pub const REQUEST_BYTES: usize = 64;
/// Bytes of a HELLO answer's body.
pub const ANSWER_BYTES: usize = 48;

/// The guest's half of the negotiation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelloRequest {
    /// Lowest protocol version the guest speaks.
    pub version_min: u8,
    /// Highest protocol version the guest speaks.
    pub version_max: u8,
    /// What the connection is for.
    pub role: Role,
    /// The guest's base page size in bytes.
    pub page_bytes: u32,
    /// What the guest can do.
    pub features: Features,
    /// Kernel boot id of the guest; a new one means it rebooted and the old boot's pools are gone.
    pub boot_id: [u8; 16],
    /// Largest frame the guest accepts, header included.
    pub max_frame_bytes: u32,
    /// Program and version, printable ASCII padded with NUL; for logs only.
    pub client: [u8; 24],
}

impl HelloRequest {
    /// A request with all that this crate can do, of a client without a name.
    pub fn new(role: Role, boot_id: [u8; 16]) -> HelloRequest {
        HelloRequest {
            version_min: VERSION,
            version_max: VERSION,
            role,
            page_bytes: PAGE_BYTES as u32,
            features: Features::ALL,
            boot_id,
            max_frame_bytes: (HEADER_BYTES + MAX_BODY_BYTES) as u32,
            client: [0; 24],
        }
    }

    /// The same of a client of this name, which is cut if it is too long.
    #[must_use]
    pub fn named(mut self, client: &str) -> HelloRequest {
        self.client = [0; 24];
        for (to, from) in self.client.iter_mut().zip(client.bytes()) {
            *to = from;
        }
        self
    }

    /// Read the body of a HELLO request.
    pub fn decode(body: &[u8]) -> Result<HelloRequest, WireError> {
        exact("HELLO request", body, REQUEST_BYTES)?;
        let raw = RawRequest::ref_from_bytes(body).map_err(|_| WireError::BadLength {
            op: "HELLO request",
            expected: REQUEST_BYTES,
            got: body.len(),
        })?;
        let role =
            Role::from_code(raw.role).ok_or(WireError::BadValue { field: "role", value: raw.role.into() })?;
        if raw.client.iter().any(|&b| b != 0 && !(0x20..0x7f).contains(&b)) {
            return Err(WireError::BadValue { field: "client name", value: 0 });
        }
        Ok(HelloRequest {
            version_min: raw.version_min,
            version_max: raw.version_max,
            role,
            page_bytes: raw.page_bytes.get(),
            features: Features(raw.features.get()),
            boot_id: raw.boot_id,
            max_frame_bytes: raw.max_frame_bytes.get(),
            client: raw.client,
        })
    }

    /// The body of a HELLO request.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        zerocopy::transmute!(RawRequest {
            version_min: self.version_min,
            version_max: self.version_max,
            role: self.role as u8,
            reserved: 0,
            page_bytes: self.page_bytes.into(),
            features: self.features.0.into(),
            boot_id: self.boot_id,
            max_frame_bytes: self.max_frame_bytes.into(),
            reserved2: 0.into(),
            client: self.client,
        })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAnswer {
    version: u8,
    reserved: [u8; 3],
    page_bytes: U32,
    features: U64,
    max_frame_bytes: U32,
    max_batch: U32,
    max_in_flight: U32,
    keep_alive_ms: U32,
    quota_bytes: U64,
    reserved2: U64,
}

/// The host's half of the negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HelloAnswer {
    /// The version the connection will speak.
    pub version: u8,
    /// The page size the host stores, in bytes.
    pub page_bytes: u32,
    /// Features both ends have.
    pub features: Features,
    /// Largest frame the host accepts, header included.
    pub max_frame_bytes: u32,
    /// Most entries in a batch.
    pub max_batch: u32,
    /// Most requests a connection may have unanswered.
    pub max_in_flight: u32,
    /// A guest silent for three of these may be disconnected; 0 turns keep-alive off.
    pub keep_alive_ms: u32,
    /// The VM's quota in bytes of host memory at this moment.
    pub quota_bytes: u64,
}

impl HelloAnswer {
    /// Read the body of a HELLO answer.
    pub fn decode(body: &[u8]) -> Result<HelloAnswer, WireError> {
        exact("HELLO answer", body, ANSWER_BYTES)?;
        let raw = RawAnswer::ref_from_bytes(body).map_err(|_| WireError::BadLength {
            op: "HELLO answer",
            expected: ANSWER_BYTES,
            got: body.len(),
        })?;
        Ok(HelloAnswer {
            version: raw.version,
            page_bytes: raw.page_bytes.get(),
            features: Features(raw.features.get()),
            max_frame_bytes: raw.max_frame_bytes.get(),
            max_batch: raw.max_batch.get(),
            max_in_flight: raw.max_in_flight.get(),
            keep_alive_ms: raw.keep_alive_ms.get(),
            quota_bytes: raw.quota_bytes.get(),
        })
    }

    /// The body of a HELLO answer.
    pub fn encode(&self) -> [u8; ANSWER_BYTES] {
        zerocopy::transmute!(RawAnswer {
            version: self.version,
            reserved: [0; 3],
            page_bytes: self.page_bytes.into(),
            features: self.features.0.into(),
            max_frame_bytes: self.max_frame_bytes.into(),
            max_batch: self.max_batch.into(),
            max_in_flight: self.max_in_flight.into(),
            keep_alive_ms: self.keep_alive_ms.into(),
            quota_bytes: self.quota_bytes.into(),
            reserved2: 0.into(),
        })
    }
}
