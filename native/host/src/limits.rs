//! What a VM may use of the daemon, so that none can starve another: connections, memory in flight, pages a second.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tmem_wire::{HEADER_BYTES, MAX_BODY_BYTES, PAGE_BYTES};

/// Largest frame either end may send, header included.
pub const MAX_FRAME_BYTES: usize = HEADER_BYTES + MAX_BODY_BYTES;
/// Frames and answers up to this size are served from a connection's own small buffers; larger ones need a
/// [`Permit`]. A batch of 32 raw pages is below it.
pub const SMALL_FRAME_BYTES: usize = 192 << 10;
/// A session stops reading requests while this many bytes of answers wait.
pub const OUT_HIGH_WATER: usize = SMALL_FRAME_BYTES;
/// What a [`Permit`] stands for: the largest frame, and answers up to the high-water mark plus the largest answer.
pub const LARGE_BUFFERS_BYTES: u64 = (2 * MAX_FRAME_BYTES + OUT_HIGH_WATER) as u64;
/// The smallest frame limit a guest may announce: it must be able to take one page.
pub const MIN_GUEST_FRAME_BYTES: usize = HEADER_BYTES + tmem_wire::pages::GET_ENTRY_BYTES + PAGE_BYTES;

/// Limits and deadlines of sessions.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections a VM may have open.
    pub connections: usize,
    /// Connections a VM may open in a second, and as many at once; 0 for no limit.
    pub connections_per_s: u64,
    /// Bytes of large buffers a VM's connections may hold together.
    pub in_flight_bytes: u64,
    /// The same for all VMs together, not counting one connection of each.
    pub in_flight_bytes_total: u64,
    /// Pages a second a VM of weight 100 may put, get and flush; 0 for no limit. Other weights in proportion.
    pub pages_per_s: u64,
    /// Requests a guest may have unanswered on a connection; told at HELLO.
    pub max_in_flight: u32,
    /// How long a connection may take to say HELLO.
    pub hello_timeout: Duration,
    /// How long a frame may take from its first byte to its last.
    pub frame_timeout: Duration,
    /// How long a guest may leave an answer unread.
    pub stall_timeout: Duration,
    /// Told at HELLO; a guest silent for three of these is disconnected. Zero turns it off.
    pub keep_alive: Duration,
    /// Longest busy polling before a thread sleeps; zero turns it off.
    pub busy_poll: Duration,
}

impl Limits {
    /// Pages a second that a VM of this weight may put, get and flush; 0 for no limit.
    pub(crate) fn pages_per_s_of(&self, weight: u32) -> u64 {
        self.pages_per_s.saturating_mul(weight.into()) / 100
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 16,
            connections_per_s: 50,
            in_flight_bytes: 40 << 20,
            in_flight_bytes_total: 256 << 20,
            pages_per_s: 0,
            max_in_flight: 64,
            hello_timeout: Duration::from_secs(10),
            frame_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(30),
            keep_alive: Duration::ZERO,
            busy_poll: Duration::from_micros(50),
        }
    }
}

/// A bounded amount of memory, possibly part of a larger one.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    used: Mutex<u64>,
    freed: Condvar,
    parent: Option<Arc<Budget>>,
}

impl Budget {
    /// A budget of `limit` bytes that also counts against `parent`.
    pub fn new(limit: u64, parent: Option<Arc<Budget>>) -> Arc<Budget> {
        Arc::new(Budget { limit, used: Mutex::new(0), freed: Condvar::new(), parent })
    }

    /// Take `bytes`, waiting up to `patience` for others to give them back.
    pub fn take(self: &Arc<Budget>, bytes: u64, patience: Duration) -> Option<Permit> {
        let deadline = Instant::now() + patience;
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        while *used + bytes > self.limit {
            let left = deadline.checked_duration_since(Instant::now())?;
            if left.is_zero() {
                return None;
            }
            used = self.freed.wait_timeout(used, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let first = *used == 0;
        *used += bytes;
        drop(used);
        let mut permit = Permit { budget: self.clone(), bytes, above: None };
        // The first permit of each part is outside the total: whatever the others do, everyone gets on.
        if let Some(parent) = self.parent.as_ref().filter(|_| !first) {
            let left = deadline.saturating_duration_since(Instant::now());
            // On failure the permit is dropped, which gives this level's share back.
            permit.above = Some(Box::new(parent.take(bytes, left)?));
        }
        Some(permit)
    }

    /// Bytes taken now.
    pub fn used(&self) -> u64 {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory taken from a [`Budget`]; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    budget: Arc<Budget>,
    bytes: u64,
    above: Option<Box<Permit>>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.above = None;
        *self.budget.used.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.budget.freed.notify_all();
    }
}

/// A token bucket, of pages or connections. It may be overdrawn once, so that a batch larger than it can pass.
#[derive(Debug)]
pub struct Bucket {
    state: Mutex<BucketState>,
}

#[derive(Debug)]
struct BucketState {
    /// 0: no limit.
    rate: f64,
    /// The bucket holds what flows in during this time.
    burst_s: f64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    /// A full bucket into which `rate` tokens flow in a second, 0 for no limit, and which holds those of `burst`.
    pub fn new(rate: u64, burst: Duration) -> Bucket {
        let (rate, burst_s) = (rate as f64, burst.as_secs_f64());
        let state = BucketState { rate, burst_s, tokens: rate * burst_s, filled: Instant::now() };
        Bucket { state: Mutex::new(state) }
    }

    /// Change the rate.
    pub fn set_rate(&self, rate: u64) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).rate = rate as f64;
    }

