//! Listing directories.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, Dirent, EntryOut, FsyncIn, OpenIn, OpenOut, ReadIn, ReleaseIn};
use super::content::note_dropped;
use super::device::last_error;
use super::handle::Handle;
use super::stat::{stat_fd, Identity};
use super::tree::{Call, Done, Tree};
use super::version::Version;

/// Bytes asked of the lower file system at a time.
const CHUNK_BYTES: usize = 8192;
/// Bytes before the name in the kernel's `linux_dirent64`.
const NAME_AT: usize = 19;

/// What the lower file system listed and the kernel has not been told yet.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    chunk: Vec<u8>,
    at: usize,
    /// The offset the kernel will ask for if it goes on where it stopped.
    offset: u64,
}

impl Listing {
    /// Go to an offset the kernel asks for. Who begins anew must not be told what somebody else left.
    fn seek(&mut self, fd: &OwnedFd, offset: u64) -> Done {
        if self.offset != offset || offset == 0 {
            self.chunk.clear();
            self.at = 0;
            rustix::fs::seek(fd, rustix::fs::SeekFrom::Start(offset))?;
            self.offset = offset;
        }
        Ok(())
    }

    /// The entry at hand and the bytes it takes; `None` at the end.
    fn peek(&mut self, fd: &OwnedFd) -> Result<Option<(Dirent, &CStr, usize)>, Errno> {
        if self.at == self.chunk.len() {
            self.at = 0;
            self.chunk.resize(CHUNK_BYTES, 0);
            // SAFETY: the kernel writes at most the length given, which is the buffer's.
            let length = unsafe {
                libc::syscall(libc::SYS_getdents64, fd.as_raw_fd(), self.chunk.as_mut_ptr(), self.chunk.len())
            };
            self.chunk.truncate(usize::try_from(length).unwrap_or(0));
            if length < 0 {
                return match last_error() {
                    // The directory itself was removed: it lists nothing.
                    Errno::NOENT => Ok(None),
                    other => Err(other),
                };
            }
            if length == 0 {
                self.chunk = Vec::new();
                return Ok(None);
            }
        }
        let entry = &self.chunk[self.at..];
        let bad = Errno::IO;
        let (ino, rest) = u64::read_from_prefix(entry).map_err(|_| bad)?;
        let (off, rest) = u64::read_from_prefix(rest).map_err(|_| bad)?;
        let (length, rest) = u16::read_from_prefix(rest).map_err(|_| bad)?;
        let kind = *rest.first().ok_or(bad)?;
        let name =
            CStr::from_bytes_until_nul(entry.get(NAME_AT..length.into()).ok_or(bad)?).map_err(|_| bad)?;
        let dirent = Dirent { ino, off, namelen: name.count_bytes() as u32, kind: kind.into() };
        Ok(Some((dirent, name, length.into())))
    }
}

/// Bytes of an entry with a name this long, in the answer.
fn dirent_bytes(name: usize) -> usize {
    (size_of::<Dirent>() + name).next_multiple_of(8)
}

fn push_dirent(out: &mut Vec<u8>, entry: &Dirent, name: &[u8]) {
    out.extend_from_slice(entry.as_bytes());
    out.extend_from_slice(name);
    out.resize(out.len().next_multiple_of(8), 0);
}

impl Tree {
    pub(crate) fn opendir(&self, call: &mut Call) -> Done {
        if self.trust.openless_directories {
            // The kernel does not ask again, and keeps listings.
            return Err(Errno::NOSYS);
        }
        let inode = self.target(call)?;
        let _: OpenIn = call.args.take()?;
        // Without reports of changes, the kernel would keep a listing for as long as the directory's time is the
        // same to it.
        let (mut open_flags, mut dropped) = (0, None);
        if !self.trust.lifetime.is_zero() {
            let now = Version::of(&stat_fd(&inode.fd)?);
            open_flags = abi::FOPEN_CACHE_DIR;
            if self.may_keep(&inode, &now) {
                open_flags |= abi::FOPEN_KEEP_CACHE;
            } else {
                dropped = Some(now);
            }
        }
        // The kernel has checked that the caller may, and mostly has the listing.
        let fh = self.handles.insert(Handle::late(inode, dropped));
        call.reply(&OpenOut { fh, open_flags, backing_id: 0 });
        Ok(())
    }

    pub(crate) fn releasedir(&self, call: &mut Call) -> Done {
        let asked: ReleaseIn = call.args.take()?;
        self.handles.remove(asked.fh);
        Ok(())
    }

    pub(crate) fn fsyncdir(&self, call: &mut Call) -> Done {
        let asked: FsyncIn = call.args.take()?;
        rustix::fs::fsync(self.handle(call.header.nodeid, asked.fh)?.reading()?)
    }

    pub(crate) fn readdir(&self, call: &mut Call) -> Done {
        self.list(call, |_, out, room, entry, name| {
            if dirent_bytes(name.count_bytes()) > room {
                return false;
            }
            push_dirent(out, entry, name.to_bytes());
            true
        })
    }

    pub(crate) fn readdirplus(&self, call: &mut Call) -> Done {
        let parent = self.target(call)?;
        let mut entered = std::mem::take(call.entered);
        let done = self.list(call, |tree, out, room, entry, name| {
            let bytes = size_of::<EntryOut>() + dirent_bytes(name.count_bytes());
            if bytes > room {
                return false;
            }
            let at = out.len();
            out.extend_from_slice(EntryOut::default().as_bytes());
            // The kernel takes "." and ".." as names only. A file that went away meanwhile has no attributes.
            if name != c"." && name != c".." {
                let listed = Identity { device: parent.name.identity.device, inode: entry.ino };
                let known = tree.inodes.find(&listed).is_some();
                if let Ok((inode, stat)) = tree.enter(&parent, name, known) {
                    entered.push(inode.node);
                    let told = tree.entry(&inode, &stat);
                    out[at..at + size_of::<EntryOut>()].copy_from_slice(told.as_bytes());
                }
            }
            push_dirent(out, entry, name.to_bytes());
            true
        });
        *call.entered = entered;
        done
    }

    fn list(
        &self,
        call: &mut Call,
        mut push: impl FnMut(&Tree, &mut Vec<u8>, usize, &Dirent, &CStr) -> bool,
    ) -> Done {
        let asked: ReadIn = call.args.take()?;
        let handle = self.handle(call.header.nodeid, asked.fh)?;
        if let Some(version) = handle.dropped.lock().take() {
            note_dropped(&handle.inode, version);
        }
        let size = asked.size as usize;
        let mut listing = handle.listing.lock();
        let fd = handle.reading()?;
        listing.seek(fd, asked.offset)?;
        loop {
            let (dirent, bytes) = match listing.peek(fd) {
                Ok(Some((dirent, name, bytes))) => {
                    let room = size - call.out.len();
                    if !push(self, call.out, room, &dirent, name) {
                        return Ok(());
                    }
                    (dirent, bytes)
                }
                Err(error) if call.out.is_empty() => return Err(error),
                Ok(None) | Err(_) => return Ok(()),
            };
            listing.at += bytes;
            listing.offset = dirent.off;
        }
    }
}
