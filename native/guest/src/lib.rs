//! What runs in a guest and touches every page: the parts of the program `tmem-guest`.
//!
//! | module | holds |
//! |---|---|
//! | [`link`] | a connection to tmemd: endpoint, HELLO, frames, back-off |
//! | [`fs`] | `tmem-guest fs`: the FUSE pass-through whose page cache misses are answered from tmem |
//! | [`swap`] | `tmem-guest swap`: the block device the kernel swaps to |
//! | [`ping`] | `tmem-guest ping`: is the host there, what does it allow, how far is it |
//! | [`page`] | one page into and out of a frame |
//! | `memory` | this process's memory, and the machine's |
//! | [`log`] | one line to stderr for each event, without ever waiting for its reader |

pub mod fs;
pub mod link;
pub mod log;
mod memory;
pub mod page;
pub mod ping;
pub mod swap;
