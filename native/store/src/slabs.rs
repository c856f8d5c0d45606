//! The allocator: slabs of one size class each, and the slots in them.
//!
//! A slab is *unbacked* (a hole), *spare* (backed, holding nothing) or *assigned* to a class. What is written in
//! `meta` is protected by the lock of the class the slab is assigned to.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, AtomicUsize};

use crate::sync::Mutex;

use crate::arena::Arena;
use crate::layout::{Classes, MAX_SLABS, MAX_SLOTS};
use crate::slot::{Slot, SlotRef};

/// Volatile account of an assigned slab, packed into a word.
#[derive(Debug, Clone, Copy)]
struct Meta {
    /// Slots given out.
    live: u16,
    /// First slot of the free list, or `NO_SLOT`.
    free: u16,
    /// Slots from here on were never given out.
    bump: u16,
    /// Being emptied: nothing is given out of it.
    draining: bool,
    /// On its class's list of slabs with room.
    listed: bool,
}

const NO_SLOT: u16 = u16::MAX;

impl Meta {
    const EMPTY: Meta = Meta { live: 0, free: NO_SLOT, bump: 0, draining: false, listed: false };

    fn unpack(word: u64) -> Meta {
        Meta {
            live: word as u16,
            free: (word >> 16) as u16,
            bump: (word >> 32) as u16,
            draining: word >> 48 & 1 == 1,
            listed: word >> 49 & 1 == 1,
        }
    }

    fn pack(self) -> u64 {
        u64::from(self.live)
            | u64::from(self.free) << 16
            | u64::from(self.bump) << 32
            | u64::from(self.draining) << 48
            | u64::from(self.listed) << 49
    }
}

#[derive(Debug, Default)]
struct Class {
    /// Slabs with room, the next to give out of last.
    with_room: Vec<u32>,
}

#[derive(Debug)]
struct Backing {
    /// Backed slabs that are not assigned. Their content is old.
    spare: Vec<u32>,
    /// Holes below `next`.
    holes: Vec<u32>,
    /// Slabs from here on were never backed.
    next: u32,
    /// Slabs that are backed, assigned or spare.
    backed: u32,
    /// Most slabs that may be backed.
    capacity: u32,
}

/// Zeroed memory of which only what is touched is taken from the host.
fn zeroed(words: usize) -> Box<[AtomicU64]> {
    let words = vec![0_u64; words].into_boxed_slice();
    // SAFETY: `AtomicU64` has the size, alignment and bit validity of `u64`.
    unsafe { Box::from_raw(Box::into_raw(words) as *mut [AtomicU64]) }
}

/// Gives out and takes back slots.
pub(crate) struct Slabs {
    arena: Arena,
    classes: Classes,
    slab_bytes: u32,
    meta: Box<[AtomicU64]>,
    lists: Vec<Mutex<Class>>,
    /// Slots of a class that are assigned but not given out; for deciding where compaction pays.
    free_slots: Vec<AtomicUsize>,
    backing: Mutex<Backing>,
}

impl Slabs {
    pub(crate) fn new(arena: Arena, slab_bytes: u32, capacity: u32) -> Slabs {
        let classes = Classes::new(slab_bytes);
        Slabs {
            arena,
            slab_bytes,
            meta: zeroed(MAX_SLABS as usize),
            lists: (0..classes.len()).map(|_| Mutex::default()).collect(),
            free_slots: (0..classes.len()).map(|_| AtomicUsize::new(0)).collect(),
            backing: Mutex::new(Backing { spare: vec![], holes: vec![], next: 0, backed: 0, capacity }),
            classes,
        }
    }

    pub(crate) fn arena(&self) -> &Arena {
        &self.arena
    }

    pub(crate) fn classes(&self) -> &Classes {
        &self.classes
    }

    pub(crate) fn slab_bytes(&self) -> u32 {
        self.slab_bytes
    }

    /// Slabs that are backed, and slabs that may be.
    pub(crate) fn backed_and_capacity(&self) -> (u32, u32) {
        let backing = self.backing.lock();
        (backing.backed, backing.capacity)
    }

    /// Slabs that could be assigned at once.
    pub(crate) fn available(&self) -> u32 {
        let backing = self.backing.lock();
        backing.spare.len() as u32 + backing.capacity.saturating_sub(backing.backed)
    }

    pub(crate) fn set_capacity(&self, slabs: u32) {
        self.backing.lock().capacity = slabs;
    }

