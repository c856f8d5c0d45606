//! The lower directory: opening it, and finding out what its file system can be relied on for.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, StatVfsMountFlags, Statx};
use rustix::io::Errno;
use rustix::mount::{MountFlags, OpenTreeFlags, UnmountFlags};

use super::inode::FdPath;
use super::stat::stat_fd;
use super::version::Version;

/// What `statfs` tells of file systems.
const EXT4: u64 = 0xef53;
const XFS: u64 = 0x5846_5342;
const OVERLAY: u64 = 0x794c_7630;
/// File systems whose change times tell every change, and whose direct reads wait for writers and write dirty pages
/// back first (docs/file-cache.md).
const RELIABLE: [u64; 3] = [EXT4, XFS, OVERLAY];
/// File systems whose listings have the same places for everybody who opens a directory, whatever changes in it.
const LISTED_IN_PLACE: [u64; 2] = [EXT4, XFS];
/// How often the clock is tried. On a kernel with coarse change times some of so many changes share one.
const CLOCK_TRIALS: usize = 32;

/// The directory that is shown.
pub(crate) struct Lower {
    /// Its root, opened with `O_PATH`.
    pub(crate) root: OwnedFd,
    /// Attributes of the root.
    pub(crate) stat: Statx,
    /// How the new mount must be restricted, as the lower one is.
    pub(crate) flags: MountFlags,
    /// Whether its file system is one of [`RELIABLE`].
    pub(crate) reliable: bool,
    /// Whether its file system is one of [`LISTED_IN_PLACE`].
    pub(crate) listed_in_place: bool,
    /// Whether two changes of a file never share a change time if the file was looked at in between.
    pub(crate) fine_clock: bool,
}

impl Lower {
    /// Open the directory as a mount of its own, so that neither mounts made below it nor the new mount over it
    /// are seen through it.
    pub(crate) fn open(path: &Path) -> Result<Lower, Errno> {
        let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        clear_dead_mounts(path)?;
        let root = rustix::mount::open_tree(rustix::fs::CWD, path, clone);
        let root = match root {
            Err(Errno::PERM | Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?
            }
            other => other?,
        };
        let stat = stat_fd(&root)?;
        if u32::from(stat.stx_mode) & libc::S_IFMT != libc::S_IFDIR {
            return Err(Errno::NOTDIR);
        }
        let kind = rustix::fs::fstatfs(&root)?.f_type as u64;
        let fine_clock = has_fine_clock(&root).unwrap_or(false);
        let flags = restrictions(rustix::fs::fstatvfs(&root)?.f_flag);
        let (reliable, listed_in_place) = (RELIABLE.contains(&kind), LISTED_IN_PLACE.contains(&kind));
        Ok(Lower { root, stat, flags, reliable, listed_in_place, fine_clock })
    }
}

/// Take away what agents that were killed left mounted at a path. Names and attributes of such a mount may still be
/// cached, but statfs always asks.
pub(crate) fn clear_dead_mounts(path: &Path) -> Result<(), Errno> {
    while rustix::fs::statfs(path).is_err_and(|errno| errno == Errno::NOTCONN) {
        log::warn!("{} is a dead mount, taking it away", path.display());
        rustix::mount::unmount(path, UnmountFlags::DETACH)?;
    }
    Ok(())
}

fn restrictions(lower: StatVfsMountFlags) -> MountFlags {
    let mut flags = MountFlags::empty();
    for (from, to) in [
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
    ] {
        if lower.contains(from) {
            flags |= to;
        }
    }
    flags
}

/// Change a file without a name as fast as possible and see whether its change time follows (multigrain timestamps,
/// Linux 6.13). An error means that it cannot be tried, on a read-only file system for instance.
fn has_fine_clock(root: impl AsFd) -> Result<bool, Errno> {
    let root = root.as_fd();
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(FdPath::new(&root).as_c_str(), flags, Mode::RUSR | Mode::WUSR)?;
    let mut last = Version::of(&stat_fd(&file)?);
    for trial in 0..CLOCK_TRIALS {
        // The same size and place every time: only the clock can tell the versions apart.
        rustix::io::pwrite(&file, &[trial as u8], 0)?;
        let now = Version::of(&stat_fd(&file)?);
        if trial > 0 && now == last {
            return Ok(false);
        }
        last = now;
    }
    Ok(true)
}
