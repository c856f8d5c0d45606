//! The ioctls that `lsattr` and `chattr` use: inode flags and project ids.

use std::os::fd::AsRawFd;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::abi::{IoctlIn, IoctlOut};
use super::device::last_error;
use super::tree::{Call, Done, Tree};

const GETFLAGS: u32 = 0x8008_6601;
const SETFLAGS: u32 = 0x4008_6602;
const FSGETXATTR: u32 = 0x801c_581f;
const FSSETXATTR: u32 = 0x401c_5820;
/// Bytes of the largest argument, `struct fsxattr`. The flag ioctls pass an int whatever their number says.
const ARGUMENT_BYTES: usize = 28;

impl Tree {
    pub(crate) fn ioctl(&self, call: &mut Call) -> Done {
        let inode = self.target(call)?;
        let asked: IoctlIn = call.args.take()?;
        let bytes = match asked.cmd {
            GETFLAGS | SETFLAGS => 4,
            FSGETXATTR | FSSETXATTR => ARGUMENT_BYTES,
            _ => return Err(Errno::NOTTY),
        };
        let mut argument = [0_u64; ARGUMENT_BYTES.div_ceil(8)];
        let argument = zerocopy::IntoBytes::as_mut_bytes(&mut argument);
        let given = (asked.in_size as usize).min(bytes);
        argument[..given].copy_from_slice(call.args.bytes(given)?);
        let fd = inode.reopen(OFlags::RDONLY | OFlags::NONBLOCK)?;
        self.change(&inode, || {
            // SAFETY: the four commands read or write at most ARGUMENT_BYTES at the pointer, and the buffer has them.
            let done =
                unsafe { libc::ioctl(fd.as_raw_fd(), asked.cmd as libc::Ioctl, argument.as_mut_ptr()) };
            if done < 0 {
                Err(last_error())
            } else {
                Ok(())
            }
        })?;
        call.reply(&IoctlOut::default());
        let room = (asked.out_size as usize).min(bytes);
        call.out.extend_from_slice(&argument[..room]);
        Ok(())
    }
}