    /// The slot a reference names. The slab must be assigned.
    pub(crate) fn slot(&self, at: SlotRef) -> Slot<'_> {
        let class = self.arena.slab_class(at.slab()).load(Acquire).saturating_sub(1);
        Slot::new(&self.arena, at.slab(), at.slot(), self.classes.slot_bytes(class))
    }

    fn load(&self, slab: u32) -> Meta {
        Meta::unpack(self.meta[slab as usize].load(Relaxed))
    }

    fn store(&self, slab: u32, meta: Meta) {
        self.meta[slab as usize].store(meta.pack(), Relaxed);
    }

    /// A slot out of a slab the class has. Its state word reads invalid.
    pub(crate) fn allocate(&self, class: u8) -> Option<SlotRef> {
        let mut list = self.lists[usize::from(class)].lock();
        self.allocate_locked(class, &mut list)
    }

    fn allocate_locked(&self, class: u8, list: &mut Class) -> Option<SlotRef> {
        let slab = *list.with_room.last()?;
        let mut meta = self.load(slab);
        let number = if meta.free == NO_SLOT {
            meta.bump += 1;
            meta.bump - 1
        } else {
            let slot = Slot::new(&self.arena, slab, meta.free.into(), self.classes.slot_bytes(class));
            std::mem::replace(&mut meta.free, slot.next().0 as u16)
        };
        meta.live += 1;
        if u32::from(meta.live) == self.classes.slots(class) {
            list.with_room.pop();
            meta.listed = false;
        }
        self.store(slab, meta);
        self.free_slots[usize::from(class)].fetch_sub(1, Relaxed);
        Some(SlotRef::new(slab, number.into()))
    }

    /// Assign a spare or new slab to the class and give out its first slot; `None` when the capacity is used up or
    /// the host has no memory.
    pub(crate) fn assign(&self, class: u8) -> Option<SlotRef> {
        let slab = {
            let mut backing = self.backing.lock();
            if let Some(slab) = backing.spare.pop() {
                drop(backing);
                self.arena.zero(slab);
                slab
            } else {
                if backing.backed >= backing.capacity {
                    return None;
                }
                let slab = backing.holes.pop().unwrap_or(backing.next);
                // The file must cover the slab before it can be backed, and tmpfs may be full.
                let backed = self.arena.cover(slab + 1).and_then(|()| self.arena.back(slab));
                if backed.is_err() {
                    if slab != backing.next {
                        backing.holes.push(slab);
                    }
                    return None;
                }
                backing.next = backing.next.max(slab + 1);
                backing.backed += 1;
                slab
            }
        };
        let mut list = self.lists[usize::from(class)].lock();
        self.store(slab, Meta { listed: true, ..Meta::EMPTY });
        // From here on recovery looks into it; every state word in it reads invalid.
        self.arena.slab_class(slab).store(class + 1, Release);
        list.with_room.push(slab);
        self.free_slots[usize::from(class)].fetch_add(self.classes.slots(class) as usize, Relaxed);
        self.allocate_locked(class, &mut list)
    }

    /// Take back a slot. Its state word has been made invalid, and nothing refers to it.
    pub(crate) fn free(&self, at: SlotRef) {
        let slab = at.slab();
        // The class cannot change while a slot of the slab is given out.
        let class = self.arena.slab_class(slab).load(Acquire) - 1;
        let mut list = self.lists[usize::from(class)].lock();
        let mut meta = self.load(slab);
        Slot::new(&self.arena, slab, at.slot(), self.classes.slot_bytes(class))
            .set_next(SlotRef(meta.free.into()));
        meta.free = at.slot() as u16;
        meta.live -= 1;
        self.free_slots[usize::from(class)].fetch_add(1, Relaxed);
        if meta.live == 0 && !meta.draining && (list.with_room.len() > 1 || !meta.listed) {
            // Empty, and the class has other room: let another class have it.
            if meta.listed {
                list.with_room.retain(|&other| other != slab);
            }
            self.release_locked(class, slab);
            return;
        }
        if !meta.listed && !meta.draining {
            meta.listed = true;
            // Fuller slabs are served first, so that sparse ones can drain: a slab that was full goes on top.
            list.with_room.push(slab);
        }
        self.store(slab, meta);
    }

    /// Make an empty slab spare. Its class's lock is held and it is not listed.
    fn release_locked(&self, class: u8, slab: u32) {
        self.arena.slab_class(slab).store(0, Release);
        self.store(slab, Meta::EMPTY);
        self.free_slots[usize::from(class)].fetch_sub(self.classes.slots(class) as usize, Relaxed);
        self.backing.lock().spare.push(slab);
    }

    /// The class where emptying a slab pays most: with the most free bytes among those whose free slots make up a
    /// whole slab.
    pub(crate) fn sparsest_class(&self) -> Option<u8> {
        (0..self.classes.len() as u8)
            .filter(|&class| self.free_in(class) >= self.classes.slots(class) as usize)
            .max_by_key(|&class| self.free_in(class) * self.classes.slot_bytes(class) as usize)
    }

    /// Slots of a class that are assigned and free.
    pub(crate) fn free_in(&self, class: u8) -> usize {
        self.free_slots[usize::from(class)].load(Relaxed)
    }

    /// Take the slab with the fewest slots in use out of circulation, to be emptied. Returns it with the number of
    /// slots that were ever given out.
    pub(crate) fn start_draining(&self, class: u8) -> Option<(u32, u32)> {
        let mut list = self.lists[usize::from(class)].lock();
        let (position, &slab) =
            list.with_room.iter().enumerate().min_by_key(|(_, &slab)| self.load(slab).live)?;
        list.with_room.swap_remove(position);
        let meta = Meta { draining: true, listed: false, ..self.load(slab) };
        self.store(slab, meta);
        Some((slab, meta.bump.into()))
    }

    /// Classes that have a slab with room, the one whose sparsest slab has the fewest bytes in use first.
    pub(crate) fn emptiest_classes(&self) -> Vec<u8> {
        let mut found: Vec<(u32, u8)> = (0..self.classes.len() as u8)
            .filter_map(|class| {
                let list = self.lists[usize::from(class)].lock();
                let live = list.with_room.iter().map(|&slab| self.load(slab).live).min()?;
                Some((u32::from(live) * self.classes.slot_bytes(class), class))
            })
            .collect();
        found.sort_unstable();
        found.into_iter().map(|(_, class)| class).collect()
    }

    /// After [`Slabs::start_draining`]: make the slab spare if it is empty, else take it into use again. Whether it
    /// is spare.
    pub(crate) fn finish_draining(&self, class: u8, slab: u32) -> bool {
        let mut list = self.lists[usize::from(class)].lock();
        let meta = self.load(slab);
        if meta.live == 0 {
            self.release_locked(class, slab);
            return true;
        }
        let listed = u32::from(meta.live) < self.classes.slots(class);
        self.store(slab, Meta { draining: false, listed, ..meta });
        if listed {
            // At the bottom: it is sparse, and may drain by itself.
            list.with_room.insert(0, slab);
        }
        false
    }

    /// Give one spare slab back to the host; whether there was one.
    pub(crate) fn punch_spare(&self) -> bool {
        let mut backing = self.backing.lock();
        let Some(slab) = backing.spare.pop() else { return false };
        if self.arena.punch(slab).is_err() {
            backing.spare.push(slab);
            return false;
        }
        backing.holes.push(slab);
        backing.backed -= 1;
        true
    }

    /// At recovery: take over a backed slab that holds nothing.
    pub(crate) fn adopt_spare(&self, slab: u32) {
        let mut backing = self.backing.lock();
        backing.backed += 1;
        backing.spare.push(slab);
    }

    /// At recovery: take over a slab as it was found. `free` are the numbers of its slots that hold no page.
    pub(crate) fn adopt(&self, slab: u32, class: u8, free: &[u16]) {
        let slots = self.classes.slots(class);
        debug_assert!(slots <= MAX_SLOTS);
        let live = slots as usize - free.len();
        let mut list = self.lists[usize::from(class)].lock();
        let mut backing = self.backing.lock();
        backing.backed += 1;
        if live == 0 {
            self.arena.slab_class(slab).store(0, Release);
            backing.spare.push(slab);
            return;
        }
        drop(backing);
        let mut meta = Meta { live: live as u16, bump: slots as u16, ..Meta::EMPTY };
        for &number in free.iter().rev() {
            let slot = Slot::new(&self.arena, slab, number.into(), self.classes.slot_bytes(class));
            slot.set_next(SlotRef(meta.free.into()));
            meta.free = number;
        }
        meta.listed = !free.is_empty();
        if meta.listed {
            list.with_room.push(slab);
        }
        self.store(slab, meta);
        self.free_slots[usize::from(class)].fetch_add(free.len(), Relaxed);
    }

    /// At recovery, after the last [`Slabs::adopt`]: slabs below `next` that were not adopted are holes, or made so.
    pub(crate) fn finish_adoption(&self, next: u32, unassigned: Vec<u32>) {
        let mut backing = self.backing.lock();
        backing.next = next;
        for &slab in &unassigned {
            // Spare slabs of the former process: whether backed or not, now they are not.
            let _ = self.arena.punch(slab);
        }
        backing.holes = unassigned;
    }
}
