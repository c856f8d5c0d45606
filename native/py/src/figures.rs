//! What the store and its VMs have counted, as dictionaries.

use std::sync::atomic::Ordering;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use tmem_host::{EngineError, Vm};
use tmem_store::{Counters, PoolStats, Recovery, Usage, VmStats};
use tmem_wire::PoolKind;

use crate::error::engine_error;

/// What opening found in the arena.
pub(crate) fn recovery<'py>(py: Python<'py>, found: &Recovery) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("formatted", found.formatted)?;
    dict.set_item("vms", found.vms)?;
    dict.set_item("pools", found.pools)?;
    dict.set_item("persistent_pages", found.persistent_pages)?;
    dict.set_item("ephemeral_pages", found.ephemeral_pages)?;
    dict.set_item("reclaimed_slots", found.reclaimed_slots)?;
    dict.set_item("elapsed_us", found.elapsed_us)?;
    Ok(dict)
}

/// The whole store.
pub(crate) fn usage<'py>(py: Python<'py>, usage: &Usage) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("capacity_bytes", usage.capacity_bytes)?;
    dict.set_item("backed_bytes", usage.backed_bytes)?;
    dict.set_item("used_bytes", usage.used_bytes)?;
    dict.set_item("payload_bytes", usage.payload_bytes)?;
    dict.set_item("metadata_bytes", usage.metadata_bytes)?;
    dict.set_item("pages", usage.pages)?;
    dict.set_item("raw_bytes", usage.raw_bytes)?;
    dict.set_item("same_filled_pages", usage.same_filled_pages)?;
    dict.set_item("raw_pages", usage.raw_pages)?;
    dict.set_item("pages_evicted", usage.pages_evicted)?;
    dict.set_item("pages_moved", usage.pages_moved)?;
    dict.set_item("pages_lost", usage.pages_lost)?;
    Ok(dict)
}

/// A VM, as the store knows it.
pub(crate) fn vm_stats<'py>(py: Python<'py>, stats: &VmStats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("frozen", stats.frozen)?;
    dict.set_item("stored_bytes", stats.used_bytes)?;
    dict.set_item("raw_bytes", stats.raw_bytes)?;
    dict.set_item("ephemeral_pages", stats.ephemeral_pages)?;
    dict.set_item("persistent_pages", stats.persistent_pages)?;
    dict.set_item("persistent_bytes", stats.persistent_bytes)?;
    let counters = Counters {
        puts_accepted: stats.puts_accepted,
        puts_refused: stats.puts_refused,
        gets_hit: stats.gets_hit,
        gets_missed: stats.gets_missed,
        pages_flushed: stats.pages_flushed,
        pages_evicted: stats.pages_evicted,
        pages_lost: stats.pages_lost,
    };
    set_counters(&dict, &counters)?;
    Ok(dict)
}

fn set_counters(dict: &Bound<'_, PyDict>, counters: &Counters) -> PyResult<()> {
    dict.set_item("puts_accepted", counters.puts_accepted)?;
    dict.set_item("puts_refused", counters.puts_refused)?;
    dict.set_item("gets_hit", counters.gets_hit)?;
    dict.set_item("gets_missed", counters.gets_missed)?;
    dict.set_item("pages_flushed", counters.pages_flushed)?;
    dict.set_item("pages_evicted", counters.pages_evicted)
}

/// A VM, with its limits, its connections and what its guest reported.
pub(crate) fn vm<'py>(py: Python<'py>, engine: &tmem_host::Engine, vm: &Vm) -> PyResult<Bound<'py, PyDict>> {
    let stats =
        engine.store().vm_stats(vm.id).ok_or_else(|| engine_error(EngineError::NoSuchVm(vm.name.clone())))?;
    let dict = vm_stats(py, &stats)?;
    dict.set_item("name", &vm.name)?;
    dict.set_item("quota_bytes", stats.limits.quota_bytes)?;
    dict.set_item("min_bytes", stats.limits.min_bytes)?;
    dict.set_item("weight", stats.limits.weight)?;
    let counters = &vm.counters;
    dict.set_item("connections", vm.connections())?;
    dict.set_item("connections_opened", counters.connections.load(Ordering::Relaxed))?;
    dict.set_item("connections_refused", counters.connections_refused.load(Ordering::Relaxed))?;
    dict.set_item("protocol_errors", counters.protocol_errors.load(Ordering::Relaxed))?;
    dict.set_item("timeouts", counters.timeouts.load(Ordering::Relaxed))?;
    dict.set_item("throttled", counters.throttled.load(Ordering::Relaxed))?;
    dict.set_item("gave_way", counters.gave_way.load(Ordering::Relaxed))?;
    let frames = PyDict::new(py);
    for (op, count) in counters.frames() {
        frames.set_item(format!("{op:?}"), count)?;
    }
    dict.set_item("frames", frames)?;
    dict.set_item("boot_id", vm.boot_id().map(hex))?;
    dict.set_item("report", vm.report().map(|(report, age)| guest_report(py, &report, age)).transpose()?)?;
    Ok(dict)
}

/// One of a VM's pools.
pub(crate) fn pool<'py>(py: Python<'py>, vm: &str, pool: &PoolStats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("id", pool.id.0)?;
    dict.set_item("vm", vm)?;
    dict.set_item("name", &pool.name)?;
    let persistent = pool.kind == PoolKind::Persistent;
    dict.set_item("kind", if persistent { "persistent" } else { "ephemeral" })?;
    dict.set_item("exclusive", pool.kind == PoolKind::Ephemeral { exclusive: true })?;
    dict.set_item("shared", pool.shared.map(hex))?;
    dict.set_item("pages", pool.pages)?;
    dict.set_item("stored_bytes", pool.bytes)?;
    set_counters(&dict, &pool.counters)?;
    Ok(dict)
}

fn guest_report<'py>(
    py: Python<'py>,
    report: &tmem_wire::Report,
    age: Duration,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("age_s", age.as_secs_f64())?;
    dict.set_item("psi_some_avg10", f64::from(report.psi_some_avg10.get()) / 100.0)?;
    dict.set_item("psi_full_avg10", f64::from(report.psi_full_avg10.get()) / 100.0)?;
    for (field, value) in [
        ("mem_total_bytes", report.mem_total_bytes),
        ("mem_available_bytes", report.mem_available_bytes),
        ("swap_total_bytes", report.swap_total_bytes),
        ("swap_free_bytes", report.swap_free_bytes),
        ("swap_in_pages", report.swap_in_pages),
        ("swap_out_pages", report.swap_out_pages),
        ("shim_host_pages", report.shim_host_pages),
        ("shim_file_pages", report.shim_file_pages),
        ("cache_hit_pages", report.cache_hit_pages),
        ("cache_miss_pages", report.cache_miss_pages),
    ] {
        dict.set_item(field, value.get())?;
    }
    Ok(dict)
}

fn hex(bytes: [u8; 16]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(32), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