    /// Take `tokens`, or say how long to wait before trying again.
    pub fn take(&self, tokens: u64, now: Instant) -> Result<(), Duration> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.rate == 0.0 {
            return Ok(());
        }
        let elapsed = now.saturating_duration_since(state.filled).as_secs_f64();
        state.tokens = (state.tokens + elapsed * state.rate).min(state.rate * state.burst_s);
        state.filled = now;
        if state.tokens < 0.0 {
            return Err(Duration::from_secs_f64((-state.tokens / state.rate).clamp(1e-4, 1.0)));
        }
        state.tokens -= tokens as f64;
        Ok(())
    }
}

/// Lets a bounded number of a VM's connections be served at the same time, so that a VM with many of them cannot
/// take every CPU while another waits.
#[derive(Debug)]
pub(crate) struct Turnstile {
    most: usize,
    inside: Mutex<usize>,
    left: Condvar,
}

impl Turnstile {
    /// Half the CPUs.
    pub(crate) fn new() -> Turnstile {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Turnstile { most: (cpus / 2).max(1), inside: Mutex::new(0), left: Condvar::new() }
    }

    /// Wait for a turn.
    pub(crate) fn enter(&self) -> Turn<'_> {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        while *inside >= self.most {
            inside = self.left.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
        *inside += 1;
        Turn(self)
    }
}

/// A turn; over when dropped.
pub(crate) struct Turn<'a>(&'a Turnstile);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.inside.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn a_budget_counts_against_its_parent_and_is_given_back() {
        let total = Budget::new(10, None);
        let (a, b) = (Budget::new(8, Some(total.clone())), Budget::new(8, Some(total.clone())));
        let own = a.take(1, Duration::ZERO).expect("the first is outside the total");
        let more = a.take(7, Duration::ZERO).expect("fits");
        assert!(a.take(1, Duration::ZERO).is_none(), "over its own limit");
        let other = b.take(1, Duration::ZERO).expect("the first is outside the total");
        assert!(b.take(4, Duration::ZERO).is_none(), "over the total");
        assert_eq!((b.used(), total.used()), (1, 7), "a failed take leaves nothing behind");
        drop(more);
        assert!(b.take(4, Duration::ZERO).is_some());
        drop((own, other));
        assert_eq!((a.used(), b.used(), total.used()), (0, 0, 0));
    }

    #[test]
    fn a_waiter_gets_what_another_gives_back() {
        let budget = Budget::new(1, None);
        let held = budget.take(1, Duration::ZERO);
        let other = budget.clone();
        let waiter = std::thread::spawn(move || other.take(1, Duration::from_secs(10)).is_some());
        drop(held);
        assert!(waiter.join().unwrap());
    }

    #[test]
    fn a_bucket_lets_through_its_rate_and_no_more() {
        let bucket = Bucket::new(1000, Duration::from_millis(100));
        let mut now = Instant::now();
        let start = now;
        let mut passed = 0u64;
        while now - start < Duration::from_secs(10) {
            match bucket.take(256, now) {
                Ok(()) => passed += 256,
                Err(wait) => now += wait,
            }
        }
        assert!((9_500..=10_700).contains(&passed), "{passed} pages in 10 s at 1000 a second");
    }

    #[test]
    fn no_rate_means_no_limit() {
        let bucket = Bucket::new(0, Duration::ZERO);
        assert!((0..10_000).all(|_| bucket.take(256, Instant::now()).is_ok()));
    }

    #[test]
    fn a_turnstile_lets_in_as_many_as_it_says() {
        let turnstile = Turnstile { most: 2, inside: Mutex::new(0), left: Condvar::new() };
        let (now, peak) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _turn = turnstile.enter();
                        peak.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::yield_now();
                        now.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(peak.load(Ordering::SeqCst), 2);
    }
}
