//! The ring that the program fills and this process empties (`BPF_MAP_TYPE_RINGBUF`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::mm::{mmap, munmap, MapFlags, ProtFlags};
use tmem_wire::PAGE_BYTES;

use super::program::RECORD_BYTES;

/// Bytes of the ring, a power of two: some five hundred pages between two turns of the reader.
pub(super) const RING_BYTES: usize = 2 << 20;
/// Bytes before a record: its length with two flags, and where it is.
const HEADER_BYTES: usize = 8;
const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;

/// The mapped ring. The kernel maps its data twice in a row, so that no record is split.
pub(super) struct Ring {
    map: OwnedFd,
    /// One page, the reader's position.
    reader: NonNull<u8>,
    /// The writer's position, one page, and the data.
    writer: NonNull<u8>,
}

// SAFETY: the pointers lead to mappings that belong to this value alone and stay where they are.
unsafe impl Send for Ring {}

/// A page that the kernel evicted.
pub(super) struct Evicted<'r> {
    /// Its file's inode number.
    pub(super) inode: u64,
    /// Its index in the file.
    pub(super) index: u64,
    /// The kernel's page flags.
    pub(super) flags: u64,
    /// When, in nanoseconds of the monotonic clock.
    pub(super) time: u64,
    /// What was in it.
    pub(super) page: &'r [u8; PAGE_BYTES],
}

const WRITER_BYTES: usize = PAGE_BYTES + 2 * RING_BYTES;

impl Ring {
    /// Map a ring of [`RING_BYTES`].
    pub(super) fn map(map: OwnedFd) -> Result<Ring, Errno> {
        let shared = MapFlags::SHARED;
        // SAFETY: new mappings at places of the kernel's choice; nothing else is touched.
        let (reader, writer) = unsafe {
            let both = ProtFlags::READ | ProtFlags::WRITE;
            let reader = mmap(std::ptr::null_mut(), PAGE_BYTES, both, shared, &map, 0)?;
            let writer =
                mmap(std::ptr::null_mut(), WRITER_BYTES, ProtFlags::READ, shared, &map, PAGE_BYTES as u64);
            if writer.is_err() {
                let _ = munmap(reader, PAGE_BYTES);
            }
            (reader, writer?)
        };
        let pointer = |at: *mut core::ffi::c_void| NonNull::new(at.cast()).ok_or(Errno::NOMEM);
        Ok(Ring { map, reader: pointer(reader)?, writer: pointer(writer)? })
    }

    fn position(&self, of: NonNull<u8>) -> &AtomicU64 {
        let _ = self;
        // SAFETY: both mappings begin with a position, aligned, that both sides use atomically for as long as the
        // ring is mapped.
        unsafe { of.cast::<AtomicU64>().as_ref() }
    }

    /// Hand the oldest record to `take` and free its place; whether there was one.
    pub(super) fn next(&mut self, mut take: impl FnMut(&Evicted<'_>)) -> bool {
        let at = self.position(self.reader).load(Ordering::Relaxed);
        if at >= self.position(self.writer).load(Ordering::Acquire) {
            return false;
        }
        let place = PAGE_BYTES + (at as usize & (RING_BYTES - 1));
        // SAFETY: the place is within the first copy of the data, whose second copy follows; records are aligned to
        // eight bytes, and the kernel writes the length last.
        let length = unsafe { self.writer.add(place).cast::<AtomicU32>().as_ref() }.load(Ordering::Acquire);
        if length & BUSY != 0 {
            return false;
        }
        let bytes = (length & !(BUSY | DISCARDED)) as usize;
        if length & DISCARDED == 0 && bytes == RECORD_BYTES {
            // SAFETY: the record is complete, lies within the two copies, and the kernel does not write to it before
            // the reader's position has passed it, which is below.
            let record = unsafe {
                std::slice::from_raw_parts(self.writer.as_ptr().add(place + HEADER_BYTES), RECORD_BYTES)
            };
            let word = |n: usize| record[8 * n..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
            if let Some(page) = record[32..].first_chunk() {
                take(&Evicted { inode: word(0), index: word(1), flags: word(2), time: word(3), page });
            }
        }
        let end = at + (bytes + HEADER_BYTES).next_multiple_of(8) as u64;
        self.position(self.reader).store(end, Ordering::Release);
        true
    }
}

impl AsFd for Ring {
    /// Readable when there are records.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: these are the mappings made above, and no reference into them outlives the value.
        unsafe {
            let _ = munmap(self.reader.as_ptr().cast(), PAGE_BYTES);
            let _ = munmap(self.writer.as_ptr().cast(), WRITER_BYTES);
        }
    }
}
