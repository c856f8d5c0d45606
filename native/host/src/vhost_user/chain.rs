//! A descriptor chain as a sequence of checked ranges of guest memory, and the packet in it.
//!
//! Everything a guest can say wrongly about a chain is found here, before any of it is used: loops, chains that break
//! off, ranges outside its memory, descriptors of the wrong direction, lengths that do not fit the header. A packet
//! may lie in any number of descriptors, cut anywhere, as the specification allows ("message framing").

use std::io;
use std::os::unix::net::UnixStream;

use virtio_queue::DescriptorChain;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, Permissions, ReadVolatile,
    VolatileMemoryError, VolatileSlice, WriteVolatile,
};
use zerocopy::{FromBytes, IntoBytes};

use super::packet::{Header, Sink, Source, HEADER_BYTES, MAX_DATA_BYTES};

/// Most descriptors a chain may have; QEMU's own limit.
pub const MAX_DESCRIPTORS: usize = 1024;

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ChainError {
    /// It loops, names a descriptor outside its table or is longer than allowed.
    #[error("the chain loops or breaks off")]
    Broken,
    /// A descriptor lies outside guest memory.
    #[error("a descriptor lies outside guest memory")]
    OutOfRange,
    /// A descriptor is writable where it must be readable, or the other way round.
    #[error("a descriptor has the wrong direction")]
    Direction,
    /// It is too short for a header, or for the length its header tells.
    #[error("the chain is too short for its packet")]
    TooShort,
}

/// Ranges of guest memory, checked, in the order of the chain. Kept from packet to packet, so that reading one needs
/// no allocation.
#[derive(Debug, Default)]
pub struct Segments {
    list: Vec<(GuestAddress, usize)>,
    total: usize,
}

/// Which way the data of a chain flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the guest: descriptors the device reads.
    FromGuest,
    /// To the guest: descriptors the device writes.
    ToGuest,
}

impl Segments {
    /// Replace the ranges by those of `chain`.
    pub fn load(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: &mut DescriptorChain<&GuestMemoryMmap>,
        direction: Direction,
    ) -> Result<(), ChainError> {
        self.list.clear();
        self.total = 0;
        let (write_only, access) = match direction {
            Direction::FromGuest => (false, Permissions::Read),
            Direction::ToGuest => (true, Permissions::Write),
        };
        let mut more = true;
        for descriptor in chain.by_ref() {
            if self.list.len() == MAX_DESCRIPTORS {
                return Err(ChainError::Broken);
            }
            if descriptor.is_write_only() != write_only {
                return Err(ChainError::Direction);
            }
            let length = descriptor.len() as usize;
            if length > 0 && !GuestMemory::check_range(memory, descriptor.addr(), length, access) {
                return Err(ChainError::OutOfRange);
            }
            self.list.push((descriptor.addr(), length));
            // No overflow: the iterator ends a chain before its lengths exceed 32 bits.
            self.total += length;
            more = descriptor.has_next();
        }
        // The iterator ends silently at whatever is wrong; then the last descriptor still promised another.
        if more {
            return Err(ChainError::Broken);
        }
        Ok(())
    }

    /// Write `bytes` from the start of the ranges; returns how many fitted.
    pub fn write(&self, memory: &GuestMemoryMmap, bytes: &[u8]) -> usize {
        let fitting = bytes.len().min(self.total);
        Cursor::new(memory, self).write(&bytes[..fitting]);
        fitting
    }
}

/// Where in its segments a reader or writer is.
struct Cursor<'a> {
    memory: &'a GuestMemoryMmap,
    segments: &'a [(GuestAddress, usize)],
    offset: usize,
    left: usize,
}

impl<'a> Cursor<'a> {
    fn new(memory: &'a GuestMemoryMmap, segments: &'a Segments) -> Self {
        Cursor { memory, segments: &segments.list, offset: 0, left: segments.total }
    }

    /// The next contiguous range, at most `limit` bytes; `None` at the end.
    fn next(&mut self, limit: usize) -> Option<(GuestAddress, usize)> {
        let limit = limit.min(self.left);
        while let [(address, length), rest @ ..] = self.segments {
            if self.offset < *length && limit > 0 {
                // No overflow: the range was checked to lie in guest memory.
                return Some((GuestAddress(address.0 + self.offset as u64), limit.min(length - self.offset)));
            }
            if self.offset < *length {
                return None;
            }
            self.segments = rest;
            self.offset = 0;
        }
        None
    }

    fn advance(&mut self, bytes: usize) {
        self.offset += bytes;
        self.left -= bytes;
    }

    fn read(&mut self, mut to: &mut [u8]) {
        while let Some((address, length)) = self.next(to.len()) {
            let (now, later) = to.split_at_mut(length);
            // Cannot fail: the range was checked when the chain was loaded, and memory outlives this borrow. Were it
            // to, the guest would read back its own stale bytes or zeros, nothing else.
            let _ = self.memory.read_slice(now, address);
            self.advance(length);
            to = later;
        }
    }

