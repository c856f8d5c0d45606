//! Programs that `bench/transport.py`, `bench/fairness.py` and the tests of transports run, on the host and in guests.
//! Each prints one JSON object a line.
//!
//! | module | holds |
//! |---|---|
//! | `endpoint` | `unix:`, `hybrid:` and `vsock:` addresses |
//! | `server` | an engine with VMs, as tmemd has, and nothing around it |
//! | `client` | a tmem client: pages in, pages out, timed |
//! | `check` | what a transport must carry unharmed, for any of them |
//! | `pong` | the bare ping-pong that is the floor of every round trip |
//! | `keyvalue` | the same pages in Redis and memcached |
//! | `block` | 4 KiB reads of a block device |
//! | `flood` | a guest that misbehaves in every way it can |
//! | `report` | percentiles and JSON |

mod block;
mod check;
mod client;
mod endpoint;
mod flood;
mod keyvalue;
mod pong;
mod report;
mod server;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use endpoint::Endpoint;

/// Anything that ends a measurement.
type Failure = Box<dyn std::error::Error + Send + Sync>;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve VMs until standard input ends.
    Serve(server::Arguments),
    /// Run a keeper of vsock devices.
    Keeper {
        /// Its socket.
        path: PathBuf,
    },
    /// Time gets or puts.
    Load(client::Arguments),
    /// Check that a transport carries everything unharmed.
    Check(check::Arguments),
    /// Time batches against a store in this process.
    Store(client::StoreArguments),
    /// Answer pings.
    Pong {
        /// Where to listen.
        endpoint: Endpoint,
    },
    /// Send pings.
    Ping(pong::Arguments),
    /// Time reads and writes of pages in Redis or memcached.
    Keyvalue(keyvalue::Arguments),
    /// Time 4 KiB reads of a block device.
    Block(block::Arguments),
    /// Flood the server.
    Flood(flood::Arguments),
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Serve(arguments) => server::run(&arguments),
        Command::Keeper { path } => {
            Ok(tmem_host::vhost_user::keeper::run(&path, std::time::Duration::from_secs(5))?)
        }
        Command::Load(arguments) => client::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Store(arguments) => client::run_store(&arguments),
        Command::Pong { endpoint } => pong::serve(&endpoint),
        Command::Ping(arguments) => pong::run(&arguments),
        Command::Keyvalue(arguments) => keyvalue::run(&arguments),
        Command::Block(arguments) => block::run(&arguments),
        Command::Flood(arguments) => flood::run(&arguments),
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tmem-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
