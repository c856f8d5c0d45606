//! tmem's own session as the end of a stream.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::peer::{Service, Step};
use super::ring::signal;
use crate::engine::Engine;
use crate::limits::{MAX_FRAME_BYTES, SMALL_FRAME_BYTES};
use crate::outbox::{Wake, Waker};
use crate::scheduling;
use crate::session::{Session, State};
use crate::vm::Vm;

/// How often memory for a large frame is asked for while the VM's other streams hold it all.
const MEMORY_RETRY: Duration = Duration::from_millis(2);
/// Large buffers are kept for this long after their last use: a batch seldom comes alone.
const KEEP_LARGE: Duration = Duration::from_millis(500);

/// Wakes the thread of a device.
pub(crate) struct DeviceWaker {
    pub(crate) eventfd: OwnedFd,
    /// A service has something.
    pub(crate) services: AtomicBool,
    /// The thread is to end.
    pub(crate) stop: AtomicBool,
    /// The keeper is to let go of the device then.
    pub(crate) forget: AtomicBool,
}

struct SessionWaker(Arc<DeviceWaker>);

impl Waker for SessionWaker {
    fn wake(&self, _why: Wake) {
        if !self.0.services.swap(true, Ordering::AcqRel) {
            signal(&self.0.eventfd);
        }
    }
}

/// A session and its deadlines.
pub(crate) struct SessionService {
    engine: Arc<Engine>,
    session: Session,
    /// Deadline of HELLO, then of the frame that is half here.
    deadline: Option<(Instant, &'static str)>,
    /// When bytes last came.
    heard: Instant,
    /// Since when answers wait for the guest to read.
    stalled: Option<Instant>,
    /// When a frame last needed large buffers.
    large_at: Instant,
}

impl SessionService {
    /// A new session of `vm`; `None` if it has too many or the engine drains.
    pub(crate) fn open(
        engine: &Arc<Engine>,
        vm: &Arc<Vm>,
        guest_port: u64,
        waker: &Arc<DeviceWaker>,
    ) -> Option<SessionService> {
        let peer = format!("vsock stream {guest_port}");
        let session = Session::new(engine, vm, peer, Box::new(SessionWaker(waker.clone())))?;
        let now = Instant::now();
        Some(SessionService {
            engine: engine.clone(),
            session,
            deadline: Some((now + engine.limits().hello_timeout, "no HELLO in time")),
            heard: now,
            stalled: None,
            large_at: now,
        })
    }

    /// What has taken too long, or when to look again.
    fn check_deadlines(&mut self, now: Instant) -> Result<Option<Instant>, &'static str> {
        let limits = self.engine.limits();
        let silence =
            (!limits.keep_alive.is_zero()).then(|| (self.heard + 3 * limits.keep_alive, "silent too long"));
        let stall = self.stalled.map(|since| (since + limits.stall_timeout, "answers were not read in time"));
        let mut next: Option<Instant> = None;
        for (deadline, what) in [self.deadline, silence, stall].into_iter().flatten() {
            if deadline <= now {
                return Err(what);
            }
            next = Some(next.map_or(deadline, |next| next.min(deadline)));
        }
        Ok(next)
    }
}

impl Service for SessionService {
    fn feed(&mut self, input: &[u8], fresh: usize, out: &mut Vec<u8>) -> Step {
        let now = Instant::now();
        if fresh > 0 {
            self.heard = now;
            let vm = self.session.vm().id.0;
            scheduling::go_on(self.engine.company.is_at_work(vm));
        }
        let had = out.len();
        let mut consumed = 0;
        let mut again: Option<Duration> = None;
        let mut closed = false;
        loop {
            let Ok(progress) = self.session.feed(&input[consumed..], out) else {
                closed = true;
                break;
            };
            consumed += progress.consumed;
            match progress.state {
                State::NeedInput(_) => {
                    if self.session.role().is_some() {
                        if consumed == input.len() {
                            self.deadline = None;
                        } else if consumed > 0 || self.deadline.is_none() {
                            let until = now + self.engine.limits().frame_timeout;
                            self.deadline = Some((until, "a frame did not arrive whole in time"));
                        }
                    }
                }
                State::OutputFull => {}
                State::NeedMemory => {
                    self.large_at = now;
                    if self.session.grow(Duration::ZERO) {
                        continue;
                    }
                    again = Some(MEMORY_RETRY);
                }
                State::Throttled(wait) => again = Some(wait),
                State::Closed => closed = true,
            }
            break;
        }
        self.stalled = if out.is_empty() {
            None
        } else if had == 0 {
            Some(now)
        } else {
            self.stalled.or(Some(now))
        };
        match self.check_deadlines(now) {
            Ok(next) => {
                let next = next.map(|next| next.saturating_duration_since(now));
                again = [again, next].into_iter().flatten().min();
            }
            Err(what) => {
                self.session.timed_out(what);
                closed = true;
            }
        }
        if self.session.is_large() {
            again = Some(again.map_or(KEEP_LARGE, |again| again.min(KEEP_LARGE)));
        }
        Step { consumed, again_in: again, closed }
    }

