//! Rings, chains, packets and streams against an arbitrary guest.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use tmem_host::vhost_user::hostile::{run, Arena};

static ARENA: OnceLock<Arena> = OnceLock::new();

/// The device counts on a process that ignores SIGPIPE, as Python's and Rust's do and libFuzzer's does not: the other end
/// of a stream's socket may be gone.
fn arena() -> Arena {
    // SAFETY: no handler is installed, and no other thread runs yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    Arena::new().expect("memory")
}

fuzz_target!(|program: &[u8]| {
    run(ARENA.get_or_init(arena), program);
});
