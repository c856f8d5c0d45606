//! The program `tmem-guest`: options and subcommands. What they do is in the library beside it.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tmem_guest::{fs, log, ping, swap};

/// Guest side of tmem: file cache and swap in host memory.
#[derive(Debug, Parser)]
#[command(name = "tmem-guest", version)]
struct Cli {
    /// Log more: once for details, twice for everything.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Mount a directory again, with its page cache extended into host memory.
    Fs(fs::Args),
    /// Serve a block device to swap to: pages go to host memory, refused ones to a swap file.
    Swap(swap::Args),
    /// Connect to tmemd, print what it allows and the time of a round trip.
    Ping(ping::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    log::init(match cli.verbose {
        0 => ::log::LevelFilter::Info,
        1 => ::log::LevelFilter::Debug,
        _ => ::log::LevelFilter::Trace,
    });
    let done = match cli.command {
        Command::Fs(args) => fs::run(args),
        Command::Swap(args) => swap::run(&args),
        Command::Ping(args) => ping::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ::log::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
