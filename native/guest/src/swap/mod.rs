//! `tmem-guest swap`: the block device the kernel swaps to.

use std::error::Error;

/// Options of `tmem-guest swap`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Serve the device until it is taken away.
pub fn run(_args: Args) -> Result<(), Box<dyn Error>> {
    Err("the swap shim is not part of this build".into())
}
