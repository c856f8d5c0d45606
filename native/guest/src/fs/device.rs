//! The kernel's side: `/dev/fuse`, the mount, INIT, answers and notifications.

use std::ffi::{CStr, CString};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, init, InHeader, InitIn, InitInExt, InitOut, OutHeader};

/// Largest READ the kernel may send, in bytes. More read-ahead comes as several, which threads serve side by side: one
/// waits for the disk while another one's answer is copied.
pub(crate) const MAX_READ: usize = 256 << 10;
/// Most read-ahead asked for, in bytes.
const MAX_READ_AHEAD: usize = 8 * MAX_READ;
/// Largest WRITE the kernel may send, in bytes. Every worker has a buffer of this size, which bounds it.
pub(crate) const MAX_WRITE: usize = 128 << 10;
/// Bytes of a worker's request buffer: the largest WRITE with its headers.
pub(crate) const REQUEST_BYTES: usize = MAX_WRITE + 4096;

/// One open of `/dev/fuse`. Each worker has its own, so that requests and answers do not share a lock.
pub(crate) struct Device(OwnedFd);

/// What INIT settled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Agreed {
    /// The kernel's minor protocol version.
    pub(crate) minor: u32,
    /// Flags both ends have.
    pub(crate) flags: u64,
}

fn open() -> Result<OwnedFd, Errno> {
    rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

impl Device {
    /// Open `/dev/fuse` and mount it at `mount_point`. `name` is what `/proc/mounts` shows as the source.
    pub(crate) fn mount(mount_point: &Path, name: &Path, flags: MountFlags) -> Result<Device, Errno> {
        let fd = open()?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            fd.as_raw_fd()
        );
        let options = CString::new(options).map_err(|_| Errno::INVAL)?;
        rustix::mount::mount(name, mount_point, c"fuse.tmem", flags, options.as_c_str())?;
        Ok(Device(fd))
    }

    /// Another open of the same connection, for another worker.
    pub(crate) fn another(&self) -> Result<Device, Errno> {
        let fd = open()?;
        let mut source = self.0.as_raw_fd() as u32;
        // SAFETY: FUSE_DEV_IOC_CLONE reads one u32, which outlives the call.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw mut source) };
        if done < 0 {
            return Err(last_error());
        }
        Ok(Device(fd))
    }

    /// Answer the kernel's INIT: take from `wanted` what the kernel offers.
    pub(crate) fn handshake(&self, wanted: u64) -> Result<Agreed, Errno> {
        let mut buffer = vec![0; REQUEST_BYTES];
        let length = self.receive(&mut buffer)?;
        let (header, rest) = InHeader::read_from_prefix(&buffer[..length]).map_err(|_| Errno::PROTO)?;
        if abi::Opcode::from_code(header.opcode) != Some(abi::Opcode::Init) {
            return Err(Errno::PROTO);
        }
        let (asked, rest) = InitIn::read_from_prefix(rest).map_err(|_| Errno::PROTO)?;
        if asked.major != abi::KERNEL_VERSION || asked.minor < abi::OLDEST_MINOR_VERSION {
            self.answer(header.unique, Errno::PROTO.raw_os_error(), &[])?;
            return Err(Errno::PROTO);
        }
        let mut offered = u64::from(asked.flags);
        if offered & init::INIT_EXT != 0 {
            let (more, _) = InitInExt::read_from_prefix(rest).map_err(|_| Errno::PROTO)?;
            offered |= u64::from(more.flags2) << 32;
        }
        let flags = offered & wanted;
        let answer = InitOut {
            major: abi::KERNEL_VERSION,
            minor: abi::KERNEL_MINOR_VERSION.min(asked.minor),
            max_readahead: asked.max_readahead.max(MAX_READ_AHEAD as u32),
            flags: flags as u32,
            max_background: 64,
            congestion_threshold: 48,
            max_write: MAX_WRITE as u32,
            time_gran: 1,
            max_pages: (MAX_READ / tmem_wire::PAGE_BYTES) as u16,
            flags2: (flags >> 32) as u32,
            ..InitOut::default()
        };
        self.answer(header.unique, 0, &[answer.as_bytes()])?;
        Ok(Agreed { minor: asked.minor, flags })
    }

    /// Wait for the next request; its length. `ENODEV` says that the file system was unmounted.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        loop {
            match rustix::io::read(&self.0, &mut *buffer) {
                // ENOENT: the caller was interrupted before the request was read.
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
                other => return other,
            }
        }
    }

    /// Send an answer. `ENOENT` says that the caller was interrupted and nobody waits for it any more.
    pub(crate) fn answer(&self, unique: u64, error: i32, parts: &[&[u8]]) -> Result<(), Errno> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let header = OutHeader { len: (size_of::<OutHeader>() + length) as u32, error: -error, unique };
        let mut slices =
            [IoSlice::new(header.as_bytes()), IoSlice::new(&[]), IoSlice::new(&[]), IoSlice::new(&[])];
        debug_assert!(parts.len() < slices.len());
        for (slice, part) in slices[1..].iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
        }
        rustix::io::writev(&self.0, &slices[..=parts.len()]).map(|_| ())
    }

    /// Tell the kernel to forget an inode's attributes and, unless `off` is negative, its pages from `off` on.
    /// Waits for reads of those pages that are under way, so never call it with pages from a thread that serves
    /// requests.
    pub(crate) fn invalidate_inode(&self, node: u64, off: i64) -> Result<(), Errno> {
        let body = abi::NotifyInvalInodeOut { ino: node, off, len: 0 };
        self.answer(0, -abi::NOTIFY_INVAL_INODE, &[body.as_bytes()])
    }

    /// Give the kernel a file's pages from `offset` on; a last one that is not whole must end with the file. Whatever it
    /// has of them is overwritten. Waits for reads of those pages, so never call it from a thread that serves requests.
    pub(crate) fn store(&self, node: u64, offset: u64, pages: &[u8]) -> Result<(), Errno> {
        let size = pages.len() as u32;
        let body = abi::NotifyStoreOut { nodeid: node, offset, size, padding: 0 };
        self.answer(0, -abi::NOTIFY_STORE, &[body.as_bytes(), pages])
    }

    /// Tell the kernel to forget a name in a directory.
    pub(crate) fn invalidate_entry(&self, parent: u64, name: &CStr) -> Result<(), Errno> {
        let body = abi::NotifyInvalEntryOut { parent, namelen: name.count_bytes() as u32, flags: 0 };
        self.answer(0, -abi::NOTIFY_INVAL_ENTRY, &[body.as_bytes(), name.to_bytes_with_nul()])
    }
}

