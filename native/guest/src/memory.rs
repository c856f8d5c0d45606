//! This process's memory, and the machine's.

use std::io;

/// Which of this process's pages [`lock`] keeps from being swapped out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lock {
    /// All it has mapped or will map, at once: touching memory never waits.
    Mapped,
    /// Those it touches, from then on.
    Touched,
}

/// What helps where memory cannot be locked.
pub(crate) const LOCK_HINT: &str = "run as root, or raise RLIMIT_MEMLOCK (LimitMEMLOCK=infinity)";

/// Keep this process's pages in memory (mlockall(2)).
pub(crate) fn lock(which: Lock) -> io::Result<()> {
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE;
    let flags = if which == Lock::Touched { flags | libc::MCL_ONFAULT } else { flags };
    // SAFETY: names no memory.
    if unsafe { libc::mlockall(flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Allocations of so many bytes are not made on the heap.
const LARGE: libc::c_int = 128 << 10;

/// Prepare the allocator, before there are other threads, to cost no resident memory for nothing: one heap for all of
/// them, and large buffers outside of it, each resident as far as it is used. (By itself the allocator takes them from
/// the heap once one of their size was freed, and writes zeros all over them.)
pub(crate) fn lean_heap() {
    // SAFETY: only sets numbers.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// What this process has resident, in bytes; 0 if the kernel does not tell.
pub(crate) fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// Whether at least one in `parts` of the machine's pages is used for nothing, not even as cache.
pub(crate) fn is_unused(parts: u64) -> bool {
    let told = rustix::system::sysinfo();
    let (free, total): (u64, u64) = (told.freeram, told.totalram);
    free >= total / parts
}

/// The machine's memory, in KiB.
pub(crate) fn total_kib() -> u64 {
    let told = rustix::system::sysinfo();
    (told.totalram as u64 * u64::from(told.mem_unit)) >> 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_both() {
        let (resident, total) = (resident_bytes() >> 10, total_kib());
        assert!(0 < resident && resident < total, "{resident} of {total} KiB");
    }
}
