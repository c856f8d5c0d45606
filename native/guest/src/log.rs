//! One line to stderr for each event, which never waits for its reader.
//!
//! The reader is usually journald. While the guest swaps, journald may itself be waiting for a page that this very
//! program must deliver, so a line that does not fit into the pipe is dropped rather than waited for.

use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::event::{poll, PollFd, PollFlags, Timespec};

/// Longest line, in bytes; what is longer is cut.
const LINE_BYTES: usize = 512;

/// Who reads the lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    /// A person, or a file.
    Person,
    /// journald, which knows who wrote a line.
    Journal,
    /// The kernel's log, which does not.
    Kernel,
}

static TO_KERNEL: AtomicBool = AtomicBool::new(false);

struct Stderr;

static STDERR: Stderr = Stderr;

/// Log from now on, at `level` and above.
pub fn init(level: LevelFilter) {
    if log::set_logger(&STDERR).is_ok() {
        log::set_max_level(level);
    }
}

/// If standard error is a file, log to the kernel's log instead. A file's pages may themselves be swapped out, and who
/// brings them back must not wait for them.
pub fn spare_files() {
    let stderr = std::io::stderr();
    let is_file = rustix::fs::fstat(stderr.as_fd()).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile
    });
    if !is_file {
        return;
    }
    let kernel = std::fs::OpenOptions::new().write(true).open("/dev/kmsg");
    match kernel {
        Ok(kernel) => {
            log::info!("standard error is a file, which may be swapped out: messages go to the kernel's log now");
            if rustix::stdio::dup2_stderr(&kernel).is_ok() {
                TO_KERNEL.store(true, Ordering::Relaxed);
            }
        }
        Err(error) => log::warn!(
            "standard error is a file, which may be swapped out, and the kernel's log cannot be opened instead \
             (/dev/kmsg: {error}); use a pipe"
        ),
    }
}

/// The syslog priority that systemd understands at the start of a line.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// Put a line together without allocating; returns its bytes.
fn format<'a>(record: &Record, reader: Reader, line: &'a mut [u8; LINE_BYTES]) -> &'a [u8] {
    let mut rest = &mut line[..LINE_BYTES - 1];
    let (priority, args) = (priority(record.level()), record.args());
    // A line that is too long is cut, which is what the error says.
    let _ = match reader {
        Reader::Journal => write!(rest, "<{priority}>{args}"),
        Reader::Kernel => write!(rest, "<{priority}>tmem-guest: {args}"),
        Reader::Person => {
            write!(rest, "tmem-guest: {}: {args}", record.level().as_str().to_ascii_lowercase())
        }
    };
    let length = LINE_BYTES - 1 - rest.len();
    for byte in &mut line[..length] {
        if *byte == b'\n' {
            *byte = b' ';
        }
    }
    line[length] = b'\n';
    &line[..=length]
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let stderr = std::io::stderr();
        let to_kernel = TO_KERNEL.load(Ordering::Relaxed);
        let mut ready = [PollFd::from_borrowed_fd(stderr.as_fd(), PollFlags::OUT)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        // The kernel's log takes lines at all times, and says of itself only when it can be read.
        if !to_kernel && !matches!(poll(&mut ready, Some(&at_once)), Ok(1)) {
            return;
        }
        let mut line = [0; LINE_BYTES];
        let is_socket = rustix::fs::fstat(stderr.as_fd()).is_ok_and(|stat| {
            rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Socket
        });
        let reader = match is_socket {
            _ if to_kernel => Reader::Kernel,
            true => Reader::Journal,
            false => Reader::Person,
        };
        // Nobody to tell if telling fails.
        let _ = stderr.lock().write_all(format(record, reader, &mut line));
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line_and_bounded() {
        let mut line = [0; LINE_BYTES];
        let text = format!("first\nsecond {}", "x".repeat(2000));
        let got = format(&Record::builder().args(format_args!("{text}")).build(), Reader::Journal, &mut line);
        assert!(got.starts_with(b"<6>first second xx"));
        assert!(!got[..got.len() - 1].contains(&b'\n'));
        assert!(got.ends_with(b"x\n") && got.len() <= LINE_BYTES);
        let got = format(&Record::builder().args(format_args!("a")).build(), Reader::Kernel, &mut line);
        assert_eq!(got, b"<6>tmem-guest: a\n");
    }
}
