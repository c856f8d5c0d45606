//! The swap file: checked, filled and opened so that writing a page to it later needs nothing from the file system.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use io_uring::{opcode, types};
use rustix::fs::{fallocate, fstatfs, FallocateFlags, FlockOperation};
use tmem_wire::PAGE_BYTES;

use super::ring::{Ring, Source, Token};

/// Why a file cannot be swapped to.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file cannot be made or opened.
    #[error("swap file {path}: cannot {what}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file system buffers what it is given.
    #[error(
        "swap file {path}: its file system ({file_system}) cannot do direct I/O; put the file on ext4, xfs or a \
         block device"
    )]
    NoDirectIo {
        /// The file.
        path: PathBuf,
        /// Name or magic number of the file system.
        file_system: String,
    },
    /// The file system keeps files in the memory that swapping is to free.
    #[error("swap file {path}: {file_system} keeps files in memory; put the file on a disk")]
    InMemory {
        /// The file.
        path: PathBuf,
        /// Name of the file system.
        file_system: String,
    },
    /// Not enough space.
    #[error("swap file {path}: no space for {bytes} bytes on its file system; free some or choose a smaller --size")]
    Full {
        /// The file.
        path: PathBuf,
        /// What was needed.
        bytes: u64,
    },
    /// A block device, or a file in use, that is smaller than the device is to be.
    #[error(
        "swap file {path}: it has {has} bytes, but the device is to have {needs}; choose a smaller --size"
    )]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        has: u64,
        /// The wanted size in bytes.
        needs: u64,
    },
    /// Somebody else has it.
    #[error("swap file {path}: another tmem-guest uses it")]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

const FILL_BYTES: usize = 1 << 20;

fn file_system(magic: i64) -> (String, bool) {
    let (name, in_memory) = match magic {
        0x0102_1994 => ("tmpfs", true),
        0x8584_58f6 => ("ramfs", true),
        0x6969 => ("nfs", false),
        0x794c_7630 => ("overlayfs", false),
        0x6573_5546 => ("fuse", false),
        0x9123_683e => ("btrfs", false),
        0x2fc1_2fc1 => ("zfs", false),
        0xef53 => ("ext4", false),
        0x5846_5342 => ("xfs", false),
        other => return (format!("{other:#x}"), false),
    };
    (name.to_owned(), in_memory)
}

/// Open the swap file for direct I/O and give it `pages` pages, all of them written once, so that overwriting one
/// allocates nothing. A file that is ready already is left as it is.
pub fn prepare(path: &Path, pages: u32) -> Result<File, FileError> {
    let failed = |what| move |source| FileError::Open { path: path.to_owned(), what, source };
    let bytes = u64::from(pages) * PAGE_BYTES as u64;
    let is_block = path.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
    if !is_block {
        let plain = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(path)
            .map_err(failed("open it"))?;
        let meta = plain.metadata().map_err(failed("look at it"))?;
        if !meta.is_file() {
            return Err(failed("use it")(io::Error::other("it is neither a file nor a block device")));
        }
        rustix::fs::fchmod(&plain, rustix::fs::Mode::from_raw_mode(0o600))
            .map_err(|errno| failed("make it private (chmod 600)")(errno.into()))?;
        let (name, in_memory) = file_system(
            fstatfs(&plain).map_err(|errno| failed("look at its file system")(errno.into()))?.f_type,
        );
        if in_memory {
            return Err(FileError::InMemory { path: path.to_owned(), file_system: name });
        }
        if matches!(name.as_str(), "btrfs" | "zfs" | "nfs" | "fuse" | "overlayfs") {
            log::warn!(
                "swap file {}: {name} needs memory of its own to overwrite a page; under memory pressure the guest \
                 may stall. ext4, xfs or a block device are safe",
                path.display()
            );
        }
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_DIRECT | libc::O_NOFOLLOW)
        .open(path)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL) => no_direct_io(path),
            _ => failed("open it for direct I/O")(source),
        })?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| FileError::InUse { path: path.to_owned() })?;
    if is_block {
        let has = (&file).seek(SeekFrom::End(0)).map_err(failed("read its size"))?;
        if has < bytes {
            return Err(FileError::TooSmall { path: path.to_owned(), has, needs: bytes });
        }
    } else {
        fill(path, &file, bytes)?;
    }
    // Some file systems accept the flag and refuse the transfer.
    let mut probe = Aligned::new(PAGE_BYTES);
    file.read_exact_at(probe.bytes(), 0).map_err(|_| no_direct_io(path))?;
    write_once(&file, &mut probe).map_err(failed("write to it"))?;
    Ok(file)
}

/// Write the first page as it is, the way lanes will write. The first such write has the kernel start a thread for the
/// file system (`s_dio_done_wq`), which it could not do later, when there is no memory.
fn write_once(file: &File, page: &mut Aligned) -> io::Result<()> {
    let mut ring = Ring::new(4)?;
    let entry =
        opcode::Write::new(types::Fd(file.as_raw_fd()), page.bytes().as_ptr(), PAGE_BYTES as u32).offset(0);
    // SAFETY: the page outlives the wait for the completion below.
    unsafe { ring.push(entry.build(), Token::new(Source::File, 0)) };
    loop {
        ring.wait(1, Duration::from_secs(1))?;
        match ring.completion() {
            Some((_, result)) if usize::try_from(result) == Ok(PAGE_BYTES) => return Ok(()),
            Some((_, result)) => return Err(io::Error::from_raw_os_error(result.saturating_neg())),
            None => {}
        }
    }
}

