//! What travels beside the pages: notices to the guest, reports from it, statistics.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{exact, Header, Op, WireError};

/// Bytes of a notice's body.
pub const NOTICE_BYTES: usize = 16;

/// An unsolicited host-to-guest frame on a control connection; it is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// Move this many persistent pages to the guest's own swap file and flush them.
    Reclaim {
        /// How many.
        pages: u64,
    },
    /// The quota is now this.
    Quota {
        /// Quota in bytes of host memory.
        quota_bytes: u64,
        /// Bytes of host memory the VM uses.
        used_bytes: u64,
    },
    /// Puts are refused from now on (`true`), or taken again.
    Frozen(bool),
    /// The daemon drains and will close; reconnect when it is back.
    Shutdown,
}

impl Notice {
    /// Append the notice as a frame.
    pub fn write_frame(self, out: &mut Vec<u8>) {
        let (op, first, second) = match self {
            Notice::Reclaim { pages } => (Op::Reclaim, pages, 0),
            Notice::Quota { quota_bytes, used_bytes } => (Op::Quota, quota_bytes, used_bytes),
            Notice::Frozen(frozen) => (Op::Frozen, frozen.into(), 0),
            Notice::Shutdown => (Op::Shutdown, 0, 0),
        };
        let mut body = [0; NOTICE_BYTES];
        body[..8].copy_from_slice(&u64::to_le_bytes(first));
        body[8..].copy_from_slice(&u64::to_le_bytes(second));
        Header::request(op, 0).write_frame(&body, out);
    }

    /// Read a notice's body.
    pub fn decode(op: Op, body: &[u8]) -> Result<Notice, WireError> {
        exact("notice", body, NOTICE_BYTES)?;
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&body[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        match op {
            Op::Reclaim => Ok(Notice::Reclaim { pages: word(0) }),
            Op::Quota => Ok(Notice::Quota { quota_bytes: word(0), used_bytes: word(8) }),
            Op::Frozen => Ok(Notice::Frozen(word(0) != 0)),
            Op::Shutdown => Ok(Notice::Shutdown),
            other => Err(WireError::BadValue { field: "notice op", value: other as u64 }),
        }
    }
}

/// Bytes of a REPORT's body.
pub const REPORT_BYTES: usize = 96;

/// A guest's account of its own memory, sent about once a second. The host uses it as a hint: it is what a guest
/// says, not what the host measured.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Report {
    /// PSI memory "some" over 10 s, in hundredths of a percent.
    pub psi_some_avg10: U32,
    /// PSI memory "full" over 10 s, in hundredths of a percent.
    pub psi_full_avg10: U32,
    /// `MemTotal`, bytes.
    pub mem_total_bytes: U64,
    /// `MemAvailable`, bytes.
    pub mem_available_bytes: U64,
    /// Swap size, bytes.
    pub swap_total_bytes: U64,
    /// Swap not used, bytes.
    pub swap_free_bytes: U64,
    /// `pswpin` since boot, pages.
    pub swap_in_pages: U64,
    /// `pswpout` since boot, pages.
    pub swap_out_pages: U64,
    /// Pages the swap shim has at the host.
    pub shim_host_pages: U64,
    /// Pages the swap shim has in the swap file.
    pub shim_file_pages: U64,
    /// Pages the file cache read from tmem since it started.
    pub cache_hit_pages: U64,
    /// Pages the file cache had to read from the lower file system since it started.
    pub cache_miss_pages: U64,
    /// Not used, zero.
    pub reserved: U64,
}

impl Report {
    /// Read a REPORT's body.
    pub fn decode(body: &[u8]) -> Result<Report, WireError> {
        Report::read_from_bytes(body).map_err(|_| WireError::BadLength {
            op: "REPORT",
            expected: REPORT_BYTES,
            got: body.len(),
        })
    }
}

/// Bytes of a STATS answer's body.
pub const STATS_BYTES: usize = 88;

/// The host's counters for the asking VM, all pools together, since the VM was registered.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Stats {
    /// Quota, bytes of host memory.
    pub quota_bytes: U64,
    /// Host memory in use, bytes.
    pub used_bytes: U64,
    /// Pages stored in ephemeral pools.
    pub ephemeral_pages: U64,
    /// Pages stored in persistent pools.
    pub persistent_pages: U64,
    /// Puts accepted.
    pub puts_accepted: U64,
    /// Puts refused.
    pub puts_refused: U64,
    /// Gets that hit.
    pub gets_hit: U64,
    /// Gets that missed.
    pub gets_missed: U64,
    /// Pages flushed.
    pub pages_flushed: U64,
    /// Ephemeral pages evicted.
    pub pages_evicted: U64,
    /// Whether the VM is frozen (0 or 1).
    pub frozen: U64,
}

impl Stats {
    /// Read a STATS answer's body.
    pub fn decode(body: &[u8]) -> Result<Stats, WireError> {
        Stats::read_from_bytes(body).map_err(|_| WireError::BadLength {
            op: "STATS",
            expected: STATS_BYTES,
            got: body.len(),
        })
    }
}
