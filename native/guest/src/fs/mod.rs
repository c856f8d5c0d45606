//! `tmem-guest fs`: the FUSE pass-through whose page cache misses are answered from tmem.

use std::error::Error;

/// Options of `tmem-guest fs`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Mount and serve until unmounted.
pub fn run(_args: Args) -> Result<(), Box<dyn Error>> {
    Err("the file cache is not part of this build".into())
}
