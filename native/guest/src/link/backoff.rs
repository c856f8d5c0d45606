//! How long to wait between attempts to reconnect.

use std::time::Duration;

/// Doubles from `first` to `most`. Without jitter: a host serves tens of guests, not thousands.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    /// Start at `first`, never wait longer than `most`.
    pub fn new(first: Duration, most: Duration) -> Backoff {
        Backoff { first, most, next: first }
    }

    /// The wait before the coming attempt.
    pub fn wait(&mut self) -> Duration {
        let now = self.next;
        self.next = (now * 2).min(self.most);
        now
    }

    /// An attempt succeeded: start over.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

impl Default for Backoff {
    /// 20 ms to 1 s: a restarted tmemd is found again well within two seconds.
    fn default() -> Backoff {
        Backoff::new(Duration::from_millis(20), Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_its_bound_and_starts_over() {
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(50));
        let waits: Vec<_> = (0..4).map(|_| backoff.wait().as_millis()).collect();
        assert_eq!(waits, [20, 40, 50, 50]);
        backoff.reset();
        assert_eq!(backoff.wait().as_millis(), 20);
    }
}
