//! Operations on open files, except reading: open, create, write, and what else changes or asks about content.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags};

use super::abi::{
    self, CopyFileRangeIn, CreateIn, FallocateIn, FsyncIn, LseekIn, LseekOut, OpenIn, OpenOut, ReleaseIn,
    WriteIn, WriteOut,
};
use super::device::last_error;
use super::handle::Handle;
use super::inode::FdPath;
use super::stat::stat_fd;
use super::tree::{Call, Done, Tree};
use super::version::Version;

/// Flags of the caller's open that the lower open has too. `O_APPEND` is applied to each write, because it may be
/// switched while the file is open; `O_DIRECT` speaks of the caller's buffers, not of ours.
fn lower_flags(flags: u32) -> OFlags {
    let mut flags = OFlags::from_bits_retain(flags);
    flags.remove(OFlags::APPEND | OFlags::DIRECT | OFlags::NOATIME);
    // The caller's non-blocking mode means nothing on regular files, and saves us from waiting for leases.
    flags | OFlags::CLOEXEC
}

/// Whether a file opened with these flags may be written to.
fn may_write(flags: u32) -> bool {
    OFlags::from_bits_retain(flags) & OFlags::RWMODE != OFlags::RDONLY
}

impl Tree {
    fn reply_open(&self, call: &mut Call, handle: Handle, keep: bool) {
        let open_flags = abi::FOPEN_NOFLUSH | if keep { abi::FOPEN_KEEP_CACHE } else { 0 };
        let fh = self.handles.insert(handle);
        call.reply(&OpenOut { fh, open_flags, backing_id: 0 });
    }

    pub(crate) fn open(&self, call: &mut Call) -> Done {
        if self.trust.openless {
            // The kernel does not ask again.
            return Err(Errno::NOSYS);
        }
        let inode = self.target(call)?;
        let asked: OpenIn = call.args.take()?;
        let Some(hold) = self.around.hold_for(call, &inode) else { return Ok(()) };
        // The kernel truncates by SETATTR, after its own checks.
        let fd = inode.reopen(lower_flags(asked.flags) - OFlags::TRUNC)?;
        let now = Version::of(&stat_fd(&fd)?);
        let keep = self.may_keep(&inode, &now);
        if self.is_told_old(&inode, &now) {
            // A reader must not stop at the size of before. ENOENT: the kernel does not keep attributes of it.
            let _ = call.device.invalidate_inode(inode.node, -1);
        }
        let hold = Some(hold).filter(|_| may_write(asked.flags));
        self.reply_open(call, Handle::new(inode, fd, Some(now).filter(|_| !keep), hold), keep);
        Ok(())
    }

