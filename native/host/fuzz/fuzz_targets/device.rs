//! Rings, chains, packets and streams against an arbitrary guest.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use tmem_host::vhost_user::hostile::{run, Arena};

static ARENA: OnceLock<Arena> = OnceLock::new();

fuzz_target!(|program: &[u8]| {
    run(ARENA.get_or_init(|| Arena::new().expect("memory")), program);
});
