//! The keeper: the parent of the serving process, which keeps the page table and starts another one if it dies.
//!
//! It must be this small program and not a supervisor elsewhere: while the device has no server, nothing that was
//! swapped out can come back, so whoever brings the server back must not have been swapped out itself. It is
//! locked into memory, allocates nothing after its start, and does nothing but wait.

use std::error::Error;
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::shared::Shared;
use super::signals::{send, Signals};

/// A server that dies sooner than this after its start is given time before the next one.
const SHORT_LIFE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_secs(1);

/// Run `serve` in a process of its own, again whenever it dies while the device exists. Returns when it ended well, or
/// failed before there was a device.
pub(super) fn keep(
    shared: Shared,
    serve: impl Fn() -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let signals = Signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD, libc::SIGUSR1])?;
    loop {
        let started = Instant::now();
        // SAFETY: this process has one thread, so the child may go on like any program.
        let server = match unsafe { libc::fork() } {
            ..0 => return Err(io::Error::last_os_error().into()),
            0 => {
                let served = serve();
                if let Err(error) = &served {
                    log::error!("{error}");
                }
                std::process::exit(served.is_err().into());
            }
            server => server,
        };
        if shared.state.end_wanted.load(Ordering::Acquire) {
            // The process that was told so died before it could do it.
            send(server, libc::SIGTERM);
        }
        let status = wait(server, &signals, shared);
        if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0 {
            return Ok(());
        }
        let how = if libc::WIFSIGNALED(status) {
            format!("was killed by signal {}", libc::WTERMSIG(status))
        } else {
            format!("failed with status {}", libc::WEXITSTATUS(status))
        };
        if shared.state.device.load(Ordering::Acquire) == 0 {
            return Err(format!("the serving process {how} before the device was ready").into());
        }
        shared.count(|c| &c.restarts, 1);
        log::error!("the serving process {how}; starting another one");
        if started.elapsed() < SHORT_LIFE {
            std::thread::sleep(PAUSE);
        }
    }
}

/// Wait for the server's end and tell its exit status; pass requests to end on to it.
fn wait(server: libc::pid_t, signals: &Signals, shared: Shared) -> libc::c_int {
    loop {
        match signals.wait() {
            libc::SIGCHLD => {
                let mut status = 0;
                // SAFETY: `status` outlives the call.
                if unsafe { libc::waitpid(server, &raw mut status, libc::WNOHANG) } == server {
                    return status;
                }
            }
            libc::SIGTERM | libc::SIGINT => {
                shared.state.end_wanted.store(true, Ordering::Release);
                send(server, libc::SIGTERM);
            }
            _ => {}
        }
    }
}
