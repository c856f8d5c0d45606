//! The file system: what is mounted, and the operations on names.

use std::ffi::CStr;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Statx};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::abi::{
    self, Args, BatchForgetIn, EntryOut, ForgetIn, ForgetOne, InHeader, LinkIn, MkdirIn, MknodIn, Rename2In,
    RenameIn,
};
use super::around::Around;
use super::attr;
use super::buffer::Buffers;
use super::cache::Cache;
use super::caller::{Caller, Rights};
use super::content::note_told;
use super::device::Device;
use super::handle::{Handle, Handles};
use super::inode::{Inode, Inodes};
use super::stat::{stat_fd, Identity, STAT};

/// How changes made behind the mount, in the lower directory itself, are met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trust {
    /// How long the kernel may keep names and attributes without asking.
    pub(crate) lifetime: Duration,
    /// Whether every change made behind the mount is sure to show in a file's version: change times are fine
    /// enough, or the changes are reported, or there are none.
    pub(crate) versions: bool,
    /// Whether the kernel need not ask for regular files to be opened.
    pub(crate) openless: bool,
    /// Whether it need not ask for directories to be opened.
    pub(crate) openless_directories: bool,
}

/// A mounted directory.
pub(crate) struct Tree {
    /// Files the kernel knows.
    pub(crate) inodes: Inodes,
    /// Open files.
    pub(crate) handles: Handles,
    /// What the kernel may keep.
    pub(crate) trust: Trust,
    /// Pages in tmem.
    pub(crate) cache: Arc<Cache>,
    /// Whether the lower file system is one whose pages may be kept in tmem.
    pub(crate) cacheable: bool,
    /// Whether pages are put when the kernel evicts them, and not when they are read.
    pub(crate) victims: bool,
    /// Whether no two changes of a file can have one change time, however close they are, once it was looked at.
    pub(crate) fine_clock: bool,
    /// Pages read around those that were asked for.
    pub(crate) around: Around,
    /// Memory for reads.
    pub(crate) buffers: Arc<Buffers>,
}

/// One request being served.
pub(crate) struct Call<'w> {
    /// The request's header.
    pub(crate) header: InHeader,
    /// All of the request.
    pub(crate) request: &'w [u8],
    /// Its arguments.
    pub(crate) args: Args<'w>,
    /// The answer's body, empty at first.
    pub(crate) out: &'w mut Vec<u8>,
    /// Nodes whose references the answer hands to the kernel.
    pub(crate) entered: &'w mut Vec<u64>,
    /// What this thread may do.
    pub(crate) rights: &'w Rights,
    /// Where the answer goes.
    pub(crate) device: &'w Arc<Device>,
    /// Whether the answer is on its way already, or somebody else's business.
    pub(crate) sent: bool,
}

impl Call<'_> {
    /// Who asked.
    pub(crate) fn caller(&self) -> Caller {
        Caller { uid: self.header.uid, gid: self.header.gid }
    }

    /// Answer at once with these bytes. If nobody waits for the answer any more, nothing is lost.
    pub(crate) fn send(&mut self, body: &[u8]) {
        self.sent = true;
        if let Err(error) = self.device.answer(self.header.unique, 0, &[body]) {
            log::debug!("a read was not waited for: {error}");
        }
    }

    /// Append a struct to the answer.
    pub(crate) fn reply<T: IntoBytes + zerocopy::Immutable>(&mut self, body: &T) {
        self.out.extend_from_slice(body.as_bytes());
    }
}

/// Outcome of an operation: the answer's body is in [`Call::out`].
pub(crate) type Done = Result<(), Errno>;

impl Tree {
    /// The inode the request is about.
    pub(crate) fn target(&self, call: &Call) -> Result<Arc<Inode>, Errno> {
        self.inodes.get(call.header.nodeid)
    }

    /// What the kernel names by a node and the number of an open file, 0 if it did not ask to open it.
    pub(crate) fn handle(&self, node: u64, number: u64) -> Result<Arc<Handle>, Errno> {
        if number == 0 && (self.trust.openless || self.trust.openless_directories) {
            Ok(self.handles.standing(&self.inodes.get(node)?))
        } else {
            self.handles.get(number)
        }
    }

