//! The shared memory that holds everything that must outlive the process.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicU8};

use rustix::fs::{FallocateFlags, FlockOperation, MemfdFlags, Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::config::ArenaBacking;
use crate::error::OpenError;
use crate::layout::{HEAD_BYTES, MAX_SLABS, SLAB_TABLE};

/// A mapped arena. The whole address range it may grow to is mapped from the start; memory is taken slab by slab.
pub(crate) struct Arena {
    base: NonNull<u8>,
    map_bytes: usize,
    slab_bytes: usize,
    fd: OwnedFd,
    path: Option<PathBuf>,
}

// SAFETY: the mapping lives as long as the arena and is not tied to a thread. What is in it is reached only through
// atomics, or by the one owner of a slot (see `slot`).
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

/// An opened, locked, not yet mapped arena.
pub(crate) struct ArenaFile {
    fd: OwnedFd,
    path: Option<PathBuf>,
}

impl ArenaFile {
    pub(crate) fn open(backing: &ArenaBacking) -> Result<ArenaFile, OpenError> {
        let (fd, path) = match backing {
            ArenaBacking::Memfd => {
                let fd = rustix::fs::memfd_create("tmem-arena", MemfdFlags::CLOEXEC)
                    .map_err(|errno| io("create", None, errno))?;
                (fd, None)
            }
            ArenaBacking::Adopt(fd) => {
                let fd =
                    fd.try_clone().map_err(|source| OpenError::Io { what: "adopt", path: None, source })?;
                (fd, None)
            }
            ArenaBacking::File(path) => (open_file(path)?, Some(path.clone())),
        };
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(ArenaFile { fd, path }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::InUse { path }),
            Err(errno) => Err(io("lock", path.as_deref(), errno)),
        }
    }

    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    pub(crate) fn len(&self) -> Result<u64, OpenError> {
        let stat = rustix::fs::fstat(&self.fd).map_err(|errno| io("size", self.path(), errno))?;
        Ok(stat.st_size as u64)
    }

    pub(crate) fn set_len(&self, bytes: u64) -> Result<(), OpenError> {
        rustix::fs::ftruncate(&self.fd, bytes).map_err(|errno| io("size", self.path(), errno))
    }

    /// The first bytes, for the superblock.
    pub(crate) fn read_start(&self, buffer: &mut [u8]) -> Result<(), OpenError> {
        let read =
            rustix::io::pread(&self.fd, &mut *buffer, 0).map_err(|errno| io("read", self.path(), errno))?;
        buffer[read..].fill(0);
        Ok(())
    }

    /// Move an unusable arena out of the way; its new name, if it has one.
    pub(crate) fn keep_aside(&self) -> Option<PathBuf> {
        let path = self.path.as_ref()?;
        let mut number = 1;
        loop {
            let mut name = path.as_os_str().to_owned();
            name.push(format!(".damaged-{number}"));
            let aside = PathBuf::from(name);
            // A link first: it fails, and nothing is lost, if the name is taken.
            match std::fs::hard_link(path, &aside) {
                Ok(()) => return std::fs::remove_file(path).ok().map(|()| aside),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(_) => return None,
            }
        }
    }

    /// Map it, with room to grow to the most slabs there can be.
    pub(crate) fn map(self, slab_bytes: u32) -> Result<Arena, OpenError> {
        let map_bytes = HEAD_BYTES + MAX_SLABS as usize * slab_bytes as usize;
        // SAFETY: a new mapping at an address the kernel chooses overlaps nothing.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                map_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &self.fd,
                0,
            )
        }
        .map_err(|errno| io("map", self.path(), errno))?;
        let Some(base) = NonNull::new(base.cast()) else {
            return Err(OpenError::Config("the kernel mapped the arena at address 0".into()));
        };
        Ok(Arena { base, map_bytes, slab_bytes: slab_bytes as usize, fd: self.fd, path: self.path })
    }
}

fn open_file(path: &Path) -> Result<OwnedFd, OpenError> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|source| OpenError::Io {
            what: "create the directory of",
            path: Some(path.into()),
            source,
        })?;
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|errno| io("open", Some(path), errno))
}

fn io(what: &'static str, path: Option<&Path>, errno: rustix::io::Errno) -> OpenError {
    OpenError::Io { what, path: path.map(Into::into), source: errno.into() }
}

impl Arena {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Extend the file so that it holds this many slabs. It never gets shorter: what is not used is a hole.
    pub(crate) fn cover(&self, slabs: u32) -> std::io::Result<()> {
        let want = (HEAD_BYTES + slabs as usize * self.slab_bytes) as u64;
        let have = File::from(self.fd.try_clone()?).metadata()?.len();
        if have < want {
            rustix::fs::ftruncate(&self.fd, want)?;
        }
        Ok(())
    }

    /// Address of a byte of the arena.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.map_bytes);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// A 32-bit word of the arena.
    pub(crate) fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset % 4 == 0 && offset + 4 <= self.map_bytes);
        // SAFETY: in bounds and aligned, and the file covers it: callers stay within the head or a backed slab.
        // All sharing of arena words goes through atomics.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    /// A 64-bit word of the arena.
    pub(crate) fn long(&self, offset: usize) -> &AtomicU64 {
        assert!(offset % 8 == 0 && offset + 8 <= self.map_bytes);
        // SAFETY: as for `word`.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    /// Entry of the slab table: 0, or class + 1.
    pub(crate) fn slab_class(&self, slab: u32) -> &AtomicU8 {
        assert!(slab < MAX_SLABS);
        // SAFETY: in bounds; shared only through atomics.
        unsafe { AtomicU8::from_ptr(self.base.as_ptr().add(SLAB_TABLE + slab as usize)) }
    }

    /// Offset of a slab's first byte.
    pub(crate) fn slab_offset(&self, slab: u32) -> usize {
        HEAD_BYTES + slab as usize * self.slab_bytes
    }

    /// Take host memory for a slab that has none. Zeroed. Fails rather than being killed by SIGBUS later.
    pub(crate) fn back(&self, slab: u32) -> std::io::Result<()> {
        let (offset, bytes) = (self.slab_offset(slab) as u64, self.slab_bytes as u64);
        // A signal may interrupt tmpfs while it allocates.
        Ok(rustix::io::retry_on_intr(|| {
            rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), offset, bytes)
        })?)
    }

    /// Give a slab's memory back to the host.
    pub(crate) fn punch(&self, slab: u32) -> std::io::Result<()> {
        let (offset, bytes) = (self.slab_offset(slab) as u64, self.slab_bytes as u64);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.fd, flags, offset, bytes))?)
    }

    /// Map a slab's pages at once instead of one fault at a time. Only a matter of speed.
    pub(crate) fn populate(&self, slab: u32) {
        let start = self.at(self.slab_offset(slab));
        // SAFETY: within the mapping; populating changes no content.
        let _ = unsafe {
            rustix::mm::madvise(start.cast(), self.slab_bytes, rustix::mm::Advice::LinuxPopulateRead)
        };
    }

    /// Overwrite a slab with zeros. The caller owns all of it: no slot of it is in use.
    pub(crate) fn zero(&self, slab: u32) {
        // SAFETY: in bounds, and nobody else reads or writes an unassigned slab.
        unsafe { std::ptr::write_bytes(self.at(self.slab_offset(slab)), 0, self.slab_bytes) };
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: nothing borrowed from the arena outlives it. A failure leaves the mapping until the process ends.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.map_bytes) };
    }
}
