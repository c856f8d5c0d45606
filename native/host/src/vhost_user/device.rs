//! The device itself: guest memory, its three rings, and the streams between them. No sockets and no waiting, so that
//! tests and fuzzers can drive it with memory of their own.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::chain::{Direction, FromGuest, Segments, ToGuest};
use super::counters::{add, Counters};
use super::front::{FrontState, EVENTS, FROM_GUEST, RINGS, TO_GUEST};
use super::packet::Op;
use super::ring::{signal, Layout, Ring, RingError};
use super::streams::{Opener, Streams};
use crate::scheduling;

/// Packets taken or sent before other things get their turn.
const BUDGET: usize = 256;
/// How long the guest may wait for the memory of packets it sent.
const HOLD: Duration = Duration::from_millis(1);
/// How long after packets moved the driver's wishes are looked at once more (see [`Ring::wants_late_call`]).
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// The event that tells a driver to reset all its streams.
const TRANSPORT_RESET: u32 = 0;

/// A ring and how it fares.
enum Slot {
    Stopped,
    Running(Ring, Layout),
    /// It made no sense; it rests until the driver stops it.
    Broken,
}

/// One VM's vsock device.
pub struct Device {
    vm: String,
    /// What the front end has told.
    pub front: FrontState,
    memory: Option<Arc<GuestMemoryMmap>>,
    rings: [Slot; RINGS],
    /// Where a ring stood when it last stopped: a VM that only paused goes on there, with all its streams.
    stopped_at: [Option<(Layout, u16)>; RINGS],
    /// The streams.
    pub streams: Streams,
    segments: Segments,
    /// When chains the guest's ring holds back are to be released.
    held_until: Option<Instant>,
    /// When to look again whether the driver wants to be interrupted.
    look_again: Option<Instant>,
    counters: Arc<Counters>,
}

impl Device {
    /// A device no driver has touched yet.
    pub fn new(vm: &str, streams: Streams, counters: Arc<Counters>) -> Device {
        Device {
            vm: vm.to_owned(),
            front: FrontState::default(),
            memory: None,
            rings: [Slot::Stopped, Slot::Stopped, Slot::Stopped],
            stopped_at: [None; RINGS],
            streams,
            segments: Segments::default(),
            held_until: None,
            look_again: None,
            counters,
        }
    }

    /// Write the avail indices of running rings into the front end's state, before it is asked for them. Everything
    /// before them is handed back.
    pub fn sync_bases(&mut self) {
        self.release();
        for (slot, vring) in self.rings.iter().zip(&mut self.front.vrings) {
            if let Slot::Running(ring, _) = slot {
                vring.base = ring.base();
            }
        }
    }

    /// Map guest memory anew. Rings are stopped; [`Device::update_rings`] starts them again.
    ///
    /// # Errors
    /// A region's file is shorter than the region, or the host is short of address space.
    pub fn map_memory(&mut self) -> io::Result<()> {
        self.stop_rings();
        self.memory = None;
        if self.front.regions.is_empty() {
            return Ok(());
        }
        let mut regions = Vec::with_capacity(self.front.regions.len());
        for region in &self.front.regions {
            let file = File::from(region.file.try_clone()?);
            let mapped = MmapRegion::from_file(FileOffset::new(file, region.offset), region.size as usize)
                .map_err(io::Error::other)?;
            let mapped = GuestRegionMmap::new(mapped, GuestAddress(region.guest_address))
                .ok_or_else(|| io::Error::other("a region ends beyond the address space"))?;
            regions.push(mapped);
        }
        // The front end need not tell them in order.
        regions.sort_by_key(vm_memory::GuestMemoryRegion::start_addr);
        self.memory = Some(Arc::new(GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?));
        Ok(())
    }

    /// Use memory that is mapped already; for tests and fuzzing.
    pub fn set_memory(&mut self, memory: GuestMemoryMmap) {
        self.stop_rings();
        self.memory = Some(Arc::new(memory));
    }

    fn stop_rings(&mut self) {
        self.look_again = None;
        for index in 0..RINGS {
            self.stop(index);
        }
    }

    /// Hand back the packets of the guest that were held.
    fn release(&mut self) {
        self.held_until = None;
        let Some(memory) = self.memory.clone() else { return };
        let Slot::Running(ring, _) = &mut self.rings[FROM_GUEST] else { return };
        if !ring.is_holding() {
            return;
        }
        match ring.release(&memory) {
            Ok(()) => self.call(FROM_GUEST),
            Err(error) => self.give_up(FROM_GUEST, &error),
        }
    }

