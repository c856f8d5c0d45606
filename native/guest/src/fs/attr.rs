//! Attributes: getattr, statx, setattr, statfs.

use rustix::fs::{AtFlags, Mode, OFlags, Statx, Timespec, Timestamps};
use rustix::io::Errno;

use super::abi::{fattr, Attr, AttrOut, GetattrIn, SetattrIn, StatfsOut, StatxIn, StatxOut, SxTime};
use super::content::note_told;
use super::inode::Inode;
use super::stat::stat_fd;
use super::tree::{encode_device, Call, Done, Tree};

/// A `statx` in the kernel's FUSE form.
pub(crate) fn attr(stat: &Statx) -> Attr {
    Attr {
        ino: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: stat.stx_atime.tv_sec as u64,
        mtime: stat.stx_mtime.tv_sec as u64,
        ctime: stat.stx_ctime.tv_sec as u64,
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: stat.stx_mode.into(),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
        blksize: stat.stx_blksize,
        flags: 0,
    }
}

fn sx_time(stamp: rustix::fs::StatxTimestamp) -> SxTime {
    SxTime { tv_sec: stamp.tv_sec, tv_nsec: stamp.tv_nsec, reserved: 0 }
}

fn stamp(seconds: u64, nanoseconds: i64) -> Timespec {
    Timespec { tv_sec: seconds as i64, tv_nsec: nanoseconds }
}

impl Tree {
    fn reply_attr(&self, call: &mut Call, inode: &Inode, stat: &Statx) {
        note_told(inode, stat);
        call.reply(&AttrOut {
            attr_valid: self.trust.lifetime.as_secs(),
            attr_valid_nsec: self.trust.lifetime.subsec_nanos(),
            dummy: 0,
            attr: attr(stat),
        });
    }

    pub(crate) fn getattr(&self, call: &mut Call) -> Done {
        let inode = self.target(call)?;
        let _: GetattrIn = call.args.take()?;
        self.reply_attr(call, &inode, &stat_fd(&inode.fd)?);
        Ok(())
    }

    pub(crate) fn statx(&self, call: &mut Call) -> Done {
        let inode = self.target(call)?;
        let _: StatxIn = call.args.take()?;
        let stat = stat_fd(&inode.fd)?;
        note_told(&inode, &stat);
        call.reply(&StatxOut {
            attr_valid: self.trust.lifetime.as_secs(),
            attr_valid_nsec: self.trust.lifetime.subsec_nanos(),
            mask: stat.stx_mask,
            blksize: stat.stx_blksize,
            attributes: stat.stx_attributes.bits(),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            mode: stat.stx_mode,
            ino: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            attributes_mask: stat.stx_attributes_mask.bits(),
            atime: sx_time(stat.stx_atime),
            btime: sx_time(stat.stx_btime),
            ctime: sx_time(stat.stx_ctime),
            mtime: sx_time(stat.stx_mtime),
            rdev_major: stat.stx_rdev_major,
            rdev_minor: stat.stx_rdev_minor,
            dev_major: stat.stx_dev_major,
            dev_minor: stat.stx_dev_minor,
            ..StatxOut::default()
        });
        Ok(())
    }

    pub(crate) fn setattr(&self, call: &mut Call) -> Done {
        let inode = self.target(call)?;
        let asked: SetattrIn = call.args.take()?;
        let Some(_hold) = self.around.hold_for(call, &inode) else { return Ok(()) };
        self.change(&inode, || self.set(call, &inode, &asked))?;
        self.reply_attr(call, &inode, &stat_fd(&inode.fd)?);
        Ok(())
    }

    fn set(&self, call: &Call, inode: &Inode, asked: &SetattrIn) -> Done {
        if asked.valid & fattr::MODE != 0 {
            set_mode(inode, asked.mode)?;
        }
        if asked.valid & (fattr::UID | fattr::GID) != 0 {
            let owner = (asked.valid & fattr::UID != 0).then(|| rustix::fs::Uid::from_raw(asked.uid));
            let group = (asked.valid & fattr::GID != 0).then(|| rustix::fs::Gid::from_raw(asked.gid));
            rustix::fs::chownat(&inode.fd, c"", owner, group, AtFlags::EMPTY_PATH)?;
        }
        if asked.valid & fattr::SIZE != 0 {
            self.set_size(call, inode, asked)?;
        }
        if asked.valid & (fattr::ATIME | fattr::MTIME) != 0 {
            let times = Timestamps {
                last_access: match asked.valid & (fattr::ATIME | fattr::ATIME_NOW) {
                    0 => stamp(0, rustix::fs::UTIME_OMIT),
                    fattr::ATIME => stamp(asked.atime, asked.atimensec.into()),
                    _ => stamp(0, rustix::fs::UTIME_NOW),
                },
                last_modification: match asked.valid & (fattr::MTIME | fattr::MTIME_NOW) {
                    0 => stamp(0, rustix::fs::UTIME_OMIT),
                    fattr::MTIME => stamp(asked.mtime, asked.mtimensec.into()),
                    _ => stamp(0, rustix::fs::UTIME_NOW),
                },
            };
            // The magic link of an O_PATH descriptor leads to the file itself, symbolic link or not.
            rustix::fs::utimensat(rustix::fs::CWD, inode.path().as_c_str(), &times, AtFlags::empty())?;
        }
        Ok(())
    }

    fn set_size(&self, call: &Call, inode: &Inode, asked: &SetattrIn) -> Done {
        let open = (asked.valid & fattr::FH != 0).then(|| self.handle(inode.node, asked.fh)).transpose()?;
        let fresh;
        let fd = if let Some(open) = &open {
            open.writing()?
        } else {
            fresh = inode.reopen(OFlags::WRONLY | OFlags::NONBLOCK)?;
            &fresh
        };
        let truncate = || rustix::fs::ftruncate(fd, asked.size);
        if asked.valid & fattr::KILL_SUIDGID != 0 {
            call.rights.without_fsetid(truncate)
        } else {
            truncate()
        }
    }

    pub(crate) fn statfs(&self, call: &mut Call) -> Done {
        let inode = self.target(call)?;
        let stat = rustix::fs::fstatfs(&inode.fd)?;
        call.reply(&StatfsOut {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: stat.f_bsize as u32,
            namelen: stat.f_namelen as u32,
            frsize: stat.f_frsize as u32,
            ..StatfsOut::default()
        });
        Ok(())
    }
}

fn set_mode(inode: &Inode, mode: u32) -> Done {
    if inode.kind == libc::S_IFLNK {
        return Err(Errno::OPNOTSUPP);
    }
    let mode = Mode::from_raw_mode(mode & 0o7777);
    rustix::fs::chmodat(rustix::fs::CWD, inode.path().as_c_str(), mode, AtFlags::empty())
}
