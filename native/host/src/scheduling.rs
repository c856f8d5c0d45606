//! How the kernel schedules the threads that serve guests.

/// Length of a turn asked for. A request for a page takes a few microseconds; whoever needs longer can be interrupted.
const SLICE_NS: u64 = 100_000;

/// `struct sched_attr` in its first version, which is all that is needed.
#[repr(C)]
#[derive(Default)]
struct SchedulingAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

/// Ask for short turns for the calling thread: when it is woken, a busy virtual CPU or a thread that serves another
/// VM's long batch makes room at once, and it makes room as soon. Its share of the CPU stays what it was.
///
/// Linux knows this from 6.12 on; older kernels ignore it, and nothing depends on it.
pub(crate) fn prefer_latency() {
    let attributes = SchedulingAttributes {
        size: size_of::<SchedulingAttributes>() as u32,
        runtime_ns: SLICE_NS,
        ..SchedulingAttributes::default()
    };
    // SAFETY: the structure is valid for reads of the size it tells for the whole call; 0 is the calling thread.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if done != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "no short turns for a thread");
    }
}
