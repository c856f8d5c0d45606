//! The files the kernel knows: node ids, references, and a descriptor for each.
//!
//! An inode is held open with `O_PATH` for as long as the kernel remembers it, so the lower file system cannot give
//! its number to another file meanwhile, and (device, inode number) names it beyond doubt. The kernel sends FORGET
//! when it drops an inode from its own cache, so the number of descriptors follows memory pressure by itself.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use rustix::fs::{Mode, OFlags, Statx};
use rustix::io::Errno;

use super::abi::ROOT_ID;
use super::stat::{stat_fd, Identity};
use super::version::{ObjectName, Version};

/// What is known about a regular file's content, or about a directory's listing.
#[derive(Debug, Default)]
pub(crate) struct Content {
    /// The version whose pages the kernel's page cache may hold; `None` makes the next open drop them.
    pub(crate) cached: Option<Version>,
    /// The version at which an open last made the kernel drop its pages. It becomes `cached` once that has surely
    /// happened, which the first read through the opened handle shows: until then another open must not keep them.
    /// Few files are between the two.
    pub(crate) dropping: Option<Box<Version>>,
    /// The version whose size and times the kernel was told last.
    pub(crate) told: Option<Version>,
    /// The object that pages were put under last, to be flushed once the file changes.
    pub(crate) object: Option<tmem_wire::ObjectId>,
    /// Since when, in nanoseconds of the monotonic clock, all that the kernel's page cache got of the file came from
    /// reads of the version `cached`; `None` if not all did. Only kept where evicted pages are put.
    pub(crate) pure_since: Option<NonZeroU64>,
    /// Changes through the mount that are under way; no more than there are threads.
    pub(crate) changes: u8,
    /// Who keeps pages from being stored unasked, see [`super::around`].
    pub(crate) holds: u32,
}

/// A file the kernel knows.
pub(crate) struct Inode {
    /// Its node id.
    pub(crate) node: u64,
    /// An `O_PATH` descriptor.
    pub(crate) fd: OwnedFd,
    /// What never changes about its name in tmem, and its identity.
    pub(crate) name: ObjectName,
    /// `S_IFMT` bits.
    pub(crate) kind: u32,
    /// Its content's state.
    pub(crate) content: Mutex<Content>,
    references: AtomicU64,
}

impl Inode {
    /// The path by which the kernel re-opens `fd`, whatever the file's name is by now.
    pub(crate) fn path(&self) -> FdPath {
        FdPath::new(&self.fd)
    }

    /// Whether this is still the file's version.
    pub(crate) fn is_at(&self, version: &Version) -> bool {
        stat_fd(&self.fd).is_ok_and(|stat| Version::of(&stat) == *version)
    }

    /// Open it anew. The flags are the caller's, less what is this program's business.
    pub(crate) fn reopen(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = (flags | OFlags::CLOEXEC) & !(OFlags::NOFOLLOW | OFlags::CREATE | OFlags::EXCL);
        if self.kind == libc::S_IFDIR {
            return rustix::fs::openat(&self.fd, c".", flags, Mode::empty());
        }
        rustix::fs::open(self.path().as_c_str(), flags, Mode::empty())
    }
}

/// `/proc/self/fd/N`, NUL-terminated, on the stack.
pub(crate) struct FdPath {
    bytes: [u8; 32],
    length: usize,
}

impl FdPath {
    /// The path of an open descriptor.
    pub(crate) fn new(fd: &impl std::os::fd::AsRawFd) -> FdPath {
        use std::io::Write;
        let mut bytes = [0; 32];
        let mut rest = &mut bytes[..31];
        // A descriptor has ten digits at most, so the path always fits.
        let _ = write!(rest, "/proc/self/fd/{}", fd.as_raw_fd());
        let length = 31 - rest.len();
        FdPath { bytes, length }
    }

    /// The path for system calls.
    pub(crate) fn as_c_str(&self) -> &std::ffi::CStr {
        // The array starts as zeros and at most 31 of its 32 bytes are written.
        std::ffi::CStr::from_bytes_with_nul(&self.bytes[..=self.length]).unwrap_or(c"")
    }
}

/// Hashes [`Identity`]: both halves are numbers handed out by kernels, not by attackers.
#[derive(Default)]
pub(crate) struct IdentityHasher(u64);

impl Hasher for IdentityHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(26) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}

#[derive(Default)]
struct Slots {
    /// Node id minus one is the position.
    inodes: Vec<Option<Arc<Inode>>>,
    free: Vec<u32>,
    by_identity: HashMap<Identity, u32, BuildHasherDefault<IdentityHasher>>,
}

