//! One VM: its identity, the boot its guest is in, its open sessions and its counters.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tmem_store::VmId;
use tmem_wire::{Notice, Op, Report, Role};

use crate::histogram::Histogram;
use crate::limits::{Bucket, Budget, Limits, Turnstile};
use crate::outbox::{Outbox, Phase};

/// Where a VM's guest connects from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VmSpec {
    /// Its context id on an AF_VSOCK host.
    pub cid: Option<u32>,
    /// Its hybrid vsock socket; tmemd listens on this path with `_29805` behind it.
    pub hybrid_socket: Option<PathBuf>,
    /// The socket of its vsock device inside tmemd.
    pub vhost_user_socket: Option<PathBuf>,
    /// The context id that device shows to the guest.
    pub guest_cid: Option<u32>,
}

/// How long a boot that was followed by another is refused: connections of it may still be on their way. After that
/// it is taken for a guest that was reset to a snapshot.
const SUPERSEDED_FOR: Duration = Duration::from_secs(60);
/// How many superseded boots are remembered.
const SUPERSEDED_MOST: usize = 16;
/// What of their rates a VM may save up.
const PAGES_BURST: Duration = Duration::from_millis(100);
const ARRIVALS_BURST: Duration = Duration::from_secs(1);
/// Lines a VM may cause in the log in [`LOG_PERIOD`].
const LOG_LINES: u32 = 20;
const LOG_PERIOD: Duration = Duration::from_secs(10);

/// The boot a guest is in.
#[derive(Debug, Default)]
pub(crate) struct Boot {
    pub(crate) id: Option<[u8; 16]>,
    /// Counts boots seen; sessions of an earlier one are over.
    pub(crate) generation: u64,
    superseded: Vec<([u8; 16], Instant)>,
}

impl Boot {
    /// Whether `id` was followed by another boot a short while ago.
    pub(crate) fn is_superseded(&self, id: [u8; 16]) -> bool {
        self.superseded.iter().any(|&(old, at)| old == id && at.elapsed() < SUPERSEDED_FOR)
    }

    /// Enter a new boot.
    pub(crate) fn advance(&mut self, id: [u8; 16]) {
        if let Some(old) = self.id.replace(id) {
            self.superseded.retain(|&(was, _)| was != id && was != old);
            if self.superseded.len() == SUPERSEDED_MOST {
                self.superseded.remove(0);
            }
            self.superseded.push((old, Instant::now()));
            self.generation += 1;
        }
    }
}

/// Counters the sessions keep; the store keeps those of the pages.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections opened since start.
    pub connections: AtomicU64,
    /// Connections refused by a limit.
    pub connections_refused: AtomicU64,
    /// Connections closed because the guest broke the protocol.
    pub protocol_errors: AtomicU64,
    /// Connections closed because the guest was silent, half-way through a frame, or did not read.
    pub timeouts: AtomicU64,
    /// Frames that had to wait for the rate limit.
    pub throttled: AtomicU64,
    /// Times that its work was interrupted to let other VMs' threads run.
    pub gave_way: AtomicU64,
    frames: [AtomicU64; 16],
}

impl Counters {
    fn slot(op: Op) -> usize {
        Op::ALL.iter().position(|&o| o == op).unwrap_or(0)
    }

    pub(crate) fn count_frame(&self, op: Op) {
        self.frames[Self::slot(op)].fetch_add(1, Ordering::Relaxed);
    }

    /// Requests served, by operation.
    pub fn frames(&self) -> impl Iterator<Item = (Op, u64)> + '_ {
        Op::ALL.iter().map(|&op| (op, self.frames[Self::slot(op)].load(Ordering::Relaxed)))
    }
}

const _: () = assert!(Op::ALL.len() <= 16);

struct Slot {
    outbox: Arc<Outbox>,
    /// Known after HELLO.
    hello: Option<(Role, u64)>,
}

struct Sessions {
    open: Vec<Slot>,
    removed: bool,
}

struct LogBudget {
    since: Instant,
    lines: u32,
    suppressed: u64,
}

/// A registered VM.
pub struct Vm {
    /// Its name, as the administrator gave it.
    pub name: String,
    /// Its id in the store.
    pub id: VmId,
    /// Where its guest connects from.
    pub spec: VmSpec,
    /// Counters of its sessions.
    pub counters: Counters,
    /// Time to serve a GET, by page.
    pub get_latency: Histogram,
    /// Time to serve a PUT, by page.
    pub put_latency: Histogram,
    pub(crate) in_flight: Arc<Budget>,
    pub(crate) bucket: Bucket,
    /// Its share of what serving takes, in proportion to other VMs'.
    pub(crate) weight: AtomicU32,
    /// Connections of it that are accepted.
    pub(crate) arrivals: Bucket,
    pub(crate) turnstile: Turnstile,
    connections_most: usize,
    boot: Mutex<Boot>,
    sessions: Mutex<Sessions>,
    report: Mutex<Option<(Report, Instant)>>,
    log: Mutex<LogBudget>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vm {
    pub(crate) fn new(
        name: &str,
        id: VmId,
        spec: VmSpec,
        limits: &Limits,
        in_flight: Arc<Budget>,
        weight: u32,
    ) -> Vm {
        let pages_per_s = limits.pages_per_s_of(weight);
        Vm {
            name: name.to_owned(),
            id,
            spec,
            counters: Counters::default(),
            get_latency: Histogram::default(),
            put_latency: Histogram::default(),
            in_flight,
            bucket: Bucket::new(pages_per_s, PAGES_BURST),
            weight: AtomicU32::new(weight),
            arrivals: Bucket::new(limits.connections_per_s, ARRIVALS_BURST),
            turnstile: Turnstile::new(),
            connections_most: limits.connections,
            boot: Mutex::default(),
            sessions: Mutex::new(Sessions { open: Vec::new(), removed: false }),
            report: Mutex::new(None),
            log: Mutex::new(LogBudget { since: Instant::now(), lines: 0, suppressed: 0 }),
        }
    }

    /// The boot, held while pools are attached or created so that no session of an old boot slips in between.
    pub(crate) fn boot(&self) -> MutexGuard<'_, Boot> {
        locked(&self.boot)
    }

