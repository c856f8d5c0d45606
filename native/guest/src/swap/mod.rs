//! `tmem-guest swap`: the block device the kernel swaps to.
//!
//! Every page is absent, at the host, or in the swap file. Pages are put to the host first; what it refuses goes to
//! the swap file. `docs/swap.md` is the operator's view.
//!
//! | module | holds |
//! |---|---|
//! | [`table`] | where every page is, four bytes each |
//! | [`shared`] | the memory that holds table and counters and outlives the serving process |
//! | [`core`] | the state machine of a lane: what to do with a request, an answer, a lost connection |
//! | `lane` | a lane's thread: its io_uring, its connection, its front end |
//! | `ring`, `host`, `front` | what a lane is made of: ring and buffers, the host's end, ublk or NBD |
//! | `connector` | connects lanes, again and again |
//! | [`file`] | the swap file, made safe to write to without memory |
//! | [`protect`] | memory locking and the other protections |
//! | `control` | the local control socket |
//! | `service` | the serving process |
//! | `keeper` | its parent, which keeps the table and starts it again if it dies |
//! | `signals` | signals as something to wait for |

mod connector;
mod control;
pub mod core;
pub mod file;
mod front;
mod host;
mod keeper;
mod lane;
pub mod protect;
mod ring;
mod service;
pub mod shared;
mod signals;
pub mod table;

use std::error::Error;
use std::path::PathBuf;
use std::str::FromStr;

use tmem_wire::PAGE_BYTES;

use crate::link::{Address, Endpoint};
use front::{nbd, ublk};
use service::Service;
use shared::Shared;

/// Most bytes for one packet on vsock. The driver wants memory for it in one piece, with its own data around it, and a lane
/// that waits for memory waits for itself. Single pages are to be had from the kernel's reserve when larger pieces are
/// not, even while it asks for more free memory than usual (`watermark_boost`).
const PACKET_BYTES: usize = 3584;

/// How the device reaches the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// ublk where the kernel has it, NBD otherwise.
    Auto,
    /// A ublk device.
    Ublk,
    /// An NBD device of this guest's kernel.
    Nbd,
    /// No device: an NBD server on a unix socket.
    Serve(PathBuf),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Device, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Device::Auto),
            None if text == "ublk" => Ok(Device::Ublk),
            None if text == "nbd" => Ok(Device::Nbd),
            Some(("serve", path)) if path.starts_with('/') => Ok(Device::Serve(path.into())),
            _ => Err(format!("{text:?} is none of auto, ublk, nbd, serve:/path")),
        }
    }
}

/// Read a size in bytes with an optional suffix K, M, G or T (powers of 1024) as a number of pages.
fn pages(text: &str) -> Result<u32, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        suffix => return Err(format!("unknown suffix {suffix:?}; use K, M, G or T")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is no size, like 512M"))?;
    let bytes = number.checked_mul(1 << shift).ok_or("too large")?;
    let pages = bytes / PAGE_BYTES as u64;
    u32::try_from(pages).ok().filter(|pages| *pages >= 16).ok_or_else(|| "between 64K and 16T".to_owned())
}

/// Options of `tmem-guest swap`.
#[allow(clippy::struct_excessive_bools)] // switches are switches
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The swap file (or block device) for pages the host refuses; made if it does not exist.
    #[arg(long)]
    file: PathBuf,
    /// Size of the device, with suffix K, M, G or T.
    #[arg(long = "size", value_parser = pages)]
    pages: u32,
    /// Where tmemd listens: vsock:CID:PORT or unix:/path.
    #[arg(long, default_value = "vsock:2:29805")]
    endpoint: Endpoint,
    /// auto, ublk, nbd, or serve:/path for an NBD server on a unix socket.
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Queues of the device, each with a thread and a connection of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Requests a queue holds at a time; each has a buffer of 64 KiB.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    depth: u16,
    /// Where the agent asks for status and reclaim.
    #[arg(long, default_value = "/run/tmem/swap.sock")]
    control: PathBuf,
    /// Name of the pool at the host; one for each device.
    #[arg(long, default_value = "swap0")]
    pool_name: String,
    /// Refuse to run without memory locking, I/O flusher and OOM exemption, instead of warning.
    #[arg(long)]
    require_protection: bool,
    /// Compress pages before they cross the link.
    #[arg(long)]
    compress: bool,
    /// Take pages from the host as it keeps them, compressed.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    accept_lz4: bool,
    /// Most pages a second that reclaim moves to the swap file.
    #[arg(long, default_value_t = 4096)]
    reclaim_rate: u32,
    /// Milliseconds after which a page that the host has not answered for is written to the swap file instead.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(5..))]
    hedge_ms: u32,
    /// Milliseconds after which a host that does not answer at all counts as gone, and is connected to anew.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(50..))]
    answer_timeout_ms: u32,
    /// Do not bound what is under way on vsock; for hosts with /dev/vhost-vsock or tmemd's own device.
    #[arg(long)]
    unsplit: bool,
}

impl Args {
    fn endpoint(&self) -> Endpoint {
        let endpoint = self.endpoint.clone();
        let vsock = matches!(endpoint.address, Address::Vsock { .. });
        let endpoint = if self.unsplit { endpoint.unsplit() } else { endpoint };
        Endpoint { write_bytes: if vsock { Some(PACKET_BYTES) } else { endpoint.write_bytes }, ..endpoint }
    }
}

/// Say that the device can be used.
fn ready(device: &str) {
    log::info!("{device} is ready");
    println!("{device}");
}

/// Serve the device until it is taken away.
pub fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    if !matches!(args.device, Device::Serve(_)) {
        crate::log::spare_files();
    }
    protect::protect(args.require_protection)?;
    let file = file::prepare(&args.file, args.pages)?;
    let shared = Shared::map(args.pages)?;
    // Locks are not inherited, so the serving process takes its protections again.
    let service = || Service::new(args, shared, &file, protect::protect(args.require_protection)?);
    let with_ublk = || service()?.serve_ublk(&mut ublk::device::Driver::open()?);
    let with_nbd = || service()?.serve_nbd(&mut nbd::device::Driver::open()?);
    match &args.device {
        Device::Serve(path) => service()?.serve_socket(path),
        Device::Ublk => keeper::keep(shared, with_ublk),
        Device::Nbd => keeper::keep(shared, with_nbd),
        Device::Auto => match ublk::device::Driver::open() {
            Ok(_) => keeper::keep(shared, with_ublk),
            Err(error) => {
                log::info!("no ublk ({error}), so NBD");
                keeper::keep(shared, with_nbd)
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(pages("512M"), Ok(131_072));
        assert_eq!(pages("65536"), Ok(16));
        for bad in ["", "M", "-1M", "1X", "4K", "99999999T", "17T"] {
            assert!(pages(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_packets_memory_is_a_single_page() {
        // Linux 6.12: `struct virtio_vsock_hdr` before the data, aligned, `struct skb_shared_info` behind it.
        const HEADER: usize = 44;
        const SHARED_INFO: usize = 320;
        const { assert!((HEADER + PACKET_BYTES).next_multiple_of(64) + SHARED_INFO <= PAGE_BYTES) };
    }

    #[test]
    fn devices_are_read() {
        assert_eq!("serve:/a".parse(), Ok(Device::Serve("/a".into())));
        assert!("serve:a".parse::<Device>().is_err() && "loop".parse::<Device>().is_err());
    }
}