    fn max_input_bytes(&self) -> usize {
        if self.session.is_large() {
            MAX_FRAME_BYTES
        } else {
            SMALL_FRAME_BYTES
        }
    }

    fn taken(&mut self) {
        self.stalled = None;
    }

    fn idle(&mut self) -> bool {
        let idle = self.session.is_large() && self.large_at.elapsed() >= KEEP_LARGE;
        if idle {
            self.session.shrink();
        }
        idle
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use rustix::event::{eventfd, EventfdFlags};
    use tmem_store::{Store, StoreConfig, VmLimits};
    use tmem_wire::pages::write_keys;
    use tmem_wire::{Header, HelloRequest, Key, Op, PoolCreate, PoolKind, Role, HEADER_BYTES, MAX_BATCH};

    use super::*;
    use crate::listener::SocketOptions;
    use crate::{Limits, VmSpec};

    const FRAMES: usize = 40;
    const OTHER_VM: u16 = 1000;

    #[test]
    fn a_stream_with_much_to_do_makes_room_for_other_vms() {
        let (store, _) = Store::open(&StoreConfig::memfd(16 << 20)).unwrap();
        let sockets = SocketOptions { mode: 0o600, gid: None };
        let engine = Engine::new(Arc::new(store), Limits::default(), sockets).unwrap();
        let vm = engine.add_vm("vm", &VmSpec::default(), &VmLimits::default()).unwrap();
        let waker = Arc::new(DeviceWaker {
            eventfd: eventfd(0, EventfdFlags::empty()).unwrap(),
            services: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            forget: AtomicBool::new(false),
        });
        scheduling::serve(&engine.company, &vm);
        let mut service = SessionService::open(&engine, &vm, 1, &waker).unwrap();
        let hello = HelloRequest::new(Role::FileCache, [9; 16]);
        let (mut input, mut out) = (Vec::new(), Vec::new());
        Header::request(Op::Hello, 1).write_frame(&hello.encode(), &mut input);
        service.feed(&input, input.len(), &mut out);
        let pool = PoolCreate::private(PoolKind::Ephemeral { exclusive: false }, "p").encode();
        input.clear();
        out.clear();
        Header::request(Op::PoolCreate, 2).write_frame(&pool, &mut input);
        service.feed(&input, input.len(), &mut out);
        let pool = Header::decode(out.first_chunk().unwrap()).unwrap().pool;
        // Flushes of pages that are not there: much work for few bytes.
        let keys: Vec<_> = (0..MAX_BATCH as u32).map(|index| Key { object: [1; 16], index }).collect();
        input.clear();
        for _ in 0..FRAMES {
            write_keys(Op::FlushPage, 3, pool, false, &keys, &mut input);
        }
        let made_room = || vm.counters.gave_way.load(Ordering::Relaxed);
        let mut serve_all = || {
            out.clear();
            assert_eq!(service.feed(&input, input.len(), &mut out).consumed, input.len());
            assert_eq!(out.len(), FRAMES * (HEADER_BYTES + MAX_BATCH));
        };
        serve_all();
        assert_eq!(made_room(), 0, "nobody else is at work");
        engine.company.is_at_work(OTHER_VM);
        serve_all();
        assert!(made_room() > 5, "made room {} times", made_room());
    }
}
