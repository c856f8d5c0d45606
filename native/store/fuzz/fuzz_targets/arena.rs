//! Recovery of an arena with random damage: it is refused, or served without a crash and without a wrong page.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    tmem_store::fuzz::damaged_arena(data);
});
