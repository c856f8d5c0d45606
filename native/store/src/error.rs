//! Why an administrator's or a guest's request could not be done. A refused put is not among these: it is a status.

use std::path::PathBuf;

/// Why the store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The arena's file or memory could not be created, sized or mapped.
    #[error("cannot {what} the arena{}: {source}", at(.path.as_ref()))]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The file, if it is one.
        path: Option<PathBuf>,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Another process has the arena open.
    #[error("the arena{} is in use by another process; is a tmemd still running?", at(.path.as_ref()))]
    InUse {
        /// The file, if it is one.
        path: Option<PathBuf>,
    },
    /// The arena cannot be used. It has been moved out of the way, so that opening again starts an empty one.
    #[error(
        "the arena{} cannot be used: {reason}{}; start again to begin with an empty arena",
        at(.path.as_ref()), kept(.kept_aside.as_ref())
    )]
    Unusable {
        /// The file, if it is one.
        path: Option<PathBuf>,
        /// What is wrong with it.
        reason: String,
        /// Where it is kept now.
        kept_aside: Option<PathBuf>,
    },
    /// The configuration cannot be satisfied.
    #[error("{0}")]
    Config(String),
}

fn at(path: Option<&PathBuf>) -> String {
    path.map(|path| format!(" {}", path.display())).unwrap_or_default()
}

fn kept(path: Option<&PathBuf>) -> String {
    path.map(|path| format!(". It is kept as {}", path.display())).unwrap_or_default()
}

/// Why an administrator's request was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    /// No VM has this id.
    #[error("no such VM")]
    NoSuchVm,
    /// The directory has no room for another VM.
    #[error("the store knows {0} VMs already, the most it can")]
    TooManyVms(usize),
    /// The name is empty or too long.
    #[error("a VM's name has 1 to {max} bytes, not {got}")]
    Name {
        /// Longest name, bytes.
        max: usize,
        /// Bytes of the name given.
        got: usize,
    },
    /// The limits contradict each other.
    #[error("{0}")]
    Limits(String),
    /// The guaranteed minima do not fit into the arena.
    #[error("guaranteed minima and persistent pages need {needed} bytes, the arena has {available}")]
    Overcommitted {
        /// Sum of what is guaranteed or cannot be evicted.
        needed: u64,
        /// Bytes there are for it.
        available: u64,
    },
    /// The capacity cannot be that large with this arena.
    #[error("capacity of {wanted} bytes is over the {max} bytes this arena can grow to")]
    Capacity {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes there can be.
        max: u64,
    },
    /// The administrator's directory has no room for another grant.
    #[error("the store knows {0} grants already, the most it can")]
    TooManyGrants(usize),
}

/// Why a guest did not get its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// No VM or pool of that id, or not this VM's.
    #[error("no such pool")]
    NoSuchPool,
    /// A pool of that name exists with other properties.
    #[error("a pool of that name exists with other properties")]
    Conflict,
    /// The VM has as many pools as it may, or the store has.
    #[error("too many pools")]
    Limit,
    /// The shared pool was not granted to this VM.
    #[error("the shared pool has not been granted to this VM")]
    Denied,
    /// Shared pools are ephemeral.
    #[error("a shared pool cannot be persistent")]
    Unsupported,
}
