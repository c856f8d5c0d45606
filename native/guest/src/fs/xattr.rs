//! Extended attributes, access control lists among them.

use rustix::fs::{AtFlags, Mode, XattrFlags};
use rustix::io::Errno;

use super::abi::{self, GetxattrIn, GetxattrOut, SetxattrIn};
use super::stat::stat_fd;
use super::tree::{Call, Done, Tree};

impl Tree {
    pub(crate) fn setxattr(&self, call: &mut Call) -> Done {
        let inode = self.target(call)?;
        let asked: SetxattrIn = call.args.take()?;
        let name = call.args.name()?;
        let value = call.args.bytes(asked.size as usize)?;
        let flags = XattrFlags::from_bits_retain(asked.flags);
        let path = inode.path();
        self.change(&inode, || {
            rustix::fs::setxattr(path.as_c_str(), name, value, flags)?;
            if asked.setxattr_flags & abi::SETXATTR_ACL_KILL_SGID != 0 {
                let mode = u32::from(stat_fd(&inode.fd)?.stx_mode);
                if mode & libc::S_ISGID != 0 {
                    let less = Mode::from_raw_mode(mode & 0o7777 & !libc::S_ISGID);
                    rustix::fs::chmodat(rustix::fs::CWD, path.as_c_str(), less, AtFlags::empty())?;
                }
            }
            Ok(())
        })
    }

    pub(crate) fn getxattr(&self, call: &mut Call) -> Done {
        let inode = self.target(call)?;
        let asked: GetxattrIn = call.args.take()?;
        let name = call.args.name()?;
        let path = inode.path();
        reply_sized(call, asked.size, |buffer| rustix::fs::getxattr(path.as_c_str(), name, buffer))
    }

    pub(crate) fn listxattr(&self, call: &mut Call) -> Done {
        let inode = self.target(call)?;
        let asked: GetxattrIn = call.args.take()?;
        let path = inode.path();
        reply_sized(call, asked.size, |buffer| rustix::fs::listxattr(path.as_c_str(), buffer))
    }

    pub(crate) fn removexattr(&self, call: &mut Call) -> Done {
        let inode = self.target(call)?;
        let name = call.args.name()?;
        let path = inode.path();
        self.change(&inode, || rustix::fs::removexattr(path.as_c_str(), name))
    }
}

/// Answer with at most `size` bytes, or with how many there are if `size` is zero.
fn reply_sized(call: &mut Call, size: u32, read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>) -> Done {
    if size == 0 {
        // A buffer of no bytes asks the kernel for the length.
        let length = read(&mut [])?;
        call.reply(&GetxattrOut { size: length as u32, padding: 0 });
        return Ok(());
    }
    // The kernel's own limit; values of more do not exist.
    call.out.resize((size as usize).min(65536), 0);
    let length = read(call.out.as_mut_slice())?;
    call.out.truncate(length);
    Ok(())
}
