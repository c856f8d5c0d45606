//! Changes that others make in the lower directory, told by fanotify, and passed on to the kernel's caches.
//!
//! The whole lower file system is watched, because a directory's subtree cannot be; what this process does itself is
//! left out by its process id. Opening a file compares its version anyway, so a report that is still on its way
//! delays names, attributes, and pages of files that are open already; it never lets an open see old data.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::abi::ROOT_ID;
use super::counters::count;
use super::device::{last_error, Device};
use super::inode::Inode;
use super::stat::{stat_fd, Identity};
use super::tree::Tree;

/// Events that move names or attributes or content. Changes through memory maps are not reported by any kernel.
const EVENTS: u64 = libc::FAN_MODIFY
    | libc::FAN_ATTRIB
    | libc::FAN_CREATE
    | libc::FAN_DELETE
    | libc::FAN_MOVED_FROM
    | libc::FAN_MOVED_TO
    | libc::FAN_ONDIR;
/// Bytes read at a time.
const BUFFER_BYTES: usize = 16 << 10;
/// Bytes before an event's records: `struct fanotify_event_metadata`.
const METADATA_BYTES: usize = 24;
/// Record types: the object, and a directory with a name in it.
const INFO_FID: u8 = 1;
const INFO_DFID_NAME: u8 = 2;
/// Bytes before a record's file handle: its header and the file system's id.
const HANDLE_AT: usize = 12;
/// An answer that was under way when an event came may still carry the old state to the kernel; so everything is
/// invalidated a second time after as long as an answer can take on a busy machine.
const AGAIN: Duration = Duration::from_millis(50);
/// How long to leave events lying while this process makes them all.
const REST: Duration = Duration::from_millis(1);
/// Second invalidations that may wait. Past that, a storm of changes repeats itself anyway.
const WAITING: usize = 4096;

/// The watch on a lower file system.
pub(crate) struct Watch {
    events: OwnedFd,
    /// Any directory of the file system, for opening file handles.
    anchor: OwnedFd,
}

/// What an event means for the kernel's caches.
#[derive(Clone)]
enum Change {
    /// A file's attributes and content.
    File(Identity),
    /// A name in a directory.
    Name(Identity, Box<CStr>),
}

