//! Latency histograms: fixed memory, no locks, buckets that double.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Number of buckets. Bucket `i` counts latencies below `2^i` × 256 ns that no lower bucket counts; the last counts
/// everything above (about 8 s).
pub const BUCKETS: usize = 26;

/// Counts of latencies.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

/// A histogram at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Counts by bucket.
    pub counts: [u64; BUCKETS],
    /// Sum of all latencies, nanoseconds.
    pub sum_ns: u64,
}

/// Upper bound of a bucket in seconds; the last has none.
pub fn upper_bound_s(bucket: usize) -> f64 {
    if bucket + 1 >= BUCKETS {
        f64::INFINITY
    } else {
        256e-9 * f64::from(1u32 << bucket)
    }
}

impl Histogram {
    /// Count a latency `times` times.
    pub fn record(&self, latency: Duration, times: u64) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        let bucket = ((u64::BITS - (ns >> 8).leading_zeros()) as usize).min(BUCKETS - 1);
        self.buckets[bucket].fetch_add(times, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns.saturating_mul(times), Ordering::Relaxed);
    }

    /// The counts now. Concurrent records may be half in it.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            counts: std::array::from_fn(|i| self.buckets[i].load(Ordering::Relaxed)),
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_lands_below_its_bucket_s_bound() {
        for ns in [0u64, 1, 255, 256, 257, 1000, 65_536, 1_000_000, 1_000_000_000] {
            let histogram = Histogram::default();
            histogram.record(Duration::from_nanos(ns), 1);
            let counts = histogram.snapshot().counts;
            let bucket = counts.iter().position(|&n| n == 1).unwrap();
            let s = ns as f64 * 1e-9;
            assert!(s < upper_bound_s(bucket), "{ns} ns in bucket {bucket}");
            assert!(bucket == 0 || s >= upper_bound_s(bucket - 1), "{ns} ns in bucket {bucket}");
        }
    }

    #[test]
    fn the_longest_latency_is_counted() {
        let histogram = Histogram::default();
        histogram.record(Duration::MAX, 3);
        assert_eq!(histogram.snapshot().counts[BUCKETS - 1], 3);
    }
}
