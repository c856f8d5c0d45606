//! Random 4 KiB reads of a block device, past the guest's page cache.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use rustix::fs::{Mode, OFlags};

use crate::report::{Report, Times};
use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The device, or a file.
    device: PathBuf,
    /// Reads timed.
    #[arg(long, default_value_t = 5_000)]
    count: usize,
    /// Bytes of it that are used.
    #[arg(long, default_value_t = 64 << 20)]
    span_bytes: u64,
}

/// A buffer that O_DIRECT takes.
#[repr(align(4096))]
struct Page([u8; 4096]);

/// Time reads.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let device: OwnedFd = rustix::fs::open(&arguments.device, flags, Mode::empty())?;
    let device = File::from(device);
    let pages = arguments.span_bytes / 4096;
    let mut page = Box::new(Page([0; 4096]));
    let mut times = Times::with_capacity(arguments.count);
    let mut random = 88_172_645_463_325_252u64;
    // Once over all of it, so that the host has it cached.
    for at in 0..pages {
        rustix::io::pread(&device, &mut page.0, at * 4096)?;
    }
    for _ in 0..arguments.count {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let began = Instant::now();
        let read = rustix::io::pread(&device, &mut page.0, random % pages * 4096)?;
        times.push(began.elapsed());
        if read != page.0.len() {
            return Err("the device is shorter than the span".into());
        }
    }
    Report::default().text("what", "block").times(times).print();
    Ok(())
}