    /// Boot id of the guest that is or was last connected.
    pub fn boot_id(&self) -> Option<[u8; 16]> {
        self.boot().id
    }

    /// Connections open now.
    pub fn connections(&self) -> usize {
        locked(&self.sessions).open.len()
    }

    /// The guest's last report, and its age.
    pub fn report(&self) -> Option<(Report, Duration)> {
        locked(&self.report).map(|(report, at)| (report, at.elapsed()))
    }

    pub(crate) fn set_report(&self, report: Report) {
        *locked(&self.report) = Some((report, Instant::now()));
    }

    /// Enter a session, unless the VM has too many or is being removed.
    pub(crate) fn enter(&self, outbox: &Arc<Outbox>) -> bool {
        let mut sessions = locked(&self.sessions);
        if sessions.removed || sessions.open.len() >= self.connections_most {
            drop(sessions);
            self.counters.connections_refused.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        sessions.open.push(Slot { outbox: outbox.clone(), hello: None });
        self.counters.connections.fetch_add(1, Ordering::Relaxed);
        true
    }

    pub(crate) fn said_hello(&self, outbox: &Arc<Outbox>, role: Role, generation: u64) {
        for slot in &mut locked(&self.sessions).open {
            if Arc::ptr_eq(&slot.outbox, outbox) {
                slot.hello = Some((role, generation));
            }
        }
    }

    pub(crate) fn leave(&self, outbox: &Arc<Outbox>) {
        locked(&self.sessions).open.retain(|slot| !Arc::ptr_eq(&slot.outbox, outbox));
    }

    /// Queue a notice on every control session; returns how many there are.
    pub(crate) fn notify(&self, notice: Notice) -> usize {
        let control: Vec<_> = locked(&self.sessions)
            .open
            .iter()
            .filter(|slot| matches!(slot.hello, Some((Role::Control, _))))
            .map(|slot| slot.outbox.clone())
            .collect();
        for outbox in &control {
            outbox.push(notice);
        }
        control.len()
    }

    /// Let all sessions answer what has arrived, and end.
    pub(crate) fn drain(&self) {
        self.notify(Notice::Shutdown);
        self.close(Phase::Draining, |_| true);
    }

    /// End the sessions of boots before `generation`.
    pub(crate) fn close_before(&self, generation: u64) {
        self.close(Phase::Closing, |hello| hello.is_some_and(|(_, of)| of < generation));
    }

    /// End all sessions now.
    pub(crate) fn close_all(&self) {
        self.close(Phase::Closing, |_| true);
    }

    /// End all sessions and let no more in.
    pub(crate) fn retire(&self) {
        locked(&self.sessions).removed = true;
        self.close_all();
    }

    fn close(&self, phase: Phase, which: impl Fn(Option<(Role, u64)>) -> bool) {
        let chosen: Vec<_> = locked(&self.sessions)
            .open
            .iter()
            .filter(|slot| which(slot.hello))
            .map(|slot| slot.outbox.clone())
            .collect();
        for outbox in chosen {
            outbox.close(phase);
        }
    }

    /// Whether the VM may cause another line in the log: a hostile guest must not fill the disk. Says how many lines
    /// were left out before it.
    pub(crate) fn may_log(&self) -> Option<u64> {
        let mut log = locked(&self.log);
        if log.since.elapsed() > LOG_PERIOD {
            log.since = Instant::now();
            log.lines = 0;
        }
        if log.lines == LOG_LINES {
            log.suppressed += 1;
            return None;
        }
        log.lines += 1;
        Some(std::mem::take(&mut log.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_superseded_boot_is_known_for_a_while() {
        let mut boot = Boot::default();
        boot.advance([1; 16]);
        assert_eq!(boot.generation, 0, "the first boot ends no session");
        boot.advance([2; 16]);
        assert_eq!(boot.generation, 1);
        assert!(boot.is_superseded([1; 16]));
        assert!(!boot.is_superseded([2; 16]));
        for n in 3..100 {
            boot.advance([n; 16]);
        }
        assert!(boot.superseded.len() <= SUPERSEDED_MOST);
    }
}
