//! The codec of control connections, for programs and tests in Python.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use tmem_wire::{
    Features, Header, HelloAnswer, HelloRequest, Notice, Op, Report, Role, Stats, WireError, HEADER_BYTES,
};
use zerocopy::IntoBytes;

fn wire_error(error: WireError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

fn op(code: u8) -> PyResult<Op> {
    Op::from_code(code).ok_or_else(|| wire_error(WireError::UnknownOp(code)))
}

/// (op, flags, tag, pool, length, count, status)
type HeaderFields = (u8, u16, u32, u32, u32, u16, u16);

/// A frame header as it stands on the wire.
#[pyfunction]
#[pyo3(signature = (op, *, flags=0, tag=0, pool=0, length=0, count=0, status=0))]
#[allow(clippy::too_many_arguments)]
pub(crate) fn encode_header(
    py: Python<'_>,
    op: u8,
    flags: u16,
    tag: u32,
    pool: u32,
    length: u32,
    count: u16,
    status: u16,
) -> PyResult<Bound<'_, PyBytes>> {
    let header = Header { op: self::op(op)?, flags, tag, pool, length, count, status };
    Ok(PyBytes::new(py, &header.encode()))
}

/// Read a frame header; ValueError if it is not one.
#[pyfunction]
pub(crate) fn decode_header(bytes: [u8; HEADER_BYTES]) -> PyResult<HeaderFields> {
    let header = Header::decode(&bytes).map_err(wire_error)?;
    let Header { op, flags, tag, pool, length, count, status } = header;
    Ok((op as u8, flags, tag, pool, length, count, status))
}

/// The body of a HELLO request.
#[pyfunction]
#[pyo3(signature = (*, role, boot_id, client, features, max_frame_bytes, page_bytes=4096, version_min=1, version_max=1))]
#[allow(clippy::too_many_arguments)]
pub(crate) fn encode_hello_request<'py>(
    py: Python<'py>,
    role: u8,
    boot_id: [u8; 16],
    client: &str,
    features: u64,
    max_frame_bytes: u32,
    page_bytes: u32,
    version_min: u8,
    version_max: u8,
) -> PyResult<Bound<'py, PyBytes>> {
    let role = Role::from_code(role)
        .ok_or_else(|| wire_error(WireError::BadValue { field: "role", value: role.into() }))?;
    let features = Features(features);
    let all = HelloRequest::new(role, boot_id).named(client);
    let request = HelloRequest { version_min, version_max, page_bytes, features, max_frame_bytes, ..all };
    Ok(PyBytes::new(py, &request.encode()))
}

/// Read the body of a HELLO request.
#[pyfunction]
pub(crate) fn decode_hello_request<'py>(py: Python<'py>, body: &[u8]) -> PyResult<Bound<'py, PyDict>> {
    let request = HelloRequest::decode(body).map_err(wire_error)?;
    let dict = PyDict::new(py);
    dict.set_item("version_min", request.version_min)?;
    dict.set_item("version_max", request.version_max)?;
    dict.set_item("role", request.role as u8)?;
    dict.set_item("page_bytes", request.page_bytes)?;
    dict.set_item("features", request.features.0)?;
    dict.set_item("boot_id", PyBytes::new(py, &request.boot_id))?;
    dict.set_item("max_frame_bytes", request.max_frame_bytes)?;
    let client = String::from_utf8_lossy(&request.client);
    dict.set_item("client", client.trim_end_matches('\0'))?;
    Ok(dict)
}

/// The body of a HELLO answer.
#[pyfunction]
#[pyo3(signature = (*, features, max_frame_bytes, max_batch, max_in_flight, keep_alive_ms, quota_bytes,
    page_bytes=4096, version=1))]
#[allow(clippy::too_many_arguments)]
pub(crate) fn encode_hello_answer(
    py: Python<'_>,
    features: u64,
    max_frame_bytes: u32,
    max_batch: u32,
    max_in_flight: u32,
    keep_alive_ms: u32,
    quota_bytes: u64,
    page_bytes: u32,
    version: u8,
) -> Bound<'_, PyBytes> {
    let features = Features(features);
    let answer = HelloAnswer {
        version,
        page_bytes,
        features,
        max_frame_bytes,
        max_batch,
        max_in_flight,
        keep_alive_ms,
        quota_bytes,
    };
    PyBytes::new(py, &answer.encode())
}

