//! Ways the kernel's requests reach a lane.
//!
//! | module | holds |
//! |---|---|
//! | [`ublk`] | a queue of a ublk device |
//! | [`nbd`] | a connection of an NBD device, to the kernel or to any other NBD client |

pub(super) mod nbd;
pub(super) mod ublk;

use super::core::Request;
use super::ring::{Buffers, Ring, Token};

/// What a front end did with an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// Nothing for the core.
    Nothing,
    /// A request for the core stands in this slot.
    Request(usize, Request),
    /// The device is gone; nothing more will come.
    Over,
}

/// What a lane works with.
pub(super) struct Context<'a> {
    pub(super) ring: &'a mut Ring,
    pub(super) buffers: &'a mut Buffers,
    /// Pages on the device.
    pub(super) pages: u32,
}

/// One queue of a block device. Slots count from 0 to the queue's depth.
pub(super) trait Front {
    /// Begin to fetch requests.
    fn start(&mut self, context: &mut Context<'_>);
    /// One of the front end's operations completed. Called again with `None` until it has nothing more for the core.
    fn event(&mut self, context: &mut Context<'_>, completion: Option<(Token, i32)>) -> Event;
    /// The core is done with this slot.
    fn complete(&mut self, context: &mut Context<'_>, slot: usize, ok: bool);
}
