//! What the vhost-user front end (QEMU) has told: its messages, and the state they add up to.
//!
//! The message loop is ours, and not the `vhost` crate's, because it must be able to go on in another process in the
//! middle of a connection (docs/adr/0050): all it knows is in [`FrontState`], which [`super::snapshot`] carries over.
//! The front end is less hostile than a guest, but a guest may have taken it over: lengths and indices are checked all
//! the same, and its memory only ever reached through the map made from [`FrontState::regions`].

use std::os::fd::OwnedFd;

use super::ring::{Layout, MAX_RING};

/// Bytes of a message's header.
pub const MESSAGE_HEADER_BYTES: usize = 12;
/// Most bytes of a message's body.
pub const MAX_BODY_BYTES: usize = 4096;
/// Most regions of guest memory.
pub const MAX_REGIONS: usize = 32;
/// Rings of a vsock device: to the guest, from the guest, events.
pub const RINGS: usize = 3;
/// Index of the ring of packets to the guest.
pub const TO_GUEST: usize = 0;
/// Index of the ring of packets from the guest.
pub const FROM_GUEST: usize = 1;
/// Index of the event ring. QEMU serves it itself; other front ends may hand it to us.
pub const EVENTS: usize = 2;

const F_INDIRECT: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
/// vhost-user's own bit: there are protocol features.
const F_PROTOCOL: u64 = 1 << 30;
const F_VERSION_1: u64 = 1 << 32;
/// Virtio features offered.
pub const FEATURES: u64 = F_INDIRECT | F_EVENT_IDX | F_PROTOCOL | F_VERSION_1;

const P_MQ: u64 = 1 << 0;
const P_REPLY_ACK: u64 = 1 << 3;
const P_CONFIG: u64 = 1 << 9;
const P_RESET_DEVICE: u64 = 1 << 13;
const P_MEM_SLOTS: u64 = 1 << 15;
/// vhost-user protocol features offered. No INFLIGHT_SHMFD: rings are worked off in order, so the used index tells all.
/// No STATUS: with it, QEMU resets the status whenever the VM pauses, which would cost all streams.
pub const PROTOCOL_FEATURES: u64 = P_MQ | P_REPLY_ACK | P_CONFIG | P_RESET_DEVICE | P_MEM_SLOTS;

const FLAG_VERSION: u32 = 1;
const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;
const NO_DESCRIPTOR: u64 = 1 << 8;

/// The front end broke the vhost-user protocol; its connection ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{request}: {problem}")]
pub struct FrontError {
    /// The message it was about.
    pub request: &'static str,
    /// What was wrong.
    pub problem: String,
}

/// A message's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageHeader {
    /// Request code.
    pub request: u32,
    flags: u32,
    /// Bytes of body that follow.
    pub size: usize,
}

impl MessageHeader {
    /// Read and check a header.
    pub fn decode(bytes: &[u8; MESSAGE_HEADER_BYTES]) -> Result<MessageHeader, FrontError> {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (request, flags, size) = (word(0), word(4), word(8) as usize);
        let bad = |problem: String| FrontError { request: "header", problem };
        if flags & 3 != FLAG_VERSION || flags & FLAG_REPLY != 0 {
            return Err(bad(format!("flags {flags:#x} are not those of a request")));
        }
        if size > MAX_BODY_BYTES {
            return Err(bad(format!("a body of {size} bytes")));
        }
        Ok(MessageHeader { request, flags, size })
    }

    fn reply(self, body: &[u8]) -> Vec<u8> {
        let mut message = Vec::with_capacity(MESSAGE_HEADER_BYTES + body.len());
        message.extend_from_slice(&self.request.to_ne_bytes());
        message.extend_from_slice(&(FLAG_VERSION | FLAG_REPLY).to_ne_bytes());
        message.extend_from_slice(&(body.len() as u32).to_ne_bytes());
        message.extend_from_slice(body);
        message
    }
}

/// A region of guest memory.
#[derive(Debug)]
pub struct Region {
    /// Guest physical address.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Where the front end has it; ring addresses are told in these terms.
    pub user_address: u64,
    /// Where in `file` it starts.
    pub offset: u64,
    /// The memory.
    pub file: OwnedFd,
}

/// What was told of one ring.
#[derive(Debug, Default)]
pub struct Vring {
    /// Entries; 0 until told.
    pub size: u16,
    /// Next avail index; kept up to date only while the ring stands still.
    pub base: u16,
    /// Descriptor table, front end's address.
    pub descriptors: u64,
    /// Used ring, front end's address.
    pub used: u64,
    /// Avail ring, front end's address.
    pub avail: u64,
    /// Whether it may be served.
    pub enabled: bool,
    /// Signalled by the guest. The ring runs while there is one.
    pub kick: Option<OwnedFd>,
    /// To signal the guest.
    pub call: Option<OwnedFd>,
}

/// All that a front end has told.
#[derive(Debug, Default)]
pub struct FrontState {
    /// Virtio features the driver took.
    pub features: u64,
    /// Protocol features the front end took.
    pub protocol_features: u64,
    /// Guest memory.
    pub regions: Vec<Region>,
    /// The rings.
    pub vrings: [Vring; RINGS],
}

