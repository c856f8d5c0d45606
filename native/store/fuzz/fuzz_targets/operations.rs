//! Any sequence of operations, with hostile payloads.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    tmem_store::fuzz::operations(data);
});
