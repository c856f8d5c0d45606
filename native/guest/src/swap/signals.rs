//! Signals as something to wait for: blocked everywhere, taken by one thread.

use std::io;
use std::mem::MaybeUninit;

/// A set of blocked signals.
pub(super) struct Signals(libc::sigset_t);

impl Signals {
    /// Block these signals in the calling thread, and in all threads and processes it starts from now on.
    pub(super) fn block(signals: &[libc::c_int]) -> io::Result<Signals> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set; the others get an initialised one.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            let mut set = set.assume_init();
            for &signal in signals {
                libc::sigaddset(&raw mut set, signal);
            }
            match libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) {
                0 => set,
                errno => return Err(io::Error::from_raw_os_error(errno)),
            }
        };
        Ok(Signals(set))
    }

    /// Wait for one of them.
    pub(super) fn wait(&self) -> libc::c_int {
        let mut signal = 0;
        // SAFETY: the set is initialised, and `signal` is written before the call returns 0.
        while unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } != 0 {}
        signal
    }
}

/// Send a signal to a process. One that is gone gets none.
pub(super) fn send(process: libc::pid_t, signal: libc::c_int) {
    // SAFETY: names no memory.
    unsafe { libc::kill(process, signal) };
}
