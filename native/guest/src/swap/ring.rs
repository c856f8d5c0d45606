//! The io_uring of a lane, and the memory it moves data to and from.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::{opcode, squeue, types, IoUring};
use rustix::mm::{mmap_anonymous, MapFlags, ProtFlags};
use tmem_wire::PAGE_BYTES;

use super::core::MAX_PAGES;

/// `IORING_RECVSEND_POLL_FIRST` of linux/io_uring.h.
const RECV_POLL_FIRST: u16 = 1;

/// Whose completion it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Source {
    /// The front end's, which defines the rest.
    Front = 0,
    /// A transfer to or from the swap file.
    File = 1,
    /// Bytes sent to the host.
    Send = 2,
    /// Bytes received from the host.
    Receive = 3,
    /// Another thread has something for the lane.
    Wake = 4,
}

/// The 64 bits that travel with an operation through the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) source: Source,
    /// A slot, or what the front end calls an operation.
    pub(super) slot: u16,
    pub(super) at: u16,
    pub(super) pages: u16,
}

impl Token {
    pub(super) fn new(source: Source, slot: u16) -> Token {
        Token { source, slot, at: 0, pages: 0 }
    }

    fn bits(self) -> u64 {
        (self.source as u64) << 48
            | u64::from(self.slot) << 32
            | u64::from(self.at) << 16
            | u64::from(self.pages)
    }

    fn from_bits(bits: u64) -> Token {
        let source = match bits >> 48 {
            0 => Source::Front,
            1 => Source::File,
            2 => Source::Send,
            3 => Source::Receive,
            _ => Source::Wake,
        };
        Token { source, slot: (bits >> 32) as u16, at: (bits >> 16) as u16, pages: bits as u16 }
    }
}

/// A ring used by one thread.
pub(super) struct Ring {
    uring: IoUring,
    outstanding: usize,
    /// The kernel has what came with Linux 6.1.
    is_modern: bool,
}

impl Ring {
    pub(super) fn new(entries: u32) -> io::Result<Ring> {
        let mut settings = IoUring::builder();
        settings.setup_cqsize(entries * 4).setup_clamp();
        // What completes waits until this thread asks for it, instead of interrupting it. Linux 6.1 can do that.
        let modern = settings.clone().setup_single_issuer().setup_defer_taskrun().build(entries);
        let is_modern = modern.is_ok();
        let ring = modern.or_else(|_| settings.build(entries)).map_err(|error| {
            let hint = match error.raw_os_error() {
                Some(libc::EPERM | libc::ENOSYS) => {
                    "; the swap shim needs io_uring: check the sysctl kernel.io_uring_disabled"
                }
                _ => "",
            };
            io::Error::new(error.kind(), format!("cannot set up an io_uring: {error}{hint}"))
        })?;
        // Transfers that would block are done by kernel threads of the ring; a few are enough, and they stay.
        ring.submitter().register_iowq_max_workers(&mut [4, 4])?;
        Ok(Ring { uring: ring, outstanding: 0, is_modern })
    }