    fn write(&mut self, mut from: &[u8]) {
        while let Some((address, length)) = self.next(from.len()) {
            let (now, later) = from.split_at(length);
            // Cannot fail, as above.
            let _ = self.memory.write_slice(now, address);
            self.advance(length);
            from = later;
        }
    }

    /// Move bytes between guest memory and a socket, range by range, until one is not moved whole.
    fn transfer(
        &mut self,
        mut limit: usize,
        mut step: impl FnMut(&mut VolatileSlice<'_>) -> Result<usize, VolatileMemoryError>,
    ) -> io::Result<usize> {
        let mut moved = 0;
        while let Some((address, length)) = self.next(limit) {
            // A range may span two regions, which lie apart in our memory: take the part in the first.
            let Some(Ok(mut slice)) = GuestMemoryBackend::get_slices(self.memory, address, length).next()
            else {
                break;
            };
            match step(&mut slice) {
                Ok(bytes) => {
                    moved += bytes;
                    limit -= bytes;
                    self.advance(bytes);
                    if bytes < slice.len() {
                        break;
                    }
                }
                Err(_) if moved > 0 => break,
                Err(VolatileMemoryError::IOError(error)) => {
                    if error.kind() == io::ErrorKind::Interrupted {
                        continue;
                    }
                    return Err(error);
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Ok(moved)
    }
}

/// A packet from the guest: its header, and its data still in guest memory.
pub struct FromGuest<'a> {
    /// The header, read once.
    pub header: Header,
    cursor: Cursor<'a>,
}

impl<'a> FromGuest<'a> {
    /// Read the header of the packet in `segments` and hold its lengths against them.
    pub fn parse(memory: &'a GuestMemoryMmap, segments: &'a Segments) -> Result<Self, ChainError> {
        if segments.total < HEADER_BYTES {
            return Err(ChainError::TooShort);
        }
        let mut cursor = Cursor::new(memory, segments);
        let mut header = Header::zeroed();
        cursor.read(header.as_mut_bytes());
        let length = header.len.get() as usize;
        if length > cursor.left {
            return Err(ChainError::TooShort);
        }
        // Descriptors may be longer than the packet.
        cursor.left = length;
        Ok(FromGuest { header, cursor })
    }
}

impl Source for FromGuest<'_> {
    fn remaining(&self) -> usize {
        self.cursor.left
    }

    fn copy_to(&mut self, to: &mut [u8]) {
        self.cursor.read(to);
    }

    fn write_to(&mut self, mut socket: &UnixStream) -> io::Result<usize> {
        let limit = self.cursor.left;
        self.cursor.transfer(limit, |slice| socket.write_volatile(slice))
    }
}

/// Room for a packet to the guest: data first, then the header, whose length is known only then.
pub struct ToGuest<'a> {
    header: Cursor<'a>,
    data: Cursor<'a>,
    written: usize,
}

impl<'a> ToGuest<'a> {
    /// Take the room of `segments`.
    pub fn new(memory: &'a GuestMemoryMmap, segments: &'a Segments) -> Result<Self, ChainError> {
        // One byte of room for data, so that a guest cannot make the device turn in circles with nothing sent.
        if segments.total <= HEADER_BYTES {
            return Err(ChainError::TooShort);
        }
        let header = Cursor::new(memory, segments);
        let mut data = Cursor::new(memory, segments);
        let mut skip = HEADER_BYTES;
        while let Some((_, length)) = data.next(skip) {
            data.advance(length);
            skip -= length;
        }
        data.left = data.left.min(MAX_DATA_BYTES);
        Ok(ToGuest { header, data, written: 0 })
    }

    /// Write the header, its length set to that of the data, and return the bytes of the whole packet.
    pub fn finish(mut self, header: &Header) -> u32 {
        let header = Header { len: (self.written as u32).into(), ..*header };
        self.header.write(header.as_bytes());
        (HEADER_BYTES + self.written) as u32
    }
}

impl Sink for ToGuest<'_> {
    fn room(&self) -> usize {
        self.data.left
    }

    fn put(&mut self, from: &[u8]) {
        debug_assert!(from.len() <= self.room());
        self.data.write(from);
        self.written += from.len();
    }

    fn read_from(&mut self, mut socket: &UnixStream, limit: usize) -> io::Result<usize> {
        let read = self.data.transfer(limit, |slice| socket.read_volatile(slice))?;
        self.written += read;
        Ok(read)
    }
}

/// Read a header from bytes, for tests and fuzzing of what lies beyond the queue.
pub fn header_from(bytes: &[u8; HEADER_BYTES]) -> Header {
    Header::read_from_bytes(bytes).unwrap_or_else(|_| Header::zeroed())
}