fn no_direct_io(path: &Path) -> FileError {
    let file_system =
        rustix::fs::statfs(path).map_or_else(|_| "?".to_owned(), |stat| file_system(stat.f_type).0);
    FileError::NoDirectIo { path: path.to_owned(), file_system }
}

/// Allocate the file and write every extent that never was.
fn fill(path: &Path, file: &File, bytes: u64) -> Result<(), FileError> {
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => FileError::Full { path: path.to_owned(), bytes },
        Some(libc::EINVAL) => no_direct_io(path),
        _ => FileError::Open { path: path.to_owned(), what: "allocate it", source },
    };
    let old_bytes = file.metadata().map_err(failed)?.size();
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        // Without fallocate, writing allocates just as well.
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
        Err(errno) => {
            // Leave no half-sized file behind on a file system that is full.
            let _ = file.set_len(old_bytes);
            return Err(failed(errno.into()));
        }
    }
    let mut zeros = Aligned::new(FILL_BYTES);
    let mut at = 0;
    while at < bytes {
        match extents::written_until(file.as_fd(), at) {
            Some(end) if end > at => at = end.min(bytes) / PAGE_BYTES as u64 * PAGE_BYTES as u64,
            _ => {
                let part = (bytes - at).min(FILL_BYTES as u64) as usize;
                file.write_all_at(&zeros.bytes()[..part], at).map_err(failed)?;
                at += part as u64;
            }
        }
    }
    file.sync_all().map_err(failed)
}

/// A zeroed buffer on a page boundary.
struct Aligned {
    memory: Vec<u8>,
    at: usize,
    length: usize,
}

impl Aligned {
    fn new(length: usize) -> Aligned {
        let memory = vec![0; length + PAGE_BYTES];
        let at = memory.as_ptr().align_offset(PAGE_BYTES);
        Aligned { memory, at, length }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.at..self.at + self.length]
    }
}

/// Which parts of a file were written, from the file system's own map.
mod extents {
    use std::os::fd::{AsRawFd, BorrowedFd};

    const FIEMAP_EXTENT_UNKNOWN: u32 = 0x2;
    const FIEMAP_EXTENT_DELALLOC: u32 = 0x4;
    const FIEMAP_EXTENT_UNWRITTEN: u32 = 0x800;
    /// `_IOWR('f', 11, struct fiemap)`, whose header has 32 bytes.
    const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;

    #[repr(C)]
    #[derive(Default)]
    struct Fiemap {
        start: u64,
        length: u64,
        flags: u32,
        mapped_extents: u32,
        extent_count: u32,
        reserved: u32,
        // One extent follows the header.
        logical: u64,
        physical: u64,
        extent_length: u64,
        reserved64: [u64; 2],
        extent_flags: u32,
        reserved32: [u32; 3],
    }

    /// If `at` lies in a written extent, where that ends. `None` if it does not, or nobody knows.
    pub(super) fn written_until(file: BorrowedFd<'_>, at: u64) -> Option<u64> {
        let mut map = Fiemap { start: at, length: u64::MAX - at, extent_count: 1, ..Fiemap::default() };
        // SAFETY: the kernel fills at most `extent_count` extents after the header, and there is space for one.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &mut map) };
        let unusable = FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC | FIEMAP_EXTENT_UNWRITTEN;
        (done == 0 && map.mapped_extents == 1 && map.logical <= at && map.extent_flags & unusable == 0)
            .then_some(map.logical + map.extent_length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_a_file_in_memory_is_not_freed_by_swapping_to_it() {
        let path = Path::new("/dev/shm").join(format!("tmem-swap-test-{}", std::process::id()));
        let error = prepare(&path, 4).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(error.contains("keeps files in memory") && error.contains("tmpfs"), "{error}");
    }

    #[test]
    fn missing_directories_and_directories_are_named() {
        let error = prepare(Path::new("/nowhere/swap.tmem"), 4).unwrap_err().to_string();
        assert!(error.contains("/nowhere/swap.tmem"), "{error}");
        let error = prepare(Path::new("/proc"), 4).unwrap_err().to_string();
        assert!(error.contains("/proc"), "{error}");
    }

    #[test]
    fn a_file_is_filled_once_and_locked_while_in_use() {
        let path = std::env::current_dir().unwrap().join(format!("swap-test-{}.tmem", std::process::id()));
        let file = prepare(&path, 1000).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o777), (4_096_000, 0o600));
        assert!(meta.blocks() * 512 >= 4_096_000);
        assert!(matches!(prepare(&path, 1000), Err(FileError::InUse { .. })));
        let mut page = Aligned::new(PAGE_BYTES);
        page.bytes().fill(7);
        file.write_all_at(page.bytes(), 8192).unwrap();
        drop(file);
        // A second preparation must not wipe what is there: the file may be prepared again by a restarted process.
        let file = prepare(&path, 1000).unwrap();
        file.read_exact_at(page.bytes(), 8192).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(page.bytes()[0], 7);
    }
}
