//! Percentiles of many short times, and JSON without a library: names and numbers only.

use std::fmt::Write as _;
use std::time::Duration;

/// Times of single operations.
#[derive(Default)]
pub(crate) struct Times {
    nanoseconds: Vec<u64>,
}

impl Times {
    pub(crate) fn with_capacity(count: usize) -> Times {
        Times { nanoseconds: Vec::with_capacity(count) }
    }

    pub(crate) fn push(&mut self, time: Duration) {
        self.nanoseconds.push(time.as_nanos() as u64);
    }

    fn percentile_us(sorted: &[u64], percent: f64) -> f64 {
        let last = sorted.len().saturating_sub(1);
        let at = (percent / 100.0 * last as f64).round() as usize;
        sorted.get(at).map_or(f64::NAN, |ns| *ns as f64 / 1000.0)
    }
}

/// One line of output.
#[derive(Default)]
pub(crate) struct Report(String);

impl Report {
    pub(crate) fn text(mut self, name: &str, value: &str) -> Report {
        // Writing to a string cannot fail.
        let _ = write!(self.0, "{}\"{name}\": \"{value}\"", self.comma());
        self
    }

    pub(crate) fn number(mut self, name: &str, value: f64) -> Report {
        let _ = if value.is_finite() {
            write!(self.0, "{}\"{name}\": {value}", self.comma())
        } else {
            write!(self.0, "{}\"{name}\": null", self.comma())
        };
        self
    }

    /// Percentiles in microseconds, and a histogram whose buckets grow by an eighth: lower bound in microseconds and
    /// count.
    pub(crate) fn times(mut self, mut times: Times) -> Report {
        let sorted = &mut times.nanoseconds;
        sorted.sort_unstable();
        let mut report = std::mem::take(&mut self).number("samples", sorted.len() as f64);
        for (name, percent) in [("p50_us", 50.0), ("p99_us", 99.0), ("p999_us", 99.9), ("max_us", 100.0)] {
            report = report.number(name, Times::percentile_us(sorted, percent));
        }
        let mut buckets = String::new();
        let mut at = 0;
        let mut bound = 1000.0f64;
        while at < sorted.len() {
            let next = bound * 1.125;
            let end = sorted.partition_point(|ns| (*ns as f64) < next);
            if end > at {
                let comma = if buckets.is_empty() { "" } else { ", " };
                let _ = write!(buckets, "{comma}[{:.3}, {}]", bound / 1000.0, end - at);
            }
            at = end;
            bound = next;
        }
        let _ = write!(report.0, ", \"histogram\": [{buckets}]");
        report
    }

    pub(crate) fn print(self) {
        println!("{{{}}}", self.0);
    }

    fn comma(&self) -> &'static str {
        if self.0.is_empty() {
            ""
        } else {
            ", "
        }
    }
}
