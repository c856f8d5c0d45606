//! The keeper as a program of its own; `tmem_host.service.keeper` runs the same in Python.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// How long it stays with nothing to hold and nobody connected.
const LINGER: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: tmem-keeper SOCKET");
        return ExitCode::from(2);
    };
    match tmem_host::vhost_user::keeper::run(&path, LINGER) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tmem-keeper: {}: {error}", path.display());
            ExitCode::FAILURE
        }
    }
}