    /// When [`Device::serve`] is to be called even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        [self.held_until, self.look_again].into_iter().flatten().min()
    }

    fn stop(&mut self, index: usize) {
        if index == FROM_GUEST {
            self.release();
        }
        if let Slot::Running(ring, layout) = &self.rings[index] {
            self.front.vrings[index].base = ring.base();
            self.stopped_at[index] = Some((*layout, ring.base()));
        }
        self.rings[index] = Slot::Stopped;
    }

    /// Start and stop rings as the front end wants them. A driver that starts anew, instead of going on where it was
    /// stopped, has lost its streams.
    pub fn update_rings(&mut self) {
        for index in 0..RINGS {
            let wanted = self.front.layout(index);
            match (&self.rings[index], wanted) {
                (Slot::Running(_, layout), Some(wanted)) if *layout == wanted => continue,
                (Slot::Broken, Some(_)) => continue,
                _ => self.stop(index),
            }
            let (Some(wanted), Some(memory)) = (wanted, self.memory.clone()) else { continue };
            let base = self.front.vrings[index].base;
            if index != EVENTS && self.stopped_at[index].is_some_and(|last| last != (wanted, base)) {
                self.streams.clear();
            }
            self.stopped_at[index] = None;
            match Ring::start(&memory, &wanted, base) {
                Ok(ring) => self.rings[index] = Slot::Running(ring, wanted),
                Err(error) => self.give_up(index, &error),
            }
        }
    }

    /// Go on with rings whose serving process died: where they stand is in guest memory.
    pub fn resume_rings(&mut self) {
        if let Some(memory) = self.memory.clone() {
            for index in 0..RINGS {
                if let Some(layout) = self.front.layout(index) {
                    match Ring::recovered_base(&memory, &layout) {
                        Ok(base) => self.front.vrings[index].base = base,
                        Err(error) => self.give_up(index, &error),
                    }
                }
            }
        }
        self.update_rings();
        self.announce_reset();
    }

    /// Tell the driver that all streams are gone, if the event ring is ours.
    fn announce_reset(&mut self) {
        let Some(memory) = self.memory.clone() else { return };
        let Slot::Running(ring, _) = &mut self.rings[EVENTS] else { return };
        let outcome = ring.pop(&memory).and_then(|chain| {
            let Some(mut chain) = chain else { return Ok(()) };
            let head = chain.head_index();
            let loaded = self.segments.load(&memory, &mut chain, Direction::ToGuest);
            let event = TRANSPORT_RESET.to_le_bytes();
            let written = match loaded {
                Ok(()) => self.segments.write(&memory, &event),
                Err(_) => 0,
            };
            ring.push(&memory, head, written as u32)
        });
        if let Err(error) = outcome {
            self.give_up(EVENTS, &error);
        }
        self.call(EVENTS);
    }

    /// The driver is gone: its streams, its rings.
    pub fn reset(&mut self) {
        self.streams.clear();
        self.stop_rings();
        self.stopped_at = [None; RINGS];
    }

    /// The front end is gone, and its memory with it.
    pub fn disconnect(&mut self) {
        self.reset();
        self.memory = None;
        self.front = FrontState::default();
    }

    fn give_up(&mut self, index: usize, error: &RingError) {
        add(&self.counters.broken_rings, 1);
        tracing::warn!(vm = %self.vm, ring = index, %error, "a ring is given up until the guest's driver resets it");
        self.rings[index] = Slot::Broken;
        self.streams.clear();
    }

    /// Move packets both ways, up to a budget. Returns whether anything moved.
    pub fn serve(&mut self, opener: &mut dyn Opener, now: Instant) -> bool {
        let Some(memory) = self.memory.clone() else { return false };
        if self.held_until.is_some_and(|until| until <= now) {
            self.release();
        }
        let received = self.serve_from_guest(&memory, opener, now);
        let sent = self.serve_to_guest(&memory, now);
        // Answers first: the guest's task waits for them, and for its sent packets nobody does.
        if sent > 0 {
            self.call(TO_GUEST);
        }
        if received > 0 {
            self.call(FROM_GUEST);
        }
        if received + sent > 0 {
            self.look_again = Some(now + LOOK_AGAIN);
        } else if self.look_again.is_some_and(|at| at <= now) {
            self.look_again = None;
            self.call_late(&memory);
        }
        received + sent > 0
    }

    /// Interrupt the guest where its wish for that came to light late.
    fn call_late(&mut self, memory: &GuestMemoryMmap) {
        for index in [TO_GUEST, FROM_GUEST] {
            let Slot::Running(ring, _) = &mut self.rings[index] else { continue };
            match ring.wants_late_call(memory) {
                Ok(true) => self.force_call(index),
                Ok(false) => {}
                Err(error) => self.give_up(index, &error),
            }
        }
    }

    fn serve_from_guest(&mut self, memory: &GuestMemoryMmap, opener: &mut dyn Opener, now: Instant) -> usize {
        let mut packets = 0;
        let outcome = loop {
            let Slot::Running(ring, _) = &mut self.rings[FROM_GUEST] else { return packets };
            if packets == BUDGET || !self.streams.has_room() {
                break Ok(());
            }
            let mut chain = match ring.pop(memory) {
                Ok(Some(chain)) => chain,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            packets += 1;
            let mut hold = false;
            let head = chain.head_index();
            let parsed = self
                .segments
                .load(memory, &mut chain, Direction::FromGuest)
                .and_then(|()| FromGuest::parse(memory, &self.segments));
            match parsed {
                Ok(mut packet) => {
                    let header = packet.header;
                    // Should this process die, its successor takes what is held again. These of an ended stream do no harm.
                    hold = matches!(header.operation(), Some(Op::Data | Op::CreditUpdate));
                    self.streams.receive(&header, &mut packet, opener, now);
                }
                Err(error) => {
                    add(&self.counters.bad_chains, 1);
                    tracing::debug!(vm = %self.vm, %error, "a chain from the guest is dropped");
                }
            }
            let done = if hold { ring.hold(memory, head) } else { ring.push(memory, head, 0) };
            if let Err(error) = done {
                break Err(error);
            }
            scheduling::give_way();
            if !ring.is_holding() {
                self.held_until = None;
            } else if self.held_until.is_none() {
                self.held_until = Some(now + HOLD);
            }
        };
        if let Err(error) = outcome {
            self.give_up(FROM_GUEST, &error);
        }
        packets
    }

    fn serve_to_guest(&mut self, memory: &GuestMemoryMmap, now: Instant) -> usize {
        let mut packets = 0;
        let outcome = loop {
            let Slot::Running(ring, _) = &mut self.rings[TO_GUEST] else { return packets };
            if packets == BUDGET || !self.streams.has_mail() {
                break Ok(());
            }
            let mut chain = match ring.pop(memory) {
                Ok(Some(chain)) => chain,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            let head = chain.head_index();
            let room = self
                .segments
                .load(memory, &mut chain, Direction::ToGuest)
                .and_then(|()| ToGuest::new(memory, &self.segments));
            let written = match room {
                Ok(mut room) => {
                    let Some(header) = self.streams.send(&mut room, now) else {
                        ring.unpop();
                        break Ok(());
                    };
                    room.finish(&header)
                }
                Err(error) => {
                    add(&self.counters.bad_chains, 1);
                    tracing::debug!(vm = %self.vm, %error, "a buffer of the guest is dropped");
                    0
                }
            };
            packets += 1;
            if let Err(error) = ring.push(memory, head, written) {
                break Err(error);
            }
            scheduling::give_way();
        };
        if let Err(error) = outcome {
            self.give_up(TO_GUEST, &error);
        }
        packets
    }

    /// Interrupt the guest, if it wants to be.
    fn call(&mut self, index: usize) {
        let Some(memory) = self.memory.clone() else { return };
        let Slot::Running(ring, _) = &mut self.rings[index] else { return };
        match ring.wants_call(&memory) {
            Ok(true) => self.force_call(index),
            Ok(false) => {}
            Err(error) => self.give_up(index, &error),
        }
    }

    /// Interrupt the guest in any case: after a change of the descriptor an interrupt may have been lost.
    pub fn force_call(&self, index: usize) {
        if let Some(call) = &self.front.vrings[index].call {
            add(&self.counters.calls, 1);
            signal(call);
        }
    }

    /// Whether the guest has put something where it is looked for.
    pub fn has_work(&self) -> bool {
        let Some(memory) = &self.memory else { return false };
        let more = |index: usize| match &self.rings[index] {
            Slot::Running(ring, _) => ring.has_more(memory).unwrap_or(true),
            _ => false,
        };
        (self.streams.has_room() && more(FROM_GUEST)) || (self.streams.has_mail() && more(TO_GUEST))
    }

    /// Ask the guest to kick for what would be work; true if there is some already, so that waiting would be wrong.
    pub fn arm(&mut self) -> bool {
        let Some(memory) = self.memory.clone() else { return false };
        let mut work = false;
        for (index, wanted) in [(FROM_GUEST, self.streams.has_room()), (TO_GUEST, self.streams.has_mail())] {
            let Slot::Running(ring, _) = &mut self.rings[index] else { continue };
            let asked = if wanted { ring.want_kick(&memory) } else { ring.no_kick(&memory).map(|()| false) };
            match asked {
                Ok(more) => work |= more,
                Err(error) => self.give_up(index, &error),
            }
        }
        work
    }

    /// Ask the guest not to kick: it will be looked for what it does.
    pub fn disarm(&mut self) {
        let Some(memory) = self.memory.clone() else { return };
        for index in [FROM_GUEST, TO_GUEST] {
            if let Slot::Running(ring, _) = &mut self.rings[index] {
                if let Err(error) = ring.no_kick(&memory) {
                    self.give_up(index, &error);
                }
            }
        }
    }

    /// Descriptors the guest kicks, by ring.
    pub fn kicks(&self) -> impl Iterator<Item = (usize, &OwnedFd)> {
        self.front.vrings.iter().enumerate().filter_map(|(at, vring)| Some((at, vring.kick.as_ref()?)))
    }
}