    /// Find a name in a directory and take a reference for the kernel. What is probably `known` is looked at first, for
    /// it need not be opened.
    pub(crate) fn enter(
        &self,
        parent: &Inode,
        name: &CStr,
        known: bool,
    ) -> Result<(Arc<Inode>, Statx), Errno> {
        if known {
            let stat = rustix::fs::statx(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW, STAT)?;
            // A known inode is held open, so no other file can have its number.
            if let Some(inode) = self.inodes.reference_to(&stat) {
                return Ok((inode, stat));
            }
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&parent.fd, name, flags, Mode::empty())?;
        let stat = stat_fd(&fd)?;
        Ok((self.inodes.intern(fd, &stat), stat))
    }

    /// The answer that tells the kernel of an inode.
    pub(crate) fn entry(&self, inode: &Inode, stat: &Statx) -> EntryOut {
        note_told(inode, stat);
        EntryOut {
            nodeid: inode.node,
            generation: 0,
            entry_valid: self.trust.lifetime.as_secs(),
            attr_valid: self.trust.lifetime.as_secs(),
            entry_valid_nsec: self.trust.lifetime.subsec_nanos(),
            attr_valid_nsec: self.trust.lifetime.subsec_nanos(),
            attr: attr::attr(stat),
        }
    }

    fn reply_entry(&self, call: &mut Call, parent: &Inode, name: &CStr) -> Done {
        // A kernel that may keep names asks for those that it does not know.
        let (inode, stat) = self.enter(parent, name, self.trust.lifetime.is_zero())?;
        call.entered.push(inode.node);
        call.reply(&self.entry(&inode, &stat));
        Ok(())
    }

    pub(crate) fn lookup(&self, call: &mut Call) -> Done {
        let parent = self.target(call)?;
        let name = call.args.name()?;
        match self.reply_entry(call, &parent, name) {
            Err(Errno::NOENT) if !self.trust.lifetime.is_zero() => {
                // Node id 0: there is no such name, and that may be remembered.
                let nothing = EntryOut {
                    entry_valid: self.trust.lifetime.as_secs(),
                    entry_valid_nsec: self.trust.lifetime.subsec_nanos(),
                    ..EntryOut::default()
                };
                call.reply(&nothing);
                Ok(())
            }
            other => other,
        }
    }

    pub(crate) fn forget(&self, call: &mut Call) -> Done {
        let asked: ForgetIn = call.args.take()?;
        self.drop_references(call.header.nodeid, asked.nlookup);
        Ok(())
    }

    pub(crate) fn batch_forget(&self, call: &mut Call) -> Done {
        let asked: BatchForgetIn = call.args.take()?;
        for _ in 0..asked.count {
            let one: ForgetOne = call.args.take()?;
            self.drop_references(one.nodeid, one.nlookup);
        }
        Ok(())
    }

    /// The kernel gives references back. When a removed file goes for good, so do its pages.
    pub(crate) fn drop_references(&self, node: u64, count: u64) {
        if let Some(inode) = self.inodes.forget(node, count) {
            self.handles.forget(&inode);
            let object = inode.content.lock().object.take();
            if let Some(object) = object {
                if stat_fd(&inode.fd).is_ok_and(|stat| stat.stx_nlink == 0) {
                    self.cache.forget(object);
                }
            }
        }
    }

    pub(crate) fn mknod(&self, call: &mut Call) -> Done {
        let parent = self.target(call)?;
        let asked: MknodIn = call.args.take()?;
        let name = call.args.name()?;
        let kind = FileType::from_raw_mode(asked.mode);
        let device = decode_device(asked.rdev);
        call.rights.create(call.caller(), asked.umask, || {
            rustix::fs::mknodat(&parent.fd, name, kind, Mode::from_raw_mode(asked.mode & 0o7777), device)
        })?;
        self.reply_entry(call, &parent, name)
    }

