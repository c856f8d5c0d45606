//! How other threads reach a session: notices for its guest, and the wish that it close.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};

use tmem_wire::Notice;

/// Why a transport is woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// Notices wait: call [`crate::Session::feed`], with no input if there is none.
    Notices,
    /// The session is to end: call [`crate::Session::feed`] a last time, send what it answers, close.
    Drain,
    /// The session is over: stop also if the guest does not read.
    Close,
}

/// Wakes the transport of a session. Called from any thread, also when the session is already gone; must not block.
pub trait Waker: Send + Sync {
    /// Something waits in the session's [`Outbox`].
    fn wake(&self, why: Wake);
}

/// How far a session is from its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
#[repr(u8)]
pub(crate) enum Phase {
    Open = 0,
    /// Answer what has arrived, then close.
    Draining = 1,
    /// Close at once, whatever has arrived: the guest's boot is over, or its VM was removed.
    Closing = 2,
}

/// At most one notice of each kind waits: a newer one makes the older one untrue. So a guest that never reads cannot
/// make it grow.
#[derive(Debug, Default)]
struct Pending {
    reclaim: Option<Notice>,
    quota: Option<Notice>,
    frozen: Option<Notice>,
    shutdown: bool,
}

/// What waits for a session.
pub struct Outbox {
    pending: Mutex<Pending>,
    /// Whether `pending` holds anything, so that the data path need not take the lock.
    any: AtomicU8,
    phase: AtomicU8,
    waker: Box<dyn Waker>,
}

impl Outbox {
    pub(crate) fn new(waker: Box<dyn Waker>) -> Outbox {
        Outbox {
            pending: Mutex::default(),
            any: AtomicU8::new(0),
            phase: AtomicU8::new(Phase::Open as u8),
            waker,
        }
    }

    /// Queue a notice and wake the transport.
    pub(crate) fn push(&self, notice: Notice) {
        {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            match notice {
                Notice::Reclaim { .. } => pending.reclaim = Some(notice),
                Notice::Quota { .. } => pending.quota = Some(notice),
                Notice::Frozen(_) => pending.frozen = Some(notice),
                Notice::Shutdown => pending.shutdown = true,
            }
            self.any.store(1, Ordering::Release);
        }
        self.waker.wake(Wake::Notices);
    }

    /// Move the waiting notices, as frames, to the end of `out`.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        if self.any.load(Ordering::Acquire) == 0 {
            return;
        }
        let pending = {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            self.any.store(0, Ordering::Release);
            std::mem::take(&mut *pending)
        };
        for notice in [pending.quota, pending.frozen, pending.reclaim].into_iter().flatten() {
            notice.write_frame(out);
        }
        if pending.shutdown {
            Notice::Shutdown.write_frame(out);
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Open,
            1 => Phase::Draining,
            _ => Phase::Closing,
        }
    }

    /// Let the session end, and wake its transport. A session never goes back to an earlier phase.
    pub(crate) fn close(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
        self.waker.wake(if phase == Phase::Draining { Wake::Drain } else { Wake::Close });
    }
}
