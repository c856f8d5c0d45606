//! One virtqueue: the ring in guest memory, its kick and call descriptors, and when to use them.

use std::num::Wrapping;
use std::os::fd::OwnedFd;
use std::sync::atomic::{fence, Ordering};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Largest ring accepted; QEMU's default for vsock is 128.
pub const MAX_RING: u16 = 1024;
/// Chains held back at most, and at most a quarter of the ring.
const HELD_MOST: u16 = 16;
/// Bytes of the avail ring before its entries, and of each; the driver's wish for an interrupt follows them.
const AVAIL_HEADER_BYTES: u64 = 4;
const AVAIL_ENTRY_BYTES: u64 = 2;
/// Avail-ring flag of a driver that negotiated no event index: do not interrupt.
const NO_INTERRUPT: u16 = 1;

/// The ring cannot be used any more: its indices or addresses make no sense. Only a reset by the driver mends that.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the ring is broken: {0}")]
pub struct RingError(pub String);

fn broken(error: impl std::fmt::Display) -> RingError {
    RingError(error.to_string())
}

/// A virtqueue whose addresses were checked against guest memory.
pub struct Ring {
    queue: Queue,
    /// Used entries added since the driver was last considered for an interrupt.
    added: bool,
    /// The used index when the driver was last interrupted.
    called_at: Wrapping<u16>,
    /// Chains that are done with but not handed back yet, oldest first.
    held: Vec<u16>,
    held_most: usize,
}

/// Where the front end says a ring lies (guest physical addresses) and how it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Entries.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Avail ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    /// Whether `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
}

impl Ring {
    /// Start at avail index `base`; the used index is the driver's memory's own, as rings are worked off in order.
    pub fn start(memory: &GuestMemoryMmap, layout: &Layout, base: u16) -> Result<Ring, RingError> {
        let mut queue = Queue::new(MAX_RING).map_err(broken)?;
        queue.try_set_size(layout.size).map_err(broken)?;
        queue.try_set_desc_table_address(GuestAddress(layout.descriptors)).map_err(broken)?;
        queue.try_set_avail_ring_address(GuestAddress(layout.avail)).map_err(broken)?;
        queue.try_set_used_ring_address(GuestAddress(layout.used)).map_err(broken)?;
        queue.set_event_idx(layout.event_idx);
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err(RingError("it lies outside guest memory".into()));
        }
        queue.set_next_avail(base);
        let used = queue.used_idx(memory, Ordering::Acquire).map_err(broken)?;
        queue.set_next_used(used.0);
        let held_most = HELD_MOST.min(layout.size / 4).max(1).into();
        let held = Vec::with_capacity(held_most);
        Ok(Ring { queue, added: false, called_at: used, held, held_most })
    }

    /// The avail index to resume from when the state of the process that served this ring is lost: all chains before
    /// the used index are done, and none after it.
    pub fn recovered_base(memory: &GuestMemoryMmap, layout: &Layout) -> Result<u16, RingError> {
        let address = layout.used.checked_add(2).ok_or_else(|| RingError("address overflow".into()))?;
        let index: u16 = memory.load(GuestAddress(address), Ordering::Acquire).map_err(broken)?;
        Ok(u16::from_le(index))
    }

    /// The next chain, if the driver has made one available.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, RingError> {
        let size = self.queue.size();
        let chain = self.queue.iter(memory).map_err(broken)?.next();
        match chain {
            Some(chain) if chain.head_index() >= size => {
                Err(RingError(format!("descriptor {} in a ring of {size}", chain.head_index())))
            }
            chain => Ok(chain),
        }
    }

    /// Put back the chain just popped.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Hand a chain back to the driver with `length` bytes written to it.
    pub fn push(&mut self, memory: &GuestMemoryMmap, head: u16, length: u32) -> Result<(), RingError> {
        self.release(memory)?;
        self.added = true;
        self.queue.add_used(memory, head, length).map_err(broken)
    }

    /// Hand a chain back some time later, together with others: each time costs the driver an interrupt and a look
    /// at the ring, for memory it seldom waits for. The caller sees to [`Ring::release`] before long.
    pub fn hold(&mut self, memory: &GuestMemoryMmap, head: u16) -> Result<(), RingError> {
        self.held.push(head);
        if self.held.len() >= self.held_most {
            self.release(memory)?;
        }
        Ok(())
    }

    /// Hand back what was held.
    pub fn release(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        for head in self.held.drain(..) {
            self.added = true;
            self.queue.add_used(memory, head, 0).map_err(broken)?;
        }
        Ok(())
    }

    /// Whether chains are held.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    /// Whether the driver has made a chain available.
    pub fn has_more(&self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        let avail = self.queue.avail_idx(memory, Ordering::Acquire).map_err(broken)?;
        Ok(avail != Wrapping(self.queue.next_avail()))
    }

    /// Whether the driver wants an interrupt for what was pushed since this was last asked.
    pub fn wants_call(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        if !std::mem::take(&mut self.added) {
            return Ok(false);
        }
        if !self.queue.event_idx_enabled() {
            // The library leaves this flag to us.
            fence(Ordering::SeqCst);
            let flags: u16 =
                memory.load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed).map_err(broken)?;
            return Ok(u16::from_le(flags) & NO_INTERRUPT == 0);
        }
        let wanted = self.queue.needs_notification(memory).map_err(broken)?;
        if wanted {
            self.called_at = Wrapping(self.queue.next_used());
        }
        Ok(wanted)
    }

    /// Whether the driver wants an interrupt for an entry that it was not interrupted for, because its wish came to light
    /// late. A driver says what it wants, then looks whether that is there already, with a barrier in between; a device
    /// does the reverse; so one of the two always sees the other. But QEMU before 8.1 leaves out the barriers of a guest
    /// whose only processor it emulates, and then the guest waits for ever.
    pub fn wants_late_call(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        if !self.queue.event_idx_enabled() {
            return Ok(false);
        }
        let used = Wrapping(self.queue.next_used());
        let address = self
            .queue
            .avail_ring()
            .checked_add(AVAIL_HEADER_BYTES + u64::from(self.queue.size()) * AVAIL_ENTRY_BYTES)
            .ok_or_else(|| RingError("address overflow".into()))?;
        let event: u16 = memory.load(GuestAddress(address), Ordering::Acquire).map_err(broken)?;
        let late = used - Wrapping(u16::from_le(event)) - Wrapping(1) < used - self.called_at;
        if late {
            self.called_at = used;
        }
        Ok(late)
    }

    /// Ask the driver to kick; true if something became available meanwhile, so that waiting would be wrong.
    pub fn want_kick(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        self.queue.enable_notification(memory).map_err(broken)
    }

    /// Tell the driver that kicks are not needed for now.
    pub fn no_kick(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        self.queue.disable_notification(memory).map_err(broken)
    }

    /// The avail index of the next chain to take.
    pub fn base(&self) -> u16 {
        self.queue.next_avail()
    }
}

/// Signal an eventfd. A full counter already is a pending signal, and a front end that closed its end is noticed on its
/// socket.
pub fn signal(eventfd: &OwnedFd) {
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

/// Take what an eventfd has pending.
pub fn clear(eventfd: &OwnedFd) {
    let _ = rustix::io::read(eventfd, &mut [0u8; 8]);
}
