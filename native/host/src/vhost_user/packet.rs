//! The header before every vsock packet, and what its fields may hold (virtio 1.3, section 5.10.6).

use std::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a packet's header.
pub const HEADER_BYTES: usize = 44;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// Most bytes of data one packet to the guest carries: what Linux itself sends at most.
pub const MAX_DATA_BYTES: usize = 64 * 1024;
/// The only socket type offered: byte streams.
pub const TYPE_STREAM: u16 = 1;
/// SHUTDOWN flag: the sender will receive no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN flag: the sender will send no more data.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet asks for or tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Open a stream.
    Request = 1,
    /// The stream is open.
    Response = 2,
    /// The stream is gone, or never was.
    Reset = 3,
    /// No more data in one or both directions.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// How much room the sender has.
    CreditUpdate = 6,
    /// Tell me how much room you have.
    CreditRequest = 7,
}

impl Op {
    /// The operation with this code.
    pub fn from_code(code: u16) -> Option<Op> {
        Some(match code {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::Data,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet's header as it stands in guest memory; read by value, so that a guest which changes it afterwards
/// changes nothing.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: U64,
    /// Context id of the receiver.
    pub dst_cid: U64,
    /// Port of the sender.
    pub src_port: U32,
    /// Port of the receiver.
    pub dst_port: U32,
    /// Bytes of data that follow.
    pub len: U32,
    /// `TYPE_STREAM`.
    pub kind: U16,
    /// An [`Op`] code.
    pub op: U16,
    /// `SHUTDOWN_*` bits.
    pub flags: U32,
    /// Bytes the sender can hold for this stream.
    pub buf_alloc: U32,
    /// Bytes of this stream the sender has passed on, modulo 2^32.
    pub fwd_cnt: U32,
}

impl Header {
    /// A header of zeros, for the reader to fill.
    pub fn zeroed() -> Header {
        Header::new_zeroed()
    }

    /// The operation, if it is one.
    pub fn operation(&self) -> Option<Op> {
        Op::from_code(self.op.get())
    }

    /// The stream this packet from the guest belongs to.
    pub fn key(&self) -> Key {
        Key { host_port: self.dst_port.get(), guest_port: self.src_port.get() }
    }
}

impl fmt::Debug for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?}({}) {}:{} -> {}:{} len {} flags {} buf_alloc {} fwd_cnt {}",
            self.operation(),
            self.op,
            self.src_cid,
            self.src_port,
            self.dst_cid,
            self.dst_port,
            self.len,
            self.flags,
            self.buf_alloc,
            self.fwd_cnt
        )
    }
}

/// What tells one stream of a VM from another: there is one guest and one host, so their ports suffice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Port on the host's side.
    pub host_port: u32,
    /// Port on the guest's side.
    pub guest_port: u32,
}

impl Key {
    /// A packet to the guest on this stream, with no data and no credit filled in.
    pub fn packet(self, guest_cid: u64, op: Op) -> Header {
        Header {
            src_cid: HOST_CID.into(),
            dst_cid: guest_cid.into(),
            src_port: self.host_port.into(),
            dst_port: self.guest_port.into(),
            len: 0.into(),
            kind: TYPE_STREAM.into(),
            op: (op as u16).into(),
            flags: 0.into(),
            buf_alloc: 0.into(),
            fwd_cnt: 0.into(),
        }
    }
}

/// Data of a packet from the guest, wherever it lies.
pub trait Source {
    /// Bytes not yet taken.
    fn remaining(&self) -> usize;
    /// Take the next bytes into `to`, which is no longer than [`Source::remaining`].
    fn copy_to(&mut self, to: &mut [u8]);
    /// Write what remains to a socket without copying it first; returns how much the socket took.
    ///
    /// # Errors
    /// What `write(2)` reports, `WouldBlock` among it, when the socket took nothing.
    fn write_to(&mut self, socket: &std::os::unix::net::UnixStream) -> std::io::Result<usize>;
}

/// Room for the data of a packet to the guest.
pub trait Sink {
    /// Bytes that still fit.
    fn room(&self) -> usize;
    /// Add bytes, no more than [`Sink::room`].
    fn put(&mut self, from: &[u8]);
    /// Read up to `limit` bytes from a socket straight into the room; 0 at the end of the stream.
    ///
    /// # Errors
    /// What `read(2)` reports, `WouldBlock` among it, when nothing was read.
    fn read_from(&mut self, socket: &std::os::unix::net::UnixStream, limit: usize) -> std::io::Result<usize>;
}

impl Source for &[u8] {
    fn remaining(&self) -> usize {
        self.len()
    }

    fn copy_to(&mut self, to: &mut [u8]) {
        let (taken, rest) = self.split_at(to.len());
        to.copy_from_slice(taken);
        *self = rest;
    }

    fn write_to(&mut self, mut socket: &std::os::unix::net::UnixStream) -> std::io::Result<usize> {
        let written = std::io::Write::write(&mut socket, self)?;
        *self = &self[written..];
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_lies_as_specified() {
        let mut bytes = [0u8; HEADER_BYTES];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = at as u8;
        }
        let header = Header::read_from_bytes(&bytes).unwrap();
        assert_eq!(header.src_cid.get(), 0x0706_0504_0302_0100);
        assert_eq!(header.dst_port.get(), 0x1716_1514);
        assert_eq!(header.len.get(), 0x1b1a_1918);
        assert_eq!(header.kind.get(), 0x1d1c);
        assert_eq!(header.op.get(), 0x1f1e);
        assert_eq!(header.fwd_cnt.get(), 0x2b2a_2928);
        assert_eq!(header.as_bytes(), bytes);
    }
}
