//! Open files and directories, by the number the kernel names them with.

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::around::Hold;
use super::dir::Listing;
use super::inode::Inode;
use super::version::Version;

/// How many files that are used without having been opened keep their descriptors.
const STANDING: usize = 64;

/// Descriptors of a lower file.
enum Lower {
    /// Opened as the caller asked (but never with `O_APPEND` or `O_DIRECT`).
    Opened(OwnedFd),
    /// Made when they are first wanted: the kernel does not tell who opens a file, and how, or has what it would ask
    /// of a directory.
    Late { reading: OnceLock<OwnedFd>, writing: OnceLock<OwnedFd> },
}

/// An open file or directory.
pub(crate) struct Handle {
    /// What is open.
    pub(crate) inode: Arc<Inode>,
    lower: Lower,
    /// For regular files: a descriptor for reading past the lower page cache, made at the first read that wants it.
    /// `None` inside if the lower file system cannot.
    pub(crate) direct: OnceLock<Option<OwnedFd>>,
    /// The version at which opening it made the kernel drop its pages or listing, until the first read.
    pub(crate) dropped: Mutex<Option<Version>>,
    /// For directories: where the listing stands.
    pub(crate) listing: Mutex<Listing>,
    /// What may be written to keeps its pages from being stored unasked.
    _hold: Option<Hold>,
}

impl Handle {
    /// A handle on an open lower descriptor; with a `hold` if it is open for writing.
    pub(crate) fn new(
        inode: Arc<Inode>,
        fd: OwnedFd,
        dropped: Option<Version>,
        hold: Option<Hold>,
    ) -> Handle {
        Handle { _hold: hold, ..Handle::with(inode, Lower::Opened(fd), dropped) }
    }

    /// A handle whose lower descriptors are opened when they are wanted.
    pub(crate) fn late(inode: Arc<Inode>, dropped: Option<Version>) -> Handle {
        let lower = Lower::Late { reading: OnceLock::new(), writing: OnceLock::new() };
        Handle::with(inode, lower, dropped)
    }

    fn with(inode: Arc<Inode>, lower: Lower, dropped: Option<Version>) -> Handle {
        Handle {
            inode,
            lower,
            direct: OnceLock::new(),
            dropped: Mutex::new(dropped),
            listing: Mutex::default(),
            _hold: None,
        }
    }

    /// The lower descriptor, for reading if there is a choice.
    pub(crate) fn reading(&self) -> Result<&OwnedFd, Errno> {
        match &self.lower {
            Lower::Opened(fd) => Ok(fd),
            Lower::Late { reading, .. } => self.get_or_open(reading, OFlags::RDONLY),
        }
    }

    /// The lower descriptor, for writing if there is a choice.
    pub(crate) fn writing(&self) -> Result<&OwnedFd, Errno> {
        match &self.lower {
            Lower::Opened(fd) => Ok(fd),
            Lower::Late { writing, .. } => self.get_or_open(writing, OFlags::WRONLY),
        }
    }

    fn get_or_open<'h>(&self, place: &'h OnceLock<OwnedFd>, flags: OFlags) -> Result<&'h OwnedFd, Errno> {
        if let Some(fd) = place.get() {
            return Ok(fd);
        }
        let fd = self.inode.reopen(flags | OFlags::NONBLOCK)?;
        Ok(place.get_or_init(|| fd))
    }
}

#[derive(Default)]
struct Slots {
    handles: Vec<Option<Arc<Handle>>>,
    free: Vec<u32>,
}

/// All open files and directories. 0 is nobody's number: the kernel names files with it that it did not ask to open.
#[derive(Default)]
pub(crate) struct Handles {
    slots: RwLock<Slots>,
    /// Of files that were not opened; those used last come last.
    standing: Mutex<Vec<Arc<Handle>>>,
}

impl Handles {
    /// Number a new handle.
    pub(crate) fn insert(&self, handle: Handle) -> u64 {
        let handle = Some(Arc::new(handle));
        let mut slots = self.slots.write();
        if let Some(slot) = slots.free.pop() {
            slots.handles[slot as usize] = handle;
            u64::from(slot) + 1
        } else {
            slots.handles.push(handle);
            slots.handles.len() as u64
        }
    }

    /// The handle of this number.
    pub(crate) fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        let slots = self.slots.read();
        let slot = usize::try_from(number.wrapping_sub(1)).map_err(|_| Errno::BADF)?;
        slots.handles.get(slot).and_then(Clone::clone).ok_or(Errno::BADF)
    }

    /// A handle for a file that was not opened.
    pub(crate) fn standing(&self, inode: &Arc<Inode>) -> Arc<Handle> {
        let mut standing = self.standing.lock();
        // Node ids are used again: only the inode itself tells which file it is.
        let found = standing.iter().rposition(|handle| Arc::ptr_eq(&handle.inode, inode));
        let handle = match found {
            Some(at) => standing.remove(at),
            None => Arc::new(Handle::late(inode.clone(), None)),
        };
        let oldest = (standing.len() == STANDING).then(|| standing.remove(0));
        standing.push(handle.clone());
        drop(standing);
        drop(oldest);
        handle
    }

    /// The kernel forgot the file: nothing of it stays open.
    pub(crate) fn forget(&self, inode: &Arc<Inode>) {
        let mut standing = self.standing.lock();
        let found = standing.iter().rposition(|handle| Arc::ptr_eq(&handle.inode, inode));
        let handle = found.map(|at| standing.remove(at));
        drop(standing);
        drop(handle);
    }

    /// The kernel closed it.
    pub(crate) fn remove(&self, number: u64) -> Option<Arc<Handle>> {
        let slot = usize::try_from(number.checked_sub(1)?).ok()?;
        let mut slots = self.slots.write();
        let handle = slots.handles.get_mut(slot)?.take();
        if handle.is_some() {
            slots.free.push(slot as u32);
        }
        handle
    }
}
