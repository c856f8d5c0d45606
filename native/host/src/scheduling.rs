//! How the threads that serve guests share the CPUs: short turns asked of the kernel, and work for one VM interrupted
//! where others are at work too.
//!
//! Asking the kernel does not do it alone. It looks whether a turn is over when its timer ticks, every 1 to 10 ms, or
//! when something sleeps or wakes; a thread in the middle of a batch of pages does neither.

use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::company::Company;
use crate::vm::Vm;

/// Length of a turn asked for. A request for a page takes a few microseconds; whoever needs longer can be interrupted.
const SLICE_NS: u64 = 100_000;
/// Length of a turn asked for by a thread whose VM has had more than its share: the longer, the later.
const SLICE_AHEAD_NS: u64 = 10_000_000;
/// How long a thread works for its VM before it lets others run, where other VMs are at work too.
const STRETCH: Duration = Duration::from_micros(20);
/// How long it sleeps then if its VM has had more than its share. Giving way is not enough: the kernel lets go of a
/// CPU to another program's thread only once a turn is over, or nobody of ours wants it.
const REST: Duration = Duration::from_micros(15);
/// How much later than asked for the kernel may end a sleep; by default 50 µs.
const SLACK_NS: libc::c_ulong = 1_000;
/// Bytes that are copied into or out of a socket at once then: kernels built for servers are not interrupted in it.
pub(crate) const PIECE_BYTES: usize = 32 << 10;

thread_local! {
    /// Whom the thread serves.
    static SERVED: RefCell<Option<(Arc<Company>, Arc<Vm>)>> = const { RefCell::new(None) };
    /// Since when it has been working; `None` while its VM is alone.
    static SINCE: Cell<Option<Instant>> = const { Cell::new(None) };
    /// Whether its VM had more than its share when that was last asked.
    static AHEAD: Cell<bool> = const { Cell::new(false) };
}

/// The calling thread serves this VM from now on.
///
/// It asks for short turns: when it is woken, a busy virtual CPU or a thread that serves another VM's long batch makes
/// room at once, and it makes room as soon. Its share of the CPU stays what it was. Linux knows this from 6.12 on;
/// older kernels ignore it, and nothing depends on it.
pub(crate) fn serve(company: &Arc<Company>, vm: &Arc<Vm>) {
    SERVED.set(Some((company.clone(), vm.clone())));
    // SAFETY: this option takes a number and no pointers.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, SLACK_NS) };
    ask_for_turns_of(SLICE_NS);
}

/// The calling thread begins to work, or goes on after it has slept. `shared`: other VMs are at work too.
pub(crate) fn begin_stretch(shared: bool) {
    if !shared {
        set_ahead(false);
    }
    SINCE.set(shared.then(Instant::now));
}

/// The calling thread goes on without having slept.
pub(crate) fn go_on(shared: bool) {
    if shared != is_shared() {
        begin_stretch(shared);
    }
}

/// Whether other VMs are at work too, as far as the calling thread was told.
pub(crate) fn is_shared() -> bool {
    SINCE.get().is_some()
}

/// To be called in the middle of work, between one page and the next: let others run if it is time. Returns whether
/// it was.
pub(crate) fn give_way() -> bool {
    let Some(since) = SINCE.get() else { return false };
    let worked = since.elapsed();
    if worked < STRETCH {
        return false;
    }
    let ahead = SERVED.with_borrow(|served| {
        let Some((company, vm)) = served else { return Some(false) };
        let ahead = company.charge(vm.id.0, vm.weight.load(Ordering::Relaxed), worked)?;
        vm.counters.gave_way.fetch_add(1, Ordering::Relaxed);
        Some(ahead)
    });
    // Somebody else has the account, and may be waiting for a CPU: later.
    let Some(ahead) = ahead else { return false };
    set_ahead(ahead);
    if ahead {
        std::thread::sleep(REST);
    } else {
        std::thread::yield_now();
    }
    SINCE.set(Some(Instant::now()));
    true
}

/// Ask for later turns while the VM has had more than its share.
fn set_ahead(ahead: bool) {
    if AHEAD.replace(ahead) != ahead {
        ask_for_turns_of(if ahead { SLICE_AHEAD_NS } else { SLICE_NS });
    }
}

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

fn ask_for_turns_of(slice_ns: u64) {
    let attributes = SchedulingAttributes {
        size: size_of::<SchedulingAttributes>() as u32,
        runtime_ns: slice_ns,
        ..SchedulingAttributes::default()
    };
    // SAFETY: the structure is valid for reads of the size it tells for the whole call; 0 is the calling thread.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if done != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "no short turns for a thread");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often a thread gives way that works for a while.
    fn interruptions(work: Duration) -> u32 {
        let until = Instant::now() + work;
        let mut times = 0;
        while Instant::now() < until {
            times += u32::from(give_way());
        }
        times
    }

    #[test]
    fn long_work_is_interrupted_where_others_wait_and_nowhere_else() {
        begin_stretch(false);
        assert_eq!(interruptions(STRETCH * 50), 0);
        begin_stretch(true);
        assert!(interruptions(STRETCH * 50) > 0);
        let at_once = || {
            begin_stretch(true);
            give_way()
        };
        assert!((0..100).any(|_| !at_once()), "who has just slept is not made to wait");
        go_on(true);
        std::thread::sleep(STRETCH);
        assert!(give_way(), "going on is no rest");
        go_on(false);
        std::thread::sleep(STRETCH);
        assert!(!give_way());
    }
}
