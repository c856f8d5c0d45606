//! Which version of a file a page belongs to, and how tmem knows it by.
//!
//! A page's key holds everything that changes when the file's content changes, so a page of an older version is
//! never found, whoever changed the file and wherever this program was meanwhile. docs/file-cache.md gives the
//! argument; in short, a version may be cached only if no later change can leave its change time as it is.

use std::num::NonZeroU32;
use std::time::Duration;

use rustix::fs::{Statx, StatxTimestamp};
use rustix::time::{clock_gettime, ClockId};
use tmem_wire::ObjectId;
use xxhash_rust::xxh3::xxh3_128;

use super::stat::Identity;

/// How old a change time must be before pages are cached under it. Change times advance with the timer tick, 10 ms
/// at most (HZ=100); twice that leaves room for the tick's own delay.
pub(crate) const SETTLE: Duration = Duration::from_millis(25);

/// What the content of a file depends on: its change time, modification time and size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Version {
    ctime: Time,
    mtime: Time,
    /// Bytes in the file.
    pub(crate) size: u64,
}

/// A point in time. There are several for each file that the kernel knows, so they are kept small: without gaps, and
/// with a value that is none, which `Option` needs no more space for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, packed(4))]
struct Time {
    seconds: i64,
    /// And one more.
    nanoseconds: NonZeroU32,
}

impl Time {
    fn of(stamp: &StatxTimestamp) -> Time {
        Time { seconds: stamp.tv_sec, nanoseconds: NonZeroU32::MIN.saturating_add(stamp.tv_nsec) }
    }

    fn seconds(self) -> i64 {
        self.seconds
    }

    fn nanoseconds(self) -> u32 {
        self.nanoseconds.get() - 1
    }
}

const _: () = assert!(size_of::<Option<Version>>() == 32);

impl Version {
    /// The version a `statx` with size and times tells.
    pub(crate) fn of(stat: &Statx) -> Version {
        Version { ctime: Time::of(&stat.stx_ctime), mtime: Time::of(&stat.stx_mtime), size: stat.stx_size }
    }

    /// Whether every change from now on is bound to give the file another change time. The clock is the one the
    /// kernel takes change times from, so a step of the clock moves both.
    pub(crate) fn settled(&self) -> bool {
        let now = clock_gettime(ClockId::RealtimeCoarse);
        let now = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
        let changed = i128::from(self.ctime.seconds()) * 1_000_000_000 + i128::from(self.ctime.nanoseconds());
        now - changed > i128::from(SETTLE.as_millis() as u32) * 1_000_000
    }
}

/// What names a file in tmem for as long as it exists: device, inode number and time of birth, which together tell
/// it from a later file with the same inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ObjectName {
    /// Device and inode number.
    pub(crate) identity: Identity,
    birth: Time,
}

impl ObjectName {
    /// The name a `statx` with the time of birth tells.
    pub(crate) fn of(stat: &Statx) -> ObjectName {
        ObjectName { identity: Identity::of(stat), birth: Time::of(&stat.stx_btime) }
    }

    /// The object that holds the pages of `version`: the XXH3-128 of name and version.
    pub(crate) fn object(&self, version: &Version) -> ObjectId {
        let words = [
            self.identity.device,
            self.identity.inode,
            self.birth.seconds() as u64,
            self.birth.nanoseconds().into(),
            version.ctime.seconds() as u64,
            version.ctime.nanoseconds().into(),
            version.mtime.seconds() as u64,
            version.mtime.nanoseconds().into(),
            version.size,
        ];
        let mut bytes = [0; 72];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        xxh3_128(&bytes).to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(path: &std::path::Path) -> Statx {
        use rustix::fs::{AtFlags, StatxFlags};
        rustix::fs::statx(
            rustix::fs::CWD,
            path,
            AtFlags::empty(),
            StatxFlags::BASIC_STATS | StatxFlags::BTIME,
        )
        .unwrap()
    }

    #[test]
    fn a_change_changes_the_object_and_unsettles_the_version() {
        let dir = std::env::temp_dir().join(format!("tmem-version-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("file");
        std::fs::write(&path, b"one").unwrap();
        let (name, first) = (ObjectName::of(&stat(&path)), Version::of(&stat(&path)));
        assert!(!first.settled(), "just written");
        std::thread::sleep(SETTLE * 2);
        assert!(first.settled());
        std::fs::write(&path, b"two").unwrap();
        let second = Version::of(&stat(&path));
        assert_eq!(ObjectName::of(&stat(&path)), name);
        assert_ne!(name.object(&first), name.object(&second));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