/// All inodes the kernel knows.
pub(crate) struct Inodes(RwLock<Slots>);

impl Inodes {
    /// A table with the root, which the kernel never forgets.
    pub(crate) fn new(root: OwnedFd, stat: &Statx) -> Inodes {
        let table = Inodes(RwLock::new(Slots::default()));
        let inode = table.intern(root, stat);
        debug_assert_eq!(inode.node, ROOT_ID);
        table
    }

    /// The inode with this node id. `ESTALE` if the kernel was told of no such node.
    pub(crate) fn get(&self, node: u64) -> Result<Arc<Inode>, Errno> {
        let slots = self.0.read();
        let slot = usize::try_from(node.wrapping_sub(1)).map_err(|_| Errno::STALE)?;
        slots.inodes.get(slot).and_then(Clone::clone).ok_or(Errno::STALE)
    }

    /// The inode of `fd`, with one more reference. If it is known already, `fd` is closed.
    pub(crate) fn intern(&self, fd: OwnedFd, stat: &Statx) -> Arc<Inode> {
        let identity = Identity::of(stat);
        if let Some(found) = self.reference(&self.0.read(), &identity) {
            return found;
        }
        let mut slots = self.0.write();
        if let Some(found) = self.reference(&slots, &identity) {
            return found;
        }
        let slot = slots.free.pop().unwrap_or_else(|| {
            slots.inodes.push(None);
            slots.inodes.len() as u32 - 1
        });
        let inode = Arc::new(Inode {
            node: u64::from(slot) + 1,
            fd,
            name: ObjectName::of(stat),
            kind: u32::from(stat.stx_mode) & libc::S_IFMT,
            content: Mutex::default(),
            references: AtomicU64::new(1),
        });
        slots.inodes[slot as usize] = Some(inode.clone());
        slots.by_identity.insert(identity, slot);
        inode
    }

    /// The inode a `statx` tells of, if it is known, with one more reference.
    pub(crate) fn reference_to(&self, stat: &Statx) -> Option<Arc<Inode>> {
        self.reference(&self.0.read(), &Identity::of(stat))
    }

    /// Take one more reference to an inode that the kernel knows, so that its node id stays its own until
    /// [`Inodes::forget`]; `false` if the kernel has just forgotten it.
    pub(crate) fn keep(&self, inode: &Inode) -> bool {
        let slots = self.0.read();
        let found = slots.inodes[inode.node as usize - 1].as_deref();
        let known = found.is_some_and(|found| std::ptr::eq(found, inode));
        if known {
            inode.references.fetch_add(1, Ordering::Relaxed);
        }
        known
    }

    // References grow under at least the read lock and reach zero under the write lock only, so an inode that is
    // found here cannot be on its way out.
    fn reference(&self, slots: &Slots, identity: &Identity) -> Option<Arc<Inode>> {
        let _ = self;
        let slot = *slots.by_identity.get(identity)?;
        let inode = slots.inodes[slot as usize].clone()?;
        inode.references.fetch_add(1, Ordering::Relaxed);
        Some(inode)
    }

    /// The inode with this identity, if the kernel knows it. No reference is taken.
    pub(crate) fn find(&self, identity: &Identity) -> Option<Arc<Inode>> {
        let slots = self.0.read();
        let slot = *slots.by_identity.get(identity)?;
        slots.inodes[slot as usize].clone()
    }

    /// The kernel gives `count` references back. Returns the inode if they were the last.
    pub(crate) fn forget(&self, node: u64, count: u64) -> Option<Arc<Inode>> {
        if node == ROOT_ID {
            return None;
        }
        let slot = usize::try_from(node.wrapping_sub(1)).ok()?;
        let mut slots = self.0.write();
        let inode = slots.inodes.get(slot)?.as_ref()?;
        let left = inode.references.load(Ordering::Relaxed).saturating_sub(count);
        inode.references.store(left, Ordering::Relaxed);
        if left > 0 {
            return None;
        }
        let inode = slots.inodes[slot].take()?;
        slots.by_identity.remove(&inode.name.identity);
        slots.free.push(slot as u32);
        if slots.by_identity.is_empty() || slots.by_identity.capacity() > 8 * slots.by_identity.len() + 1024 {
            // A walk over a large tree should not leave its memory behind.
            slots.by_identity.shrink_to_fit();
        }
        Some(inode)
    }

    /// How many inodes the kernel knows.
    pub(crate) fn len(&self) -> usize {
        self.0.read().by_identity.len()
    }
}
