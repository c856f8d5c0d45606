//! Open files and directories, by the number the kernel names them with.

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use rustix::io::Errno;

use super::dir::Listing;
use super::inode::Inode;
use super::version::Version;

/// An open file or directory.
pub(crate) struct Handle {
    /// What is open.
    pub(crate) inode: Arc<Inode>,
    /// The lower descriptor, opened as the caller asked (but never with `O_APPEND` or `O_DIRECT`).
    pub(crate) fd: OwnedFd,
    /// For regular files: a descriptor for reading past the lower page cache, made at the first read that wants it.
    /// `None` inside if the lower file system cannot.
    pub(crate) direct: OnceLock<Option<OwnedFd>>,
    /// The version at which opening it made the kernel drop its pages or listing, until the first read.
    pub(crate) dropped: Mutex<Option<Version>>,
    /// For directories: where the listing stands.
    pub(crate) listing: Mutex<Listing>,
}

impl Handle {
    /// A handle on an open lower descriptor.
    pub(crate) fn new(inode: Arc<Inode>, fd: OwnedFd, dropped: Option<Version>) -> Handle {
        Handle { inode, fd, direct: OnceLock::new(), dropped: Mutex::new(dropped), listing: Mutex::default() }
    }
}

#[derive(Default)]
struct Slots {
    handles: Vec<Option<Arc<Handle>>>,
    free: Vec<u32>,
}

/// All open files and directories.
#[derive(Default)]
pub(crate) struct Handles(RwLock<Slots>);

impl Handles {
    /// Number a new handle.
    pub(crate) fn insert(&self, handle: Handle) -> u64 {
        let handle = Some(Arc::new(handle));
        let mut slots = self.0.write();
        if let Some(slot) = slots.free.pop() {
            slots.handles[slot as usize] = handle;
            slot.into()
        } else {
            slots.handles.push(handle);
            slots.handles.len() as u64 - 1
        }
    }

    /// The handle of this number.
    pub(crate) fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        let slots = self.0.read();
        let slot = usize::try_from(number).map_err(|_| Errno::BADF)?;
        slots.handles.get(slot).and_then(Clone::clone).ok_or(Errno::BADF)
    }

    /// The kernel closed it.
    pub(crate) fn remove(&self, number: u64) -> Option<Arc<Handle>> {
        let slot = usize::try_from(number).ok()?;
        let mut slots = self.0.write();
        let handle = slots.handles.get_mut(slot)?.take();
        if handle.is_some() {
            slots.free.push(number as u32);
        }
        handle
    }
}
