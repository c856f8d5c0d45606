//! `tmem-guest fs`: the FUSE pass-through whose page cache misses are answered from tmem.
//!
//! ```text
//!  application ── page cache of the mount ──miss──► READ ─► tmem (one batch) ──miss──► lower directory (direct I/O)
//!                                                             ▲                              │
//!                                                             └──── put, in the background ◄─┘
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`device`], [`abi`] | the kernel's side: mount, INIT, requests, answers, notifications |
//! | [`worker`] | the threads that serve requests |
//! | [`tree`], [`attr`], [`dir`], [`file`], [`xattr`], [`ioctl`] | the operations, by what they are about |
//! | [`inode`], [`handle`], [`caller`] | files the kernel knows, open files, acting as the caller |
//! | [`stat`] | what the lower file system says about a file, and what tells it from all others |
//! | [`read`], [`buffer`] | a page cache miss, from request to background put |
//! | [`around`] | pages read beside the one that was asked for, stored into the page cache |
//! | [`content`], [`version`] | which version of a file is cached where, and when to believe it |
//! | [`cache`], [`put`], [`presence`] | pages in tmem: gets, background puts, what is worth asking for |
//! | [`victim`] | pages that the kernel evicts, where a BPF program can catch them |
//! | [`watch`] | changes that others make in the lower directory |
//! | [`lower`] | the directory that is shown: opening it, what its file system can do |
//! | [`status`], [`counters`] | what happened so far, for operators |
//!
//! docs/file-cache.md has the argument why no reader ever sees stale data.

// The kernel's numbers are signed in one place and unsigned in the next; none of them comes near the sign bit, or
// both sides mean the same bits.
#![allow(clippy::cast_possible_wrap)]

mod abi;
mod around;
mod attr;
mod buffer;
mod cache;
mod caller;
mod content;
mod counters;
mod device;
mod dir;
mod file;
mod handle;
mod inode;
mod ioctl;
mod lower;
mod presence;
mod put;
mod read;
mod serve;
mod stat;
mod status;
mod tree;
mod version;
mod victim;
mod watch;
mod worker;
mod xattr;

use std::path::PathBuf;
use std::time::Duration;

use crate::link::Endpoint;

pub use serve::{run, FsError};

/// Options of `tmem-guest fs`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The directory to show.
    #[arg(long)]
    lower: PathBuf,
    /// Where to show it; may be the same directory.
    #[arg(long)]
    mount: PathBuf,
    /// Where tmemd listens: vsock:CID:PORT or unix:/path. Files are served whether it is there or not.
    #[arg(long, default_value = "vsock:2:29805")]
    endpoint: Endpoint,
    /// Do without tmem: a mere pass-through.
    #[arg(long, conflicts_with = "endpoint")]
    no_tmem: bool,
    /// Name of the pool that holds this mount's pages [default: fs- and a hash of the lower directory].
    #[arg(long)]
    pool_name: Option<String>,
    /// Threads that serve requests.
    #[arg(long, default_value_t = 8)]
    threads: usize,
    /// How changes made in the lower directory behind the mount are met: be told of them by the kernel (watch; check
    /// where it cannot), ask about every name and attribute again (check), or trust that there are none (none).
    #[arg(long, value_enum, default_value_t = Changes::Watch)]
    changes: Changes,
    /// Where to tell counters, a unix socket [default: /run/tmem/fs-MOUNT.sock, escaped as systemd does].
    #[arg(long)]
    status_socket: Option<PathBuf>,
    /// How many milliseconds a reader waits for tmemd before it reads the lower directory.
    #[arg(long, default_value_t = 100)]
    get_timeout_ms: u32,
    /// When pages are put to the host: when they are read, or when the kernel evicts them, so that no page is both
    /// here and there (by a BPF program; if the kernel does not take it, when they are read).
    #[arg(long, value_enum, default_value_t = PutWhen::Read)]
    put: PutWhen,
    /// Compress pages in the guest, to save bytes on the way to the host.
    #[arg(long)]
    compress: bool,
    /// Cache files of any lower file system, also one whose change times cannot be relied on.
    #[arg(long)]
    trust_lower: bool,
    /// How many seconds to wait, when told to end, for those who still use the mount.
    #[arg(long, default_value_t = 5)]
    linger_s: u32,
}

/// See [`Args::changes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Changes {
    Watch,
    Check,
    None,
}

/// See [`Args::put`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum PutWhen {
    Read,
    Evicted,
}

impl Args {
    /// How long a reader waits for tmemd.
    fn get_timeout(&self) -> Duration {
        Duration::from_millis(u64::from(self.get_timeout_ms.max(1)))
    }
}
