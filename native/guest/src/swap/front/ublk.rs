//! One queue of a ublk device. A slot is a tag: each has a command with the kernel that comes back with a request,
//! and goes again with the result, to fetch the next.
//!
//! | module | holds |
//! |---|---|
//! | [`abi`] | commands and structures of the kernel's interface |
//! | [`device`] | making, recovering and removing devices |

mod abi;
pub(in crate::swap) mod device;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{opcode, types};
use rustix::mm::{mmap, munmap, MapFlags, ProtFlags};
use tmem_wire::PAGE_BYTES;

use super::{Context, Event, Front};
use crate::swap::core::{Kind, Request, MAX_PAGES};
use crate::swap::ring::{Source, Token};
use abi::{
    Descriptor, COMMIT_AND_FETCH, FETCH, MAX_QUEUE_DEPTH, OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE,
    OP_WRITE_ZEROES, RES_OK,
};

const PAGE_SECTORS: u64 = PAGE_BYTES as u64 / 512;

/// A queue.
pub(in crate::swap) struct Queue {
    /// Kept open by all queues of the device.
    device: Arc<File>,
    number: u16,
    depth: u16,
    descriptors: *const Descriptor,
    /// Tags whose command came back for good.
    ended: u16,
}

// SAFETY: the descriptors are only read, and only by the lane that the queue moves to.
unsafe impl Send for Queue {}

impl Drop for Queue {
    fn drop(&mut self) {
        // While it is mapped the kernel counts the device's end as open, and deleting the device waits for ever.
        // SAFETY: mapped in `new` with this size; no reference into it outlives `descriptor`.
        let unmapped = unsafe { munmap(self.descriptors.cast_mut().cast(), Queue::mapped_bytes(self.depth)) };
        debug_assert!(unmapped.is_ok());
    }
}

impl Queue {
    /// Queue `number` of the device that this is the server's end of.
    pub(in crate::swap) fn new(device: Arc<File>, number: u16, depth: u16) -> io::Result<Queue> {
        let bytes = Queue::mapped_bytes(depth);
        let offset = usize::from(number) * MAX_QUEUE_DEPTH * size_of::<Descriptor>();
        // SAFETY: a fresh read-only mapping at an address of the kernel's choice; unmapped when dropped.
        let descriptors = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ,
                MapFlags::SHARED | MapFlags::POPULATE,
                &device,
                offset as u64,
            )
        }?;
        Ok(Queue { device, number, depth, descriptors: descriptors.cast(), ended: 0 })
    }

    fn mapped_bytes(depth: u16) -> usize {
        (usize::from(depth) * size_of::<Descriptor>()).next_multiple_of(rustix::param::page_size())
    }

    fn descriptor(&self, tag: u16) -> Descriptor {
        assert!(tag < self.depth);
        // SAFETY: inside the mapping; the kernel wrote it before the tag's command came back.
        unsafe { self.descriptors.add(tag.into()).read_volatile() }
    }

    fn command(&self, context: &mut Context<'_>, op: u32, tag: u16, result: i32) {
        let address = context.buffers.address(tag.into(), 0) as u64;
        let entry = opcode::UringCmd16::new(types::Fd(self.device.as_raw_fd()), op)
            .cmd(abi::io_command(self.number, tag, result, address))
            .build();
        // SAFETY: the tag's buffer is the kernel's until the command comes back, and lives as long as the ring.
        unsafe { context.ring.push(entry, Token::new(Source::Front, tag)) };
    }

    /// The core's request, if there is one in it; else the result to commit.
    fn request(descriptor: &Descriptor, pages: u32) -> Result<Request, i32> {
        let Descriptor { op_flags, sectors, start_sector, .. } = *descriptor;
        let kind = match op_flags as u8 {
            OP_READ => Kind::Read,
            OP_WRITE => Kind::Write,
            OP_DISCARD | OP_WRITE_ZEROES => Kind::Discard,
            // Nothing is held back that a flush could bring out.
            OP_FLUSH => return Err(0),
            _ => return Err(-libc::EOPNOTSUPP),
        };
        let sectors = u64::from(sectors);
        let aligned = start_sector % PAGE_SECTORS == 0 && sectors % PAGE_SECTORS == 0 && sectors > 0;
        let inside = start_sector + sectors <= u64::from(pages) * PAGE_SECTORS;
        let small = kind == Kind::Discard || sectors <= MAX_PAGES as u64 * PAGE_SECTORS;
        if !aligned || !inside || !small {
            return Err(-libc::EINVAL);
        }
        let first = (start_sector / PAGE_SECTORS) as u32;
        Ok(Request { kind, first, pages: (sectors / PAGE_SECTORS) as u32 })
    }
}

impl Front for Queue {
    fn start(&mut self, context: &mut Context<'_>) {
        for tag in 0..self.depth {
            self.command(context, FETCH, tag, 0);
        }
    }

    fn event(&mut self, context: &mut Context<'_>, completion: Option<(Token, i32)>) -> Event {
        let Some((token, result)) = completion else { return Event::Nothing };
        let tag = token.slot;
        if result != RES_OK {
            // -ENODEV: the device goes away. Anything else: this tag is of no use any more, and that is the end too.
            if result != -libc::ENODEV {
                log::error!("ublk: tag {tag}: {}", io::Error::from_raw_os_error(-result));
            }
            self.ended += 1;
            return if self.ended == self.depth { Event::Over } else { Event::Nothing };
        }
        match Queue::request(&self.descriptor(tag), context.pages) {
            Ok(request) => Event::Request(tag.into(), request),
            Err(result) => {
                self.command(context, COMMIT_AND_FETCH, tag, result);
                Event::Nothing
            }
        }
    }

    fn complete(&mut self, context: &mut Context<'_>, slot: usize, ok: bool) {
        let tag = slot as u16;
        let Descriptor { op_flags, sectors, .. } = self.descriptor(tag);
        let result = match op_flags as u8 {
            _ if !ok => -libc::EIO,
            // At most MAX_PAGES pages; the others have no data.
            OP_READ | OP_WRITE => i32::try_from(sectors * 512).unwrap_or(-libc::EIO),
            _ => 0,
        };
        self.command(context, COMMIT_AND_FETCH, tag, result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_checked_against_the_device() {
        let read = |op: u8, start_sector, sectors| {
            Queue::request(&Descriptor { op_flags: op.into(), sectors, start_sector, address: 0 }, 100)
        };
        assert_eq!(read(OP_READ, 8, 16), Ok(Request { kind: Kind::Read, first: 1, pages: 2 }));
        assert_eq!(read(OP_DISCARD, 0, 800), Ok(Request { kind: Kind::Discard, first: 0, pages: 100 }));
        assert_eq!(read(OP_FLUSH, 0, 0), Err(0));
        assert_eq!(read(77, 0, 8), Err(-libc::EOPNOTSUPP));
        for (start, sectors) in [(1, 8), (0, 4), (0, 0), (792, 16), (0, 17 * 8)] {
            assert_eq!(read(OP_WRITE, start, sectors), Err(-libc::EINVAL));
        }
    }
}
