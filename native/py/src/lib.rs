//! `tmem_native._native`: what Python knows of the engine. Thin: types are converted, calls that may block let other
//! Python threads run, nothing is decided here. Page data passes through the `Store` class only, which is for tests.
//!
//! | module | holds |
//! |---|---|
//! | `engine` | `Engine`: what tmemd runs |
//! | `error` | errors as exceptions |
//! | `figures` | what the store and its VMs have counted, as dictionaries |
//! | `log` | the engine's events, on standard error |
//! | `store` | `Store`: a store without transports, for tests |
//! | `wire` | the codec of control connections |

mod engine;
mod error;
mod figures;
mod log;
mod store;
mod wire;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    #[pymodule_export]
    use crate::engine::{latency_bounds, run_keeper, Engine};
    #[pymodule_export]
    use crate::error::EngineError;
    #[pymodule_export]
    use crate::log::log_to_stderr;
    #[pymodule_export]
    use crate::store::Store;
    #[pymodule_export]
    use crate::wire::{
        decode_header, decode_hello_answer, decode_hello_request, decode_notice, decode_stats, encode_header,
        encode_hello_answer, encode_hello_request, encode_notice, encode_report,
    };
    #[pymodule_export]
    const PORT: u32 = tmem_wire::PORT;
    #[pymodule_export]
    const VERSION: u8 = tmem_wire::VERSION;
    #[pymodule_export]
    const PAGE_BYTES: usize = tmem_wire::PAGE_BYTES;
    #[pymodule_export]
    const MAX_BATCH: usize = tmem_wire::MAX_BATCH;
    #[pymodule_export]
    const MAX_BODY_BYTES: usize = tmem_wire::MAX_BODY_BYTES;
    #[pymodule_export]
    const HEADER_BYTES: usize = tmem_wire::HEADER_BYTES;
}