    /// Queue an operation.
    ///
    /// # Safety
    /// The memory it names must stay valid, and unused by others, until its completion was taken.
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry, token: Token) {
        let entry = entry.user_data(token.bits());
        // SAFETY: passed on to the caller.
        while unsafe { self.uring.submission().push(&entry) }.is_err() {
            // Full: hand over what there is. An interrupted or busy kernel is asked again.
            let _ = self.uring.submit();
        }
        self.outstanding += 1;
    }

    /// Hand over what was queued and wait for `completions` of them, at most this long.
    pub(super) fn wait(&mut self, completions: usize, timeout: Duration) -> io::Result<()> {
        let timespec = types::Timespec::from(timeout);
        let args = types::SubmitArgs::new().timespec(&timespec);
        match self.uring.submitter().submit_with_args(completions, &args) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The next completion, with its result (negative: an errno).
    pub(super) fn completion(&mut self) -> Option<(Token, i32)> {
        let entry = self.uring.completion().next()?;
        self.outstanding -= 1;
        Some((Token::from_bits(entry.user_data()), entry.result()))
    }

    /// Operations whose completion was not taken yet.
    pub(super) fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Receive from a socket that probably has nothing yet: the kernel looks when something comes, not before. That may
    /// end with `EAGAIN`, if there is no memory to be told with; with `look_first` a thread of the ring waits then.
    ///
    /// # Safety
    /// As [`Ring::push`]; the memory is `space`.
    pub(super) unsafe fn receive(&mut self, socket: RawFd, space: &mut [u8], look_first: bool, token: Token) {
        let flags = if self.is_modern && !look_first { RECV_POLL_FIRST } else { 0 };
        let entry = opcode::Recv::new(types::Fd(socket), space.as_mut_ptr(), space.len() as u32);
        // SAFETY: passed on to the caller.
        unsafe { self.push(entry.ioprio(flags).build(), token) };
    }

    /// Ask to be told when `fd` is readable.
    pub(super) fn poll_readable(&mut self, fd: RawFd, token: Token) {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).build();
        // SAFETY: names no memory.
        unsafe { self.push(entry, token) };
    }
}

/// One page-aligned buffer for each slot, made resident before use.
pub(super) struct Buffers {
    base: *mut u8,
    slots: usize,
}

// SAFETY: plain memory that belongs to this value alone.
unsafe impl Send for Buffers {}

const BUFFER_BYTES: usize = MAX_PAGES * PAGE_BYTES;

impl Buffers {
    pub(super) fn new(slots: usize) -> io::Result<Buffers> {
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                slots * BUFFER_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::POPULATE,
            )
        }?;
        Ok(Buffers { base: base.cast(), slots })
    }

    /// The address of a slot's buffer from its page `at` on.
    pub(super) fn address(&self, slot: usize, at: usize) -> *mut u8 {
        assert!(slot < self.slots && at < MAX_PAGES);
        // SAFETY: within the mapping, by the assertion.
        unsafe { self.base.add(slot * BUFFER_BYTES + at * PAGE_BYTES) }
    }

    pub(super) fn slot(&mut self, slot: usize) -> &mut [u8] {
        // SAFETY: inside the mapping, which lives as long as `self` and is borrowed mutably. The kernel writes to
        // it only between the start and the completion of an operation on this slot, and then nobody asks for it.
        unsafe { std::slice::from_raw_parts_mut(self.address(slot, 0), BUFFER_BYTES) }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and no slice outlives `self`. The ring that used it is gone before.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.slots * BUFFER_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn tokens_come_back() {
        for source in [Source::Front, Source::File, Source::Send, Source::Receive, Source::Wake] {
            let token = Token { source, slot: 0xfedc, at: 15, pages: 16 };
            assert_eq!(Token::from_bits(token.bits()), token);
        }
    }

    #[test]
    fn a_receive_waits_for_what_comes() {
        for look_first in [false, true] {
            let mut ring = Ring::new(8).unwrap();
            let (mut there, here) = UnixStream::pair().unwrap();
            let mut space = [0; 8];
            let token = Token::new(Source::Receive, 0);
            // SAFETY: `space` is used again only after the completion.
            unsafe { ring.receive(here.as_raw_fd(), &mut space, look_first, token) };
            ring.wait(1, Duration::from_millis(5)).unwrap();
            assert_eq!(ring.completion(), None);
            there.write_all(b"page").unwrap();
            ring.wait(1, Duration::from_secs(5)).unwrap();
            assert_eq!(ring.completion(), Some((token, 4)));
            assert_eq!(&space[..4], b"page");
        }
    }

    #[test]
    fn a_wait_ends_without_completions() {
        let mut ring = Ring::new(8).unwrap();
        ring.wait(1, Duration::from_millis(5)).unwrap();
        assert_eq!(ring.completion(), None);
    }
}
