//! Errors as Python exceptions with a kind, by which tmemd chooses what to tell the operator.

use pyo3::prelude::*;
use tmem_host::EngineError as Error;
use tmem_store::{AdminError, OpenError};

pyo3::create_exception!(
    tmem_native._native,
    EngineError,
    pyo3::exceptions::PyException,
    "The engine could not do what was asked. `args` are a message and its kind: conflict, in_use, io, invalid, \
     not_found, no_space, privilege, shutting_down or unusable."
);

/// An error of this kind.
pub(crate) fn raise(kind: &'static str, message: &impl ToString) -> PyErr {
    EngineError::new_err((message.to_string(), kind))
}

fn io_kind(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => "privilege",
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::OutOfMemory => "no_space",
        _ => "io",
    }
}

#[allow(clippy::needless_pass_by_value)] // as map_err gives it
pub(crate) fn engine_error(error: Error) -> PyErr {
    let kind = match &error {
        Error::NoSuchVm(_) => "not_found",
        Error::VmExists(_) | Error::CidTaken { .. } | Error::SocketTaken { .. } => "conflict",
        Error::SocketInUse(_) => "in_use",
        Error::Io { source, .. } => io_kind(source),
        Error::Store(error) => return admin_error(error.clone()),
        Error::Draining => "shutting_down",
    };
    raise(kind, &error)
}

#[allow(clippy::needless_pass_by_value)] // as map_err gives it
pub(crate) fn admin_error(error: AdminError) -> PyErr {
    let kind = match error {
        AdminError::NoSuchVm => "not_found",
        _ => "invalid",
    };
    raise(kind, &error)
}

#[allow(clippy::needless_pass_by_value)] // as map_err gives it
pub(crate) fn open_error(error: OpenError) -> PyErr {
    let kind = match &error {
        OpenError::Io { source, .. } => io_kind(source),
        OpenError::InUse { .. } => "in_use",
        OpenError::Unusable { .. } => "unusable",
        OpenError::Config(_) => "invalid",
    };
    raise(kind, &error)
}