/// Read the body of a HELLO answer.
#[pyfunction]
pub(crate) fn decode_hello_answer<'py>(py: Python<'py>, body: &[u8]) -> PyResult<Bound<'py, PyDict>> {
    let answer = HelloAnswer::decode(body).map_err(wire_error)?;
    let dict = PyDict::new(py);
    dict.set_item("version", answer.version)?;
    dict.set_item("page_bytes", answer.page_bytes)?;
    dict.set_item("features", answer.features.0)?;
    dict.set_item("max_frame_bytes", answer.max_frame_bytes)?;
    dict.set_item("max_batch", answer.max_batch)?;
    dict.set_item("max_in_flight", answer.max_in_flight)?;
    dict.set_item("keep_alive_ms", answer.keep_alive_ms)?;
    dict.set_item("quota_bytes", answer.quota_bytes)?;
    Ok(dict)
}

/// A notice as a whole frame: kind is "reclaim" (pages), "quota" (quota and used bytes), "frozen" (0 or 1) or
/// "shutdown".
#[pyfunction]
#[pyo3(signature = (kind, first=0, second=0))]
pub(crate) fn encode_notice<'py>(
    py: Python<'py>,
    kind: &str,
    first: u64,
    second: u64,
) -> PyResult<Bound<'py, PyBytes>> {
    let notice = match kind {
        "reclaim" => Notice::Reclaim { pages: first },
        "quota" => Notice::Quota { quota_bytes: first, used_bytes: second },
        "frozen" => Notice::Frozen(first != 0),
        "shutdown" => Notice::Shutdown,
        other => return Err(PyValueError::new_err(format!("no notice {other:?}"))),
    };
    let mut frame = Vec::new();
    notice.write_frame(&mut frame);
    Ok(PyBytes::new(py, &frame))
}

/// Read a notice's body: (kind, first, second), as for `encode_notice`.
#[pyfunction]
pub(crate) fn decode_notice(op: u8, body: &[u8]) -> PyResult<(&'static str, u64, u64)> {
    Ok(match Notice::decode(self::op(op)?, body).map_err(wire_error)? {
        Notice::Reclaim { pages } => ("reclaim", pages, 0),
        Notice::Quota { quota_bytes, used_bytes } => ("quota", quota_bytes, used_bytes),
        Notice::Frozen(frozen) => ("frozen", frozen.into(), 0),
        Notice::Shutdown => ("shutdown", 0, 0),
    })
}

/// The body of a REPORT. The two PSI figures are hundredths of a percent.
#[pyfunction]
#[pyo3(signature = (*, psi_some_avg10, psi_full_avg10, mem_total_bytes, mem_available_bytes, swap_total_bytes,
    swap_free_bytes, swap_in_pages, swap_out_pages, shim_host_pages, shim_file_pages, cache_hit_pages,
    cache_miss_pages))]
#[allow(clippy::too_many_arguments)]
pub(crate) fn encode_report(
    py: Python<'_>,
    psi_some_avg10: u32,
    psi_full_avg10: u32,
    mem_total_bytes: u64,
    mem_available_bytes: u64,
    swap_total_bytes: u64,
    swap_free_bytes: u64,
    swap_in_pages: u64,
    swap_out_pages: u64,
    shim_host_pages: u64,
    shim_file_pages: u64,
    cache_hit_pages: u64,
    cache_miss_pages: u64,
) -> Bound<'_, PyBytes> {
    let report = Report {
        psi_some_avg10: psi_some_avg10.into(),
        psi_full_avg10: psi_full_avg10.into(),
        mem_total_bytes: mem_total_bytes.into(),
        mem_available_bytes: mem_available_bytes.into(),
        swap_total_bytes: swap_total_bytes.into(),
        swap_free_bytes: swap_free_bytes.into(),
        swap_in_pages: swap_in_pages.into(),
        swap_out_pages: swap_out_pages.into(),
        shim_host_pages: shim_host_pages.into(),
        shim_file_pages: shim_file_pages.into(),
        cache_hit_pages: cache_hit_pages.into(),
        cache_miss_pages: cache_miss_pages.into(),
        reserved: 0.into(),
    };
    PyBytes::new(py, report.as_bytes())
}

/// Read the body of a STATS answer.
#[pyfunction]
pub(crate) fn decode_stats<'py>(py: Python<'py>, body: &[u8]) -> PyResult<Bound<'py, PyDict>> {
    let stats = Stats::decode(body).map_err(wire_error)?;
    let dict = PyDict::new(py);
    for (field, value) in [
        ("quota_bytes", stats.quota_bytes),
        ("used_bytes", stats.used_bytes),
        ("ephemeral_pages", stats.ephemeral_pages),
        ("persistent_pages", stats.persistent_pages),
        ("puts_accepted", stats.puts_accepted),
        ("puts_refused", stats.puts_refused),
        ("gets_hit", stats.gets_hit),
        ("gets_missed", stats.gets_missed),
        ("pages_flushed", stats.pages_flushed),
        ("pages_evicted", stats.pages_evicted),
        ("frozen", stats.frozen),
    ] {
        dict.set_item(field, value.get())?;
    }
    Ok(dict)
}