    pub(crate) fn create(&self, call: &mut Call) -> Done {
        let parent = self.target(call)?;
        let asked: CreateIn = call.args.take()?;
        let name = call.args.name()?;
        let flags = lower_flags(asked.flags) | OFlags::CREATE | OFlags::NOFOLLOW;
        let mode = Mode::from_raw_mode(asked.mode & 0o7777);
        let fd = call.rights.create(call.caller(), asked.umask, || {
            match rustix::fs::openat(&parent.fd, name, flags | OFlags::EXCL, mode) {
                // Somebody was faster, behind the mount or through another name cache.
                Err(Errno::EXIST) if !flags.contains(OFlags::EXCL) => {
                    rustix::fs::openat(&parent.fd, name, flags, mode).map(|fd| (fd, false))
                }
                other => other.map(|fd| (fd, true)),
            }
        });
        let (fd, fresh) = fd?;
        let path =
            rustix::fs::open(FdPath::new(&fd).as_c_str(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        self.reply_created(call, path, fd, asked.flags, fresh)
    }

    pub(crate) fn tmpfile(&self, call: &mut Call) -> Done {
        let parent = self.target(call)?;
        let asked: CreateIn = call.args.take()?;
        let flags = (lower_flags(asked.flags) - OFlags::CREATE) | OFlags::TMPFILE;
        let mode = Mode::from_raw_mode(asked.mode & 0o7777);
        let path = parent.path();
        let fd = call
            .rights
            .create(call.caller(), asked.umask, || rustix::fs::open(path.as_c_str(), flags, mode))?;
        let path =
            rustix::fs::open(FdPath::new(&fd).as_c_str(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        self.reply_created(call, path, fd, asked.flags, true)
    }

    fn reply_created(&self, call: &mut Call, path: OwnedFd, fd: OwnedFd, flags: u32, fresh: bool) -> Done {
        let stat = stat_fd(&path)?;
        let inode = self.inodes.intern(path, &stat);
        call.entered.push(inode.node);
        // Pages are being stored into what somebody else was faster to create: the kernel tries anew, and will find it.
        let hold = self.around.hold(&inode).ok_or(Errno::STALE)?;
        if fresh {
            self.note_created(&inode, &Version::of(&stat));
        }
        call.reply(&self.entry(&inode, &stat));
        if self.trust.openless {
            // Not every kernel would tell when such a handle is not needed any more.
            let open_flags = abi::FOPEN_NOFLUSH | abi::FOPEN_KEEP_CACHE;
            call.reply(&OpenOut { fh: 0, open_flags, backing_id: 0 });
        } else {
            let hold = Some(hold).filter(|_| may_write(flags));
            self.reply_open(call, Handle::new(inode, fd, None, hold), false);
        }
        Ok(())
    }

    pub(crate) fn release(&self, call: &mut Call) -> Done {
        let asked: ReleaseIn = call.args.take()?;
        self.handles.remove(asked.fh);
        Ok(())
    }

    pub(crate) fn write(&self, call: &mut Call) -> Done {
        let asked: WriteIn = call.args.take()?;
        let data = call.args.bytes(asked.size as usize)?;
        let handle = self.handle(call.header.nodeid, asked.fh)?;
        let append = OFlags::from_bits_retain(asked.flags).contains(OFlags::APPEND)
            && asked.write_flags & abi::WRITE_CACHE == 0;
        let fresh;
        let fd = match handle.writing() {
            // A file that can only be appended to.
            Err(Errno::PERM) if append => {
                fresh = handle.inode.reopen(OFlags::WRONLY | OFlags::APPEND)?;
                &fresh
            }
            other => other?,
        };
        let flags = if append { ReadWriteFlags::APPEND } else { ReadWriteFlags::empty() };
        let write = || rustix::io::pwritev2(fd, &[IoSlice::new(data)], asked.offset, flags);
        let size = self.change(&handle.inode, || {
            if asked.write_flags & abi::WRITE_KILL_SUIDGID != 0 {
                call.rights.without_fsetid(write)
            } else {
                write()
            }
        })?;
        call.reply(&WriteOut { size: size as u32, padding: 0 });
        Ok(())
    }

    pub(crate) fn fsync(&self, call: &mut Call) -> Done {
        let asked: FsyncIn = call.args.take()?;
        let handle = self.handle(call.header.nodeid, asked.fh)?;
        let fd = handle.reading()?;
        if asked.fsync_flags & abi::FSYNC_FDATASYNC != 0 {
            rustix::fs::fdatasync(fd)
        } else {
            rustix::fs::fsync(fd)
        }
    }

    pub(crate) fn syncfs(&self, call: &mut Call) -> Done {
        let inode = self.target(call)?;
        let fd = inode.reopen(OFlags::RDONLY)?;
        rustix::fs::syncfs(fd)
    }

    pub(crate) fn fallocate(&self, call: &mut Call) -> Done {
        let asked: FallocateIn = call.args.take()?;
        let handle = self.handle(call.header.nodeid, asked.fh)?;
        let fd = handle.writing()?;
        let mode = FallocateFlags::from_bits_retain(asked.mode);
        self.change(&handle.inode, || rustix::fs::fallocate(fd, mode, asked.offset, asked.length))
    }

    pub(crate) fn lseek(&self, call: &mut Call) -> Done {
        let asked: LseekIn = call.args.take()?;
        let handle = self.handle(call.header.nodeid, asked.fh)?;
        let fd = handle.reading()?;
        // Nobody relies on the lower descriptor's own position: reads and writes carry their offsets, the kernel asks
        // for data and holes from an offset of its own, and listings are serialised by their lock.
        // SAFETY: lseek touches no memory.
        let offset =
            unsafe { libc::lseek(fd.as_raw_fd(), asked.offset as libc::off_t, asked.whence as libc::c_int) };
        if offset < 0 {
            return Err(last_error());
        }
        call.reply(&LseekOut { offset: offset as u64 });
        Ok(())
    }

    pub(crate) fn copy_file_range(&self, call: &mut Call) -> Done {
        let asked: CopyFileRangeIn = call.args.take()?;
        if asked.flags != 0 {
            return Err(Errno::INVAL);
        }
        let from = self.handle(call.header.nodeid, asked.fh_in)?;
        let to = self.handle(asked.nodeid_out, asked.fh_out)?;
        let (reading, writing) = (from.reading()?, to.writing()?);
        let (mut off_in, mut off_out) = (asked.off_in, asked.off_out);
        // The answer has 32 bits; a page less than its range keeps the offsets aligned.
        let length = asked.len.min(u64::from(u32::MAX) & !0xfff) as usize;
        let size = self.change(&to.inode, || {
            rustix::fs::copy_file_range(reading, Some(&mut off_in), writing, Some(&mut off_out), length)
        })?;
        call.reply(&WriteOut { size: size as u32, padding: 0 });
        Ok(())
    }
}