impl Watch {
    /// Watch the file system of the root. An error says that this kernel or this file system cannot be watched.
    pub(crate) fn new(root: &Inode) -> Result<Watch, Errno> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_UNLIMITED_QUEUE
            | libc::FAN_REPORT_FID
            | libc::FAN_REPORT_DIR_FID
            | libc::FAN_REPORT_NAME;
        // SAFETY: no memory is passed; the descriptor is nobody else's.
        let events = unsafe {
            let fd = libc::fanotify_init(flags, libc::O_RDONLY as libc::c_uint);
            if fd < 0 {
                return Err(last_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let anchor = rustix::fs::open(
            root.path().as_c_str(),
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )?;
        let how = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM;
        // SAFETY: a null path marks the object of the descriptor itself.
        let marked = unsafe {
            libc::fanotify_mark(events.as_raw_fd(), how, EVENTS, anchor.as_raw_fd(), std::ptr::null())
        };
        if marked < 0 {
            return Err(last_error());
        }
        Ok(Watch { events, anchor })
    }

    /// Pass events on for as long as the process lives. Only the watch is polled: the kernel wakes whoever polls a
    /// FUSE device for each request.
    pub(crate) fn run(&self, tree: &Arc<Tree>, device: &Device) {
        let own = std::process::id();
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut waiting: std::collections::VecDeque<(Instant, Change)> = std::collections::VecDeque::new();
        loop {
            let due = waiting.front().map(|(due, _)| due.saturating_duration_since(Instant::now()));
            let due = due
                .map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
            if let Err(error) = poll(&mut [PollFd::new(&self.events, PollFlags::IN)], due.as_ref()) {
                if error != Errno::INTR {
                    log::error!("changes in the lower directory are not seen any more: {error}");
                    return;
                }
            }
            let (mut events, mut own_events) = (0, 0);
            while let Ok(length) = rustix::io::read(&self.events, &mut buffer) {
                let mut rest = &buffer[..length];
                while let Some((event, tail)) = split_event(rest) {
                    rest = tail;
                    events += 1;
                    if event.mask & libc::FAN_Q_OVERFLOW != 0 {
                        log::error!(
                            "changes in the lower directory were missed: the kernel is out of memory"
                        );
                        continue;
                    }
                    if event.pid == own {
                        own_events += 1;
                        continue;
                    }
                    for change in self.changes(event.records) {
                        if apply(tree, device, &change) {
                            count(&tree.cache.counters.outside_changes, 1);
                        }
                        if waiting.len() < WAITING {
                            waiting.push_back((Instant::now() + AGAIN, change));
                        }
                    }
                }
            }
            if events > 0 && events == own_events {
                // The mount itself is busy: do not wake up for each of its own changes.
                std::thread::sleep(REST);
            }
            while waiting.front().is_some_and(|(due, _)| *due <= Instant::now()) {
                if let Some((_, change)) = waiting.pop_front() {
                    apply(tree, device, &change);
                }
            }
        }
    }

    /// What the records of an event tell.
    fn changes(&self, mut records: &[u8]) -> Vec<Change> {
        let mut found = Vec::new();
        while records.len() >= 4 {
            let kind = records[0];
            let length = usize::from(u16::from_ne_bytes([records[2], records[3]]));
            let Some((record, tail)) = records.split_at_checked(length).filter(|_| length > HANDLE_AT + 8)
            else {
                break;
            };
            records = tail;
            let handle = &record[HANDLE_AT..];
            let bytes = u32::from_ne_bytes([handle[0], handle[1], handle[2], handle[3]]) as usize;
            let Some((handle, name)) = handle.split_at_checked(8 + bytes) else { break };
            // A file that is gone and that the kernel does not know concerns nobody.
            let Ok(identity) = self.identify(handle) else { continue };
            match kind {
                INFO_FID => found.push(Change::File(identity)),
                INFO_DFID_NAME => match CStr::from_bytes_until_nul(name) {
                    Ok(name) if name != c"." => found.push(Change::Name(identity, name.into())),
                    _ => found.push(Change::File(identity)),
                },
                _ => {}
            }
        }
        found
    }

    /// The file that a handle names.
    fn identify(&self, handle: &[u8]) -> Result<Identity, Errno> {
        // The kernel wants its struct aligned: two words of 32 bits, then the handle's bytes.
        let mut aligned = [0_u64; 18];
        let bytes = zerocopy::IntoBytes::as_mut_bytes(&mut aligned);
        bytes.get_mut(..handle.len()).ok_or(Errno::INVAL)?.copy_from_slice(handle);
        let flags = libc::O_PATH | libc::O_CLOEXEC;
        // SAFETY: the struct's own length field was checked to lie within the buffer; the new descriptor is ours.
        let fd = unsafe {
            let fd =
                libc::syscall(libc::SYS_open_by_handle_at, self.anchor.as_raw_fd(), bytes.as_ptr(), flags);
            if fd < 0 {
                return Err(last_error());
            }
            OwnedFd::from_raw_fd(fd as libc::c_int)
        };
        Ok(Identity::of(&stat_fd(&fd)?))
    }
}

/// Drop what the kernel keeps of what changed; whether it kept anything.
fn apply(tree: &Tree, device: &Device, change: &Change) -> bool {
    let (identity, name) = match change {
        Change::File(identity) => (identity, None),
        Change::Name(identity, name) => (identity, Some(name)),
    };
    let Some(inode) = tree.inodes.find(identity) else { return false };
    inode.content.lock().cached = None;
    // Attributes, and the pages of the file or of the directory's listing. ENOENT: the kernel does not know it, or not
    // any more.
    let known = device.invalidate_inode(inode.node, 0).is_ok();
    let entry = name.is_some_and(|name| device.invalidate_entry(inode.node, name).is_ok());
    known || entry || inode.node == ROOT_ID
}

struct Event<'b> {
    mask: u64,
    pid: u32,
    records: &'b [u8],
}

fn split_event(bytes: &[u8]) -> Option<(Event<'_>, &[u8])> {
    let metadata = bytes.get(..METADATA_BYTES)?;
    let word =
        |at: usize| u32::from_ne_bytes([metadata[at], metadata[at + 1], metadata[at + 2], metadata[at + 3]]);
    let length = word(0) as usize;
    let start = usize::from(u16::from_ne_bytes([metadata[6], metadata[7]]));
    let mask = u64::from(word(8)) | u64::from(word(12)) << 32;
    let (event, rest) = bytes.split_at_checked(length).filter(|_| length >= METADATA_BYTES)?;
    Some((Event { mask, pid: word(20), records: event.get(start..)? }, rest))
}
