//! `tmem-guest ping`: is the host there, what does it allow, how far is it.

use std::error::Error;
use std::time::{Duration, Instant};

use tmem_wire::{Features, Role};

use crate::link::{hello, Endpoint, Link};

/// Options of `tmem-guest ping`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where tmemd listens: vsock:CID:PORT or unix:/path.
    #[arg(long, default_value = "vsock:2:29805")]
    endpoint: Endpoint,
    /// Round trips to time.
    #[arg(long, default_value_t = 10)]
    count: u32,
    /// Seconds to wait for any one answer.
    #[arg(long, default_value_t = 5)]
    timeout_s: u32,
}

/// Connect, time round trips, and print the result as one `name=value` line.
pub fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let timeout = Duration::from_secs(args.timeout_s.max(1).into());
    let mut link = Link::connect(&args.endpoint, &hello(Role::Control, "tmem-guest ping")?, timeout)?;
    let mut times = Vec::new();
    for _ in 0..args.count.max(1) {
        let start = Instant::now();
        link.ping()?;
        times.push(start.elapsed());
    }
    times.sort();
    let limits = link.limits();
    println!(
        "endpoint={} version={} lz4={} checksums={} max_frame_bytes={} max_batch={} max_in_flight={} \
         keep_alive_ms={} quota_bytes={} round_trip_min_us={} round_trip_p50_us={} round_trip_max_us={}",
        args.endpoint,
        limits.version,
        limits.features.has(Features::LZ4),
        limits.features.has(Features::CHECKSUMS),
        limits.max_frame_bytes,
        limits.max_batch,
        limits.max_in_flight,
        limits.keep_alive_ms,
        limits.quota_bytes,
        times[0].as_micros(),
        times[times.len() / 2].as_micros(),
        times[times.len() - 1].as_micros(),
    );
    Ok(())
}
