//! An engine with some VMs, as tmemd runs it.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tmem_host::listener::SocketOptions;
use tmem_host::{Engine, Limits, VmSpec};
use tmem_store::{Store, StoreConfig, VmLimits};

use crate::report::Report;
use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where each VM gets a directory with its sockets: `vsock.sock`, and `vhost.sock` with `--vhost-user`.
    #[arg(long)]
    dir: PathBuf,
    /// VMs; the first has the context id 10, the next 11, and so on.
    #[arg(long = "vm", required = true)]
    vms: Vec<String>,
    /// Serve vsock devices too.
    #[arg(long)]
    vhost_user: bool,
    /// A keeper for them.
    #[arg(long)]
    keeper: Option<PathBuf>,
    /// Listen on AF_VSOCK too, where this peer CID is the first VM; 1 is this machine, with `vsock_loopback`.
    #[arg(long)]
    vsock_cid: Option<u32>,
    /// Size of the store.
    #[arg(long, default_value_t = 512)]
    capacity_mib: u64,
    /// The arena; anonymous memory if not given.
    #[arg(long)]
    arena: Option<PathBuf>,
    /// Longest busy polling.
    #[arg(long, default_value_t = Limits::default().busy_poll.as_micros() as u64)]
    busy_poll_us: u64,
    /// Pages a second of each VM; 0 for no limit.
    #[arg(long, default_value_t = 0)]
    pages_per_s: u64,
}

/// Serve until standard input ends.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let capacity_bytes = arguments.capacity_mib << 20;
    let config = match &arguments.arena {
        Some(path) => StoreConfig::file(path, capacity_bytes),
        None => StoreConfig::memfd(capacity_bytes),
    };
    let (store, _) = Store::open(&config)?;
    let limits = Limits {
        busy_poll: Duration::from_micros(arguments.busy_poll_us),
        pages_per_s: arguments.pages_per_s,
        ..Limits::default()
    };
    let engine = Engine::new(Arc::new(store), limits, SocketOptions { mode: 0o600, gid: None })?;
    if let Some(keeper) = &arguments.keeper {
        engine.use_keeper(keeper.clone());
    }
    for (at, name) in (0..).zip(&arguments.vms) {
        let dir = arguments.dir.join(name);
        let spec = VmSpec {
            cid: arguments.vsock_cid.filter(|_| at == 0),
            hybrid_socket: Some(dir.join("vsock.sock")),
            vhost_user_socket: arguments.vhost_user.then(|| dir.join("vhost.sock")),
            guest_cid: arguments.vhost_user.then_some(10 + at),
        };
        let limits = VmLimits {
            quota_bytes: capacity_bytes,
            min_bytes: 0,
            weight: 100,
            persistent_max_bytes: capacity_bytes,
        };
        engine.add_vm(name, &spec, &limits)?;
    }
    if arguments.vsock_cid.is_some() {
        engine.listen_vsock(tmem_wire::PORT)?;
    }
    Report::default().text("what", "ready").number("pid", f64::from(std::process::id())).print();
    // Ends when whoever started this closes the pipe, or dies.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    engine.drain(Duration::from_secs(5));
    for name in &arguments.vms {
        if let Ok(counters) = engine.endpoint_counters(name) {
            let report = Report::default().text("what", "counters").text("vm", name);
            counters
                .into_iter()
                .fold(report, |report, (name, value)| report.number(name, value as f64))
                .print();
        }
    }
    Ok(())
}
