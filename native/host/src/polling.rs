//! Bounded busy polling: while requests come one after another, waiting awake for the next one is cheaper than a
//! sleep and a wake-up; when they do not, a thread must not burn a CPU that guests could use.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How many threads may poll at once: a quarter of the CPUs, on small machines none. There, the one that is polled for
/// needs the CPU more: with two CPUs, single gets over a unix socket come half as often with polling as without.
#[derive(Debug)]
pub(crate) struct Spinners {
    most: usize,
    now: AtomicUsize,
}

impl Spinners {
    pub(crate) fn new() -> Spinners {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Spinners { most: cpus / 4, now: AtomicUsize::new(0) }
    }

    /// Become one of them, if there is room.
    pub(crate) fn enter(&self) -> Option<Spinning<'_>> {
        if self.now.fetch_add(1, Ordering::Relaxed) < self.most {
            return Some(Spinning(self));
        }
        self.now.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

/// One polling thread.
pub(crate) struct Spinning<'a>(&'a Spinners);

impl Drop for Spinning<'_> {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Decides, from how long recent waits were, whether the next one is likely to be short enough to poll.
#[derive(Debug)]
pub(crate) struct Habit {
    limit: Duration,
    /// Exponentially weighted mean of recent waits, each counted as at most four times the limit: a single long
    /// wait does not end a busy phase, a few do.
    mean: Duration,
}

impl Habit {
    pub(crate) fn new(limit: Duration) -> Habit {
        Habit { limit, mean: limit * 2 }
    }

    /// Until when to poll in a wait that begins now; `None`: sleep at once.
    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        (self.mean < self.limit).then(|| now + self.limit)
    }

    /// Learn how long a wait was.
    pub(crate) fn waited(&mut self, wait: Duration) {
        self.mean = (self.mean * 7 + wait.min(self.limit * 4)) / 8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polls_while_waits_are_short_and_stops_when_they_are_not() {
        let mut habit = Habit::new(Duration::from_micros(50));
        let now = Instant::now();
        assert!(habit.deadline(now).is_none(), "a new connection is not worth a CPU");
        for _ in 0..16 {
            habit.waited(Duration::from_micros(5));
        }
        assert!(habit.deadline(now).is_some());
        habit.waited(Duration::from_secs(1));
        assert!(habit.deadline(now).is_some(), "one pause is no idleness");
        for _ in 0..4 {
            habit.waited(Duration::from_secs(1));
        }
        assert!(habit.deadline(now).is_none());
    }

    #[test]
    fn no_limit_no_polling() {
        let mut habit = Habit::new(Duration::ZERO);
        habit.waited(Duration::ZERO);
        assert!(habit.deadline(Instant::now()).is_none());
    }

    #[test]
    fn the_number_of_pollers_is_bounded() {
        let spinners = Spinners { most: 1, now: AtomicUsize::new(0) };
        let first = spinners.enter();
        assert!(first.is_some() && spinners.enter().is_none());
        drop(first);
        assert!(spinners.enter().is_some());
    }
}