    pub(crate) fn mkdir(&self, call: &mut Call) -> Done {
        let parent = self.target(call)?;
        let asked: MkdirIn = call.args.take()?;
        let name = call.args.name()?;
        call.rights.create(call.caller(), asked.umask, || {
            rustix::fs::mkdirat(&parent.fd, name, Mode::from_raw_mode(asked.mode & 0o7777))
        })?;
        self.reply_entry(call, &parent, name)
    }

    pub(crate) fn symlink(&self, call: &mut Call) -> Done {
        let parent = self.target(call)?;
        let (name, content) = (call.args.name()?, call.args.name()?);
        call.rights.create(call.caller(), 0, || rustix::fs::symlinkat(content, &parent.fd, name))?;
        self.reply_entry(call, &parent, name)
    }

    pub(crate) fn readlink(&self, call: &mut Call) -> Done {
        let inode = self.target(call)?;
        let content = rustix::fs::readlinkat(&inode.fd, c"", Vec::new())?;
        call.out.extend_from_slice(content.to_bytes());
        Ok(())
    }

    pub(crate) fn unlink(&self, call: &mut Call) -> Done {
        let parent = self.target(call)?;
        rustix::fs::unlinkat(&parent.fd, call.args.name()?, AtFlags::empty())
    }

    pub(crate) fn rmdir(&self, call: &mut Call) -> Done {
        let parent = self.target(call)?;
        rustix::fs::unlinkat(&parent.fd, call.args.name()?, AtFlags::REMOVEDIR)
    }

    pub(crate) fn rename(&self, call: &mut Call) -> Done {
        let asked: RenameIn = call.args.take()?;
        self.rename_to(call, asked.newdir, 0)
    }

    pub(crate) fn rename2(&self, call: &mut Call) -> Done {
        let asked: Rename2In = call.args.take()?;
        self.rename_to(call, asked.newdir, asked.flags)
    }

    fn rename_to(&self, call: &mut Call, new_parent: u64, flags: u32) -> Done {
        let old_parent = self.target(call)?;
        let new_parent = self.inodes.get(new_parent)?;
        let (old_name, new_name) = (call.args.name()?, call.args.name()?);
        let flags = RenameFlags::from_bits_retain(flags);
        let rename = || {
            // RENAME_WHITEOUT creates a device node, hence the caller.
            call.rights.create(call.caller(), 0, || {
                rustix::fs::renameat_with(&old_parent.fd, old_name, &new_parent.fd, new_name, flags)
            })
        };
        // A rename moves the change time, and must not cost the file its cached pages.
        let stat = rustix::fs::statx(&old_parent.fd, old_name, AtFlags::SYMLINK_NOFOLLOW, STAT)?;
        match self.inodes.find(&Identity::of(&stat)) {
            Some(inode) => self.change(&inode, rename),
            None => rename(),
        }
    }

    pub(crate) fn link(&self, call: &mut Call) -> Done {
        let parent = self.target(call)?;
        let asked: LinkIn = call.args.take()?;
        let name = call.args.name()?;
        let inode = self.inodes.get(asked.oldnodeid)?;
        self.change(&inode, || rustix::fs::linkat(&inode.fd, c"", &parent.fd, name, AtFlags::EMPTY_PATH))?;
        self.reply_entry(call, &parent, name)
    }
}

/// Device numbers travel in the kernel's new 32-bit encoding.
fn decode_device(rdev: u32) -> rustix::fs::Dev {
    rustix::fs::makedev((rdev & 0xf_ff00) >> 8, (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00))
}

/// The reverse of [`decode_device`].
pub(crate) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Whether the request's answer is a number the kernel acts on, or nothing at all.
pub(crate) fn is_answered(opcode: abi::Opcode) -> bool {
    !matches!(opcode, abi::Opcode::Forget | abi::Opcode::BatchForget)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_the_encoding() {
        for (major, minor) in [(8, 1), (259, 70000), (0xfff, 0xf_ffff)] {
            let device = decode_device(encode_device(major, minor));
            assert_eq!((rustix::fs::major(device), rustix::fs::minor(device)), (major, minor));
        }
    }
}
