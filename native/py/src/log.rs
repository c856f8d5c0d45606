//! The engine's events, on standard error in the style of tmemd's own lines.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use tracing_subscriber::EnvFilter;

/// Write the engine's events to standard error, one a line, from `level` ("error", "warn", "info", "debug", "trace")
/// up. Only the first call of a process has an effect.
#[pyfunction]
pub(crate) fn log_to_stderr(level: &str) -> PyResult<()> {
    let filter = EnvFilter::try_new(format!("off,tmem_host={level},tmem_store={level}"))
        .map_err(|error| PyValueError::new_err(error.to_string()))?;
    // An error means that a subscriber is installed already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .try_init();
    Ok(())
}