/// What a message changed, beside the state itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// Something about the rings or features.
    Rings,
    /// Guest memory: the map must be made anew.
    Memory,
    /// The driver is gone: forget every stream.
    Reset,
}

/// The outcome of a message.
pub struct Handled {
    /// What it changed.
    pub change: Change,
    /// What to send back, empty for nothing.
    pub reply: Vec<u8>,
}

/// Reads a body field by field.
struct Body<'a> {
    request: &'static str,
    bytes: &'a [u8],
}

impl Body<'_> {
    fn fail(&self, problem: impl Into<String>) -> FrontError {
        FrontError { request: self.request, problem: problem.into() }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], FrontError> {
        let Some((field, rest)) = self.bytes.split_first_chunk::<N>() else {
            return Err(self.fail("the body is too short"));
        };
        self.bytes = rest;
        Ok(*field)
    }

    fn u32(&mut self) -> Result<u32, FrontError> {
        Ok(u32::from_ne_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, FrontError> {
        Ok(u64::from_ne_bytes(self.take()?))
    }

    fn ring(&mut self) -> Result<usize, FrontError> {
        let index = self.u32()? as usize;
        if index < RINGS {
            Ok(index)
        } else {
            Err(self.fail(format!("there is no ring {index}")))
        }
    }

    fn region(&mut self, file: OwnedFd) -> Result<Region, FrontError> {
        let (guest_address, size) = (self.u64()?, self.u64()?);
        let (user_address, offset) = (self.u64()?, self.u64()?);
        let region = Region { guest_address, size, user_address, offset, file };
        let ends =
            [guest_address.checked_add(size), user_address.checked_add(size), offset.checked_add(size)];
        if size == 0 || ends.contains(&None) {
            return Err(self.fail(format!("a memory region of {size:#x} bytes at {guest_address:#x}")));
        }
        Ok(region)
    }
}

fn single(body: &Body<'_>, descriptors: Vec<OwnedFd>) -> Result<OwnedFd, FrontError> {
    let [descriptor] = <[OwnedFd; 1]>::try_from(descriptors)
        .map_err(|got| body.fail(format!("{} descriptors instead of one", got.len())))?;
    Ok(descriptor)
}

impl FrontState {
    /// Take in one message. `config` is the device's configuration space.
    ///
    /// # Errors
    /// The message makes no sense; the connection cannot go on.
    pub fn handle(
        &mut self,
        header: MessageHeader,
        body: &[u8],
        descriptors: Vec<OwnedFd>,
        config: &[u8],
    ) -> Result<Handled, FrontError> {
        let mut body = Body { request: request_name(header.request), bytes: body };
        let mut change = Change::None;
        let mut reply = None;
        match header.request {
            GET_FEATURES => reply = Some(FEATURES.to_ne_bytes().to_vec()),
            SET_FEATURES => {
                let features = body.u64()?;
                if features & !FEATURES != 0 {
                    return Err(body.fail(format!("features {features:#x} were not offered")));
                }
                self.features = features;
                change = Change::Rings;
            }
            GET_PROTOCOL_FEATURES => reply = Some(PROTOCOL_FEATURES.to_ne_bytes().to_vec()),
            SET_PROTOCOL_FEATURES => self.protocol_features = body.u64()? & PROTOCOL_FEATURES,
            // Of the configuration nothing can be written.
            SET_OWNER | SET_VRING_ERR | SET_CONFIG => {}
            RESET_OWNER | RESET_DEVICE => {
                for vring in &mut self.vrings {
                    *vring = Vring { call: vring.call.take(), ..Vring::default() };
                }
                change = Change::Reset;
            }
            SET_MEM_TABLE => {
                let count = body.u32()? as usize;
                body.u32()?;
                if count > MAX_REGIONS || count != descriptors.len() {
                    return Err(body.fail(format!("{count} regions, {} descriptors", descriptors.len())));
                }
                let mut regions = Vec::with_capacity(count);
                for file in descriptors {
                    regions.push(body.region(file)?);
                }
                self.regions = regions;
                change = Change::Memory;
            }
            GET_MAX_MEM_SLOTS => reply = Some((MAX_REGIONS as u64).to_ne_bytes().to_vec()),
            ADD_MEM_REG => {
                body.u64()?;
                let file = single(&body, descriptors)?;
                let region = body.region(file)?;
                if self.regions.len() == MAX_REGIONS {
                    return Err(body.fail("too many memory regions"));
                }
                self.regions.push(region);
                change = Change::Memory;
            }
            REM_MEM_REG => {
                body.u64()?;
                let (guest_address, size, user_address) = (body.u64()?, body.u64()?, body.u64()?);
                let before = self.regions.len();
                self.regions.retain(|region| {
                    (region.guest_address, region.size, region.user_address)
                        != (guest_address, size, user_address)
                });
                if self.regions.len() == before {
                    return Err(body.fail(format!("no region at {guest_address:#x}")));
                }
                change = Change::Memory;
            }
            SET_VRING_NUM => {
                let (ring, size) = (body.ring()?, body.u32()?);
                if size == 0 || size > u32::from(MAX_RING) || !size.is_power_of_two() {
                    return Err(body.fail(format!("a ring of {size} entries")));
                }
                self.vrings[ring].size = size as u16;
                change = Change::Rings;
            }
            SET_VRING_ADDR => {
                let ring = body.ring()?;
                body.u32()?;
                let vring = &mut self.vrings[ring];
                (vring.descriptors, vring.used, vring.avail) = (body.u64()?, body.u64()?, body.u64()?);
                change = Change::Rings;
            }
            SET_VRING_BASE => {
                let (ring, base) = (body.ring()?, body.u32()?);
                self.vrings[ring].base = base as u16;
                change = Change::Rings;
            }
            GET_VRING_BASE => {
                let ring = body.ring()?;
                let vring = &mut self.vrings[ring];
                // The specification: this stops the ring.
                vring.kick = None;
                let mut state = (ring as u32).to_ne_bytes().to_vec();
                state.extend_from_slice(&u32::from(vring.base).to_ne_bytes());
                reply = Some(state);
                change = Change::Rings;
            }
            SET_VRING_KICK | SET_VRING_CALL => {
                let value = body.u64()?;
                let ring = (value & 0xff) as usize;
                if ring >= RINGS {
                    return Err(body.fail(format!("there is no ring {ring}")));
                }
                let descriptor =
                    if value & NO_DESCRIPTOR == 0 { Some(single(&body, descriptors)?) } else { None };
                if let Some(descriptor) = &descriptor {
                    // A front end under a guest's control must not be able to hang us on a full pipe.
                    let nonblocking = rustix::fs::OFlags::NONBLOCK;
                    if let Ok(flags) = rustix::fs::fcntl_getfl(descriptor) {
                        let _ = rustix::fs::fcntl_setfl(descriptor, flags | nonblocking);
                    }
                }
                let vring = &mut self.vrings[ring];
                if header.request == SET_VRING_CALL {
                    vring.call = descriptor;
                } else if descriptor.is_some() {
                    vring.kick = descriptor;
                } else {
                    return Err(body.fail("polled rings are not supported"));
                }
                change = Change::Rings;
            }
            GET_QUEUE_NUM => reply = Some((RINGS as u64).to_ne_bytes().to_vec()),
            SET_VRING_ENABLE => {
                let (ring, enabled) = (body.ring()?, body.u32()?);
                self.vrings[ring].enabled = enabled != 0;
                change = Change::Rings;
            }
            GET_CONFIG => {
                let (offset, size, flags) = (body.u32()?, body.u32()?, body.u32()?);
                let range = (offset as usize)..(offset as usize).saturating_add(size as usize);
                let mut answer = offset.to_ne_bytes().to_vec();
                // An answer without bytes is the specification's way to say no.
                let bytes = config.get(range).unwrap_or(&[]);
                answer.extend_from_slice(&(bytes.len() as u32).to_ne_bytes());
                answer.extend_from_slice(&flags.to_ne_bytes());
                answer.extend_from_slice(bytes);
                reply = Some(answer);
            }
            other => return Err(body.fail(format!("request {other} is not supported"))),
        }
        let wants_ack = header.flags & FLAG_NEED_REPLY != 0 && self.protocol_features & P_REPLY_ACK != 0;
        let reply = match reply {
            Some(body) => header.reply(&body),
            None if wants_ack => header.reply(&0u64.to_ne_bytes()),
            None => Vec::new(),
        };
        Ok(Handled { change, reply })
    }

    /// Where ring `index` lies, in guest addresses, if it is set up, started and enabled.
    pub fn layout(&self, index: usize) -> Option<Layout> {
        let vring = &self.vrings[index];
        let enabled = vring.enabled || self.features & F_PROTOCOL == 0;
        if vring.size == 0 || vring.kick.is_none() || !enabled {
            return None;
        }
        Some(Layout {
            size: vring.size,
            descriptors: self.guest_address(vring.descriptors)?,
            avail: self.guest_address(vring.avail)?,
            used: self.guest_address(vring.used)?,
            event_idx: self.features & F_EVENT_IDX != 0,
        })
    }

    fn guest_address(&self, user_address: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = user_address.checked_sub(region.user_address)?;
            (offset < region.size).then(|| region.guest_address + offset)
        })
    }
}

macro_rules! requests {
    ($($name:ident = $code:literal,)*) => {
        $(const $name: u32 = $code;)*

        /// The specification's name of a request.
        pub fn request_name(code: u32) -> &'static str {
            match code { $($code => stringify!($name),)* _ => "unknown request" }
        }
    };
}

requests! {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    RESET_OWNER = 4,
    SET_MEM_TABLE = 5,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    SET_VRING_ERR = 14,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    GET_CONFIG = 24,
    SET_CONFIG = 25,
    RESET_DEVICE = 34,
    GET_MAX_MEM_SLOTS = 36,
    ADD_MEM_REG = 37,
    REM_MEM_REG = 38,
}
