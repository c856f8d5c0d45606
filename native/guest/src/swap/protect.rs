//! What keeps the shim alive and moving while the guest has no free memory, and whether it could be had.

use std::io;

use crate::memory;

// From linux/prctl.h; the libc crate does not have them.
const PR_SET_IO_FLUSHER: libc::c_int = 57;
const PR_GET_IO_FLUSHER: libc::c_int = 58;

/// A protection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// `mlockall`: no page of this process is ever swapped out, to itself of all places.
    Locked,
    /// `PR_SET_IO_FLUSHER`: allocations made on its behalf in the kernel never wait for writes it would have to do.
    IoFlusher,
    /// OOM score −1000: the OOM killer takes somebody else.
    OomExempt,
    /// `SCHED_FIFO`: the kernel lets real-time tasks use half of the memory it keeps back (`vm.min_free_kbytes`).
    /// Sending a page to the host needs memory for the packet, and a lane that waits for it waits for itself.
    RealTime,
    /// `vm.min_free_kbytes` large enough for that half to be of use.
    Reserve,
}

impl Protection {
    /// All of them.
    pub const ALL: [Protection; 5] = [
        Protection::Locked,
        Protection::IoFlusher,
        Protection::OomExempt,
        Protection::RealTime,
        Protection::Reserve,
    ];

    /// Its name in the status.
    pub fn name(self) -> &'static str {
        match self {
            Protection::Locked => "mlockall",
            Protection::IoFlusher => "io_flusher",
            Protection::OomExempt => "oom_exempt",
            Protection::RealTime => "real_time",
            Protection::Reserve => "memory_reserve",
        }
    }

    fn hint(self) -> &'static str {
        match self {
            Protection::Locked => memory::LOCK_HINT,
            Protection::IoFlusher => "run as root (CAP_SYS_RESOURCE) on Linux 5.6 or later",
            Protection::OomExempt => "run as root, or set OOMScoreAdjust=-1000",
            Protection::RealTime => "run as root, or set LimitRTPRIO=1",
            Protection::Reserve => "run as root, or raise the sysctl vm.min_free_kbytes",
        }
    }

    fn take(self) -> io::Result<()> {
        match self {
            Protection::Locked => memory::lock(memory::Lock::Mapped),
            Protection::IoFlusher => set_io_flusher(),
            Protection::OomExempt => std::fs::write("/proc/self/oom_score_adj", "-1000"),
            Protection::RealTime => {
                let lowest = libc::sched_param { sched_priority: 1 };
                // SAFETY: the parameter outlives the call.
                check(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const lowest) })
            }
            Protection::Reserve => keep_reserve(),
        }
    }
}

/// Have the kernel keep back a thirty-second of memory, 4 to 32 MiB, and begin to free memory as much earlier. Never
/// less than it does already.
fn keep_reserve() -> io::Result<()> {
    let wanted_kib = (memory::total_kib() / 32).clamp(4 << 10, 32 << 10);
    raise("min_free_kbytes", wanted_kib)?;
    // In ten-thousandths of memory.
    raise("watermark_scale_factor", 200)?;
    // After memory got fragmented the kernel asks for up to twice the reserve, and counts the half that is for real-time
    // tasks from there: for a while there is no such half.
    set("watermark_boost_factor", |present| (present > 0).then_some(0))
}

fn raise(setting: &str, wanted: u64) -> io::Result<()> {
    set(setting, |present| (present < wanted).then_some(wanted))
}

fn set(setting: &str, better: impl FnOnce(u64) -> Option<u64>) -> io::Result<()> {
    let path = format!("/proc/sys/vm/{setting}");
    let present: u64 = std::fs::read_to_string(&path)?.trim().parse().unwrap_or(0);
    if let Some(wanted) = better(present) {
        std::fs::write(&path, wanted.to_string())?;
        log::info!("vm.{setting} changed from {present} to {wanted}");
    }
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// For the calling thread, and for every thread and process it starts.
fn set_io_flusher() -> io::Result<()> {
    // SAFETY: names no memory.
    check(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) })
}

/// Whether the calling thread is an I/O flusher.
pub fn is_io_flusher() -> bool {
    // SAFETY: names no memory.
    unsafe { libc::prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1 }
}

/// Take every protection for this process; to be called before it starts a thread. Returns those that could not be
/// had. With `required`, a missing one is an error.
pub fn protect(required: bool) -> Result<Vec<Protection>, io::Error> {
    small_heap();
    let mut missing = Vec::new();
    for protection in Protection::ALL {
        if let Err(error) = protection.take() {
            let message = format!("no {}: {error}; {}", protection.name(), protection.hint());
            if required {
                return Err(io::Error::new(error.kind(), message));
            }
            log::warn!("UNPROTECTED: {message}. Under memory pressure the guest may hang");
            missing.push(protection);
        }
    }
    Ok(missing)
}

/// What other heaps take, and what was freed of this one, would be locked into memory for nothing.
fn small_heap() {
    memory::lean_heap();
    // SAFETY: called before there are other threads; the setting is a plain number.
    unsafe {
        libc::mallopt(libc::M_TOP_PAD, 16 * 1024);
        libc::malloc_trim(0);
    }
}