/// Less would make every small source file two requests.
const SMALLEST_READ_AHEAD_KIB: u64 = 32;

const FUSE_DEV_IOC_CLONE: libc::Ioctl = 0x8004_e500;

/// Let the kernel read ahead as far as suits the guest's memory instead of 128 KiB, which is meant for disks: as far as
/// eight READs go where there is memory. A fault in a memory-mapped file reads a whole window, most of which a small
/// guest evicts, together with pages that it needs, before it is used; tmem brings a few pages at less than a disk's
/// price. So the window is a four-thousandth of the memory, in a power of two.
pub(crate) fn set_read_ahead(mount_point: &Path, memory_kib: u64) -> std::io::Result<()> {
    let stat = rustix::fs::stat(mount_point)?;
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let kib = read_ahead_kib(memory_kib);
    std::fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), format!("{kib}"))
}

/// The read-ahead in KiB for a guest of so much memory.
pub(crate) fn read_ahead_kib(memory_kib: u64) -> u64 {
    let part = (memory_kib >> 12).max(1);
    (1 << part.ilog2()).clamp(SMALLEST_READ_AHEAD_KIB, MAX_READ_AHEAD as u64 >> 10)
}

/// The device number of what is mounted at `mount_point`, which is not asked for it.
pub(crate) fn number(mount_point: &Path) -> Result<rustix::fs::Dev, Errno> {
    use rustix::fs::{makedev, statx, AtFlags, StatxFlags, CWD};
    let stat = statx(CWD, mount_point, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
    Ok(makedev(stat.stx_dev_major, stat.stx_dev_minor))
}

/// Take the mount away. A busy one is detached: no new callers, those inside may finish.
pub(crate) fn unmount(mount_point: &Path) -> Result<bool, Errno> {
    match rustix::mount::unmount(mount_point, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(true),
        Err(Errno::BUSY) => {
            rustix::mount::unmount(mount_point, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH).map(|()| false)
        }
        Err(error) => Err(error),
    }
}

/// Take the mount away at once, whoever uses it.
pub(crate) fn detach(mount_point: &Path) -> Result<(), Errno> {
    rustix::mount::unmount(mount_point, UnmountFlags::DETACH)
}

/// The error of the libc call that just failed.
pub(crate) fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

impl AsFd for Device {
    fn as_fd(&self) -> rustix::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_read_ahead_follows_the_memory() {
        for (mib, kib) in
            [(64, 32), (180, 32), (300, 64), (512, 128), (1000, 128), (4096, 1024), (1 << 20, 2048)]
        {
            assert_eq!(read_ahead_kib(mib << 10), kib, "{mib} MiB");
        }
    }
}
