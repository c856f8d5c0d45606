//! What the kernel's page cache and tmem may hold of a file, and what a change does to that.

use std::num::NonZeroU64;

use rustix::fs::Statx;
use rustix::io::Errno;

use super::inode::Inode;
use super::stat::stat_fd;
use super::tree::Tree;
use super::version::Version;

impl Tree {
    /// Change a file through the mount, its content or what else moves its change time. The kernel's page cache
    /// follows such a change by itself; the version it stands for moves on with it, unless somebody else changed
    /// the file too.
    pub(crate) fn change<T>(
        &self,
        inode: &Inode,
        change: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        if inode.kind != libc::S_IFREG {
            return change();
        }
        let before = stat_fd(&inode.fd).ok().map(|stat| Version::of(&stat));
        let object = {
            let mut content = inode.content.lock();
            if content.changes == 0 && content.cached != before {
                content.cached = None;
            }
            content.pure_since = None;
            content.changes += 1;
            content.object.take()
        };
        let done = change();
        let after = stat_fd(&inode.fd).ok().map(|stat| Version::of(&stat));
        let mut content = inode.content.lock();
        content.changes -= 1;
        content.told = after;
        if content.changes == 0 && content.cached.is_some() {
            content.cached = after.filter(|version| self.trusted(version));
        }
        drop(content);
        // The old pages cannot be found any more; this only gives their memory back.
        if let Some(object) = object {
            self.cache.forget(object);
        }
        done
    }

    /// A file is being opened: may the kernel keep the pages it has of it?
    pub(crate) fn may_keep(&self, inode: &Inode, now: &Version) -> bool {
        let mut content = inode.content.lock();
        if content.changes > 0 {
            // Its own writers keep it up to date; whether others interfered shows once they are done.
            return content.cached.is_some();
        }
        if content.cached.as_ref() == Some(now) {
            return true;
        }
        content.cached = None;
        content.dropping = Some(*now).filter(|version| self.trusted(version)).map(Box::new);
        false
    }

    /// Whether the size and times that the kernel knows of a file that is being opened are of another version.
    pub(crate) fn is_told_old(&self, inode: &Inode, now: &Version) -> bool {
        !self.trust.lifetime.is_zero() && inode.content.lock().told.as_ref() != Some(now)
    }

    /// A file was created through the mount: the kernel has no pages of it yet.
    pub(crate) fn note_created(&self, inode: &Inode, now: &Version) {
        let mut content = inode.content.lock();
        content.cached = Some(*now).filter(|version| self.trusted(version));
    }

    /// A read was served that may not be of one settled version alone.
    pub(crate) fn note_mixed(&self, inode: &Inode) {
        if self.victims {
            inode.content.lock().pure_since = None;
        }
    }

    /// Whether pages of this version, read from the lower file, are left for the kernel to evict.
    pub(crate) fn leaves_to_evict(&self, inode: &Inode, version: &Version) -> bool {
        let content = inode.content.lock();
        self.victims && content.pure_since.is_some() && content.cached.as_ref() == Some(version)
    }

    /// Whether no later change can hide behind this version.
    fn trusted(&self, version: &Version) -> bool {
        self.trust.versions || version.settled()
    }
}

/// The kernel is being told a file's attributes.
pub(crate) fn note_told(inode: &Inode, stat: &Statx) {
    if inode.kind == libc::S_IFREG {
        inode.content.lock().told = Some(Version::of(stat));
    }
}

/// A handle whose opening at `version` made the kernel drop its pages is being read, so they are dropped: what the
/// kernel has from now on is of that version or newer.
pub(crate) fn note_dropped(inode: &Inode, version: Version) {
    let mut content = inode.content.lock();
    if content.changes == 0 && content.dropping.as_deref() == Some(&version) {
        content.dropping = None;
        content.cached = Some(version);
        content.pure_since = NonZeroU64::new(monotonic_ns());
    }
}

/// The version that a page which was evicted at `time` is of, if that is sure.
pub(crate) fn version_of_evicted(inode: &Inode, time: u64) -> Option<Version> {
    let content = inode.content.lock();
    let pure = content.pure_since.is_some_and(|since| since.get() < time);
    content.cached.filter(|_| pure && content.changes == 0)
}

/// Now, on the clock that BPF programs tell.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
