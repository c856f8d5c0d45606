//! Where every page is: four bytes a page, in memory that outlives the process that serves the device.
//!
//! ```text
//!  31                    12 11       6 5   4   3       2      1   0
//! ┌────────────────────────┬──────────┬─────┬───────┬──────┬───────┐
//! │ print (20 bits)        │ epoch    │ age │ stale │ held │ place │
//! └────────────────────────┴──────────┴─────┴───────┴──────┴───────┘
//! ```
//!
//! - **place**: absent (reads as zeros), at the host, in the swap file, or lost.
//! - **held**: one operation owns the entry; nobody else may change it. That is the only lock there is.
//! - **stale**: under `epoch` the host may hold a copy that must not be used. It is set *before* a put is sent and
//!   cleared when the put is answered, so after a broken connection or a crash the entry still tells which key
//!   must be flushed before the page may be put again.
//! - **epoch**: part of the page's key at the host. It moves on whenever a connection breaks. A put that the host
//!   reads late, from the buffers of a dead connection, therefore lands on a key that is never asked for again.
//! - **age**: 3 when the page was last written or read, counting down; reclaim takes low ages first.
//! - **print**: low bits of the page's XXH3. A page that does not match it is never given to the kernel.

use std::sync::atomic::Ordering;

use tmem_wire::Key;

/// A page's word; `shuttle`'s in tests that run threads in every order
/// (`RUSTFLAGS="--cfg shuttle" cargo test -p tmem-guest --lib in_any_order`).
#[cfg(shuttle)]
pub(super) use shuttle::sync::atomic::AtomicU32 as Word;
#[cfg(not(shuttle))]
pub(super) use std::sync::atomic::AtomicU32 as Word;

/// Number of key epochs; they are used in turn.
pub const EPOCHS: u32 = 64;
/// The age of a page that was just used.
pub const YOUNG: u32 = 3;

const PLACE: u32 = 0b11;
const HELD: u32 = 1 << 2;
const STALE: u32 = 1 << 3;
const AGE_SHIFT: u32 = 4;
const AGE: u32 = 0b11 << AGE_SHIFT;
const EPOCH_SHIFT: u32 = 6;
const EPOCH: u32 = (EPOCHS - 1) << EPOCH_SHIFT;
const PRINT_SHIFT: u32 = 12;
const PRINT: u32 = u32::MAX << PRINT_SHIFT;

/// Where a page's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Place {
    /// Nowhere: never written, or discarded. Reads as zeros.
    Absent = 0,
    /// At the host.
    Host = 1,
    /// In the swap file, at the offset of its index.
    File = 2,
    /// It was at the host, which does not have it any more. Reading it is an I/O error.
    Lost = 3,
}

/// One page's entry.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry(u32);

impl Entry {
    /// Where the data is.
    pub fn place(self) -> Place {
        match self.0 & PLACE {
            0 => Place::Absent,
            1 => Place::Host,
            2 => Place::File,
            _ => Place::Lost,
        }
    }

    /// Whether an operation owns the entry.
    pub fn is_held(self) -> bool {
        self.0 & HELD != 0
    }

    /// Whether the host may hold an unusable copy.
    pub fn is_stale(self) -> bool {
        self.0 & STALE != 0
    }

    /// 0 (cold) to [`YOUNG`].
    pub fn age(self) -> u32 {
        (self.0 & AGE) >> AGE_SHIFT
    }

    /// The epoch of the page's key.
    pub fn epoch(self) -> u32 {
        (self.0 & EPOCH) >> EPOCH_SHIFT
    }

    /// The same entry elsewhere.
    #[must_use]
    pub fn at(self, place: Place) -> Entry {
        Entry(self.0 & !PLACE | place as u32)
    }

    /// The same entry with the stale mark set or cleared.
    #[must_use]
    pub fn stale(self, stale: bool) -> Entry {
        Entry(self.0 & !STALE | if stale { STALE } else { 0 })
    }

    /// The same entry with another key epoch.
    #[must_use]
    pub fn in_epoch(self, epoch: u32) -> Entry {
        Entry(self.0 & !EPOCH | (epoch % EPOCHS) << EPOCH_SHIFT)
    }

    /// The same entry with another age.
    #[must_use]
    pub fn aged(self, age: u32) -> Entry {
        Entry(self.0 & !AGE | age.min(YOUNG) << AGE_SHIFT)
    }

    /// The same entry for data with this checksum.
    #[must_use]
    pub fn printed(self, checksum: u32) -> Entry {
        Entry(self.0 & !PRINT | checksum << PRINT_SHIFT)
    }

    /// Whether data with this checksum can be the page's.
    pub fn matches(self, checksum: u32) -> bool {
        self.0 & PRINT == checksum << PRINT_SHIFT
    }

    /// The page's key at the host.
    pub fn key(self, index: u32) -> Key {
        Key { object: object(self.epoch()), index }
    }
}

/// The object that holds an epoch's pages.
pub fn object(epoch: u32) -> [u8; 16] {
    let mut object = *b"tmem swap epoch ";
    object[15] = (epoch % EPOCHS) as u8;
    object
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(to, "{:?}", self.place())?;
        write!(to, " e{} a{} {:05x}", self.epoch(), self.age(), self.0 >> PRINT_SHIFT)?;
        to.write_str(if self.is_stale() { " stale" } else { "" })?;
        to.write_str(if self.is_held() { " held" } else { "" })
    }
}

/// The entries of a device.
#[derive(Debug, Clone, Copy)]
pub struct Table(&'static [Word]);

impl Table {
    /// A table over memory that is all zero, or was a table before.
    pub(super) fn new(entries: &'static [Word]) -> Table {
        Table(entries)
    }

    /// Pages on the device.
    pub fn pages(&self) -> u32 {
        self.0.len() as u32
    }

    /// The entry as it is now; it may change at once unless the caller holds it.
    pub fn peek(&self, index: u32) -> Entry {
        Entry(self.0[index as usize].load(Ordering::Acquire))
    }

    /// Take the entry for oneself; `None` if somebody else has it.
    pub fn hold(&self, index: u32) -> Option<Entry> {
        let before = self.0[index as usize].fetch_or(HELD, Ordering::AcqRel);
        (before & HELD == 0).then_some(Entry(before | HELD))
    }

    /// Change an entry that the caller holds, and keep holding it.
    pub fn set(&self, index: u32, entry: Entry) {
        debug_assert!(self.peek(index).is_held());
        self.0[index as usize].store(entry.0 | HELD, Ordering::Release);
    }

    /// Let go of an entry that the caller holds.
    pub fn release(&self, index: u32) {
        let before = self.0[index as usize].fetch_and(!HELD, Ordering::Release);
        debug_assert!(before & HELD != 0);
    }

    /// One step older, for host pages that nobody holds.
    pub fn grow_old(&self, index: u32) {
        let old = self.peek(index);
        if old.place() == Place::Host && !old.is_held() && old.age() > 0 {
            // If it changed meanwhile it is young again, or gone.
            let _ = self.0[index as usize].compare_exchange(
                old.0,
                old.aged(old.age() - 1).0,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
        }
    }

    /// After the serving process died: nobody holds anything any more. Returns how many entries were held.
    pub fn release_all(&self) -> u32 {
        self.0.iter().map(|entry| u32::from(entry.fetch_and(!HELD, Ordering::AcqRel) & HELD != 0)).sum()
    }

    /// Pages by place (indexed by [`Place`]) and pages marked stale.
    pub fn census(&self) -> ([u64; 4], u64) {
        let (mut places, mut stale) = ([0; 4], 0);
        for entry in self.0 {
            let entry = Entry(entry.load(Ordering::Relaxed));
            places[entry.place() as usize] += 1;
            stale += u64::from(entry.is_stale());
        }
        (places, stale)
    }
}

#[cfg(test)]
pub(super) fn leaked_table(pages: usize) -> Table {
    Table::new((0..pages).map(|_| Word::new(0)).collect::<Vec<_>>().leak())
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_touch_each_other() {
        let entry = Entry::default().at(Place::Lost).stale(true).in_epoch(77).aged(9).printed(0xdead_beef);
        assert_eq!(
            (entry.place(), entry.is_stale(), entry.epoch(), entry.age()),
            (Place::Lost, true, 77 % EPOCHS, YOUNG)
        );
        assert!(entry.matches(0xdead_beef) && !entry.matches(0xdead_beee));
        let entry = entry.at(Place::File).stale(false).in_epoch(0).aged(0);
        assert!(entry.matches(0xdead_beef) && entry.place() == Place::File && !entry.is_held());
    }

    #[test]
    fn one_holder_at_a_time_and_ageing_leaves_held_entries_alone() {
        let table = leaked_table(2);
        let entry = table.hold(1).unwrap();
        assert!(table.hold(1).is_none());
        table.set(1, entry.at(Place::Host).aged(2));
        table.grow_old(1);
        assert_eq!(table.peek(1).age(), 2);
        table.release(1);
        table.grow_old(1);
        assert_eq!(table.peek(1).age(), 1);
        assert_eq!(table.census(), ([1, 1, 0, 0], 0));
    }
}

#[cfg(all(test, shuttle))]
mod in_any_order {
    use shuttle::sync::{Arc, Mutex};
    use shuttle::{check_dfs, thread};

    use super::*;

    /// Hold the page if it is free and count what it guards up, a slot's buffer say, which nobody else may touch then.
    fn visit(table: Table, guarded: &Mutex<u32>, place: Place) -> u32 {
        let Some(entry) = table.hold(0) else { return 0 };
        let mut count = guarded.try_lock().expect("a holder is alone");
        *count += 1;
        table.set(0, entry.at(place).printed(*count));
        drop(count);
        table.release(0);
        1
    }

    #[test]
    fn a_holder_is_alone_and_the_next_one_sees_what_it_did() {
        let explore = || {
            let (table, guarded) = (leaked_table(1), Arc::new(Mutex::new(0)));
            let there = guarded.clone();
            let other = thread::spawn(move || visit(table, &there, Place::Host));
            let visits = visit(table, &guarded, Place::File) + other.join().unwrap();
            assert!(visits >= 1, "one of two that meet gets in");
            assert_eq!(*guarded.lock().unwrap(), visits);
            let entry = table.peek(0);
            assert!(entry.matches(visits) && !entry.is_held(), "{entry:?} after {visits}");
        };
        check_dfs(explore, None);
    }

    #[test]
    fn ageing_brings_nothing_back_that_a_holder_changed() {
        let explore = || {
            let table = leaked_table(1);
            let entry = table.hold(0).unwrap();
            table.set(0, entry.at(Place::Host).aged(YOUNG).printed(1));
            table.release(0);
            let clock = thread::spawn(move || {
                table.grow_old(0);
                table.grow_old(0);
            });
            let moved = table.hold(0).unwrap();
            assert_eq!(moved.place(), Place::Host);
            table.set(0, moved.at(Place::File).stale(true).printed(2));
            table.release(0);
            clock.join().unwrap();
            let entry = table.peek(0);
            assert!(entry.place() == Place::File && entry.is_stale() && entry.matches(2), "{entry:?}");
            assert!(!entry.is_held());
        };
        check_dfs(explore, None);
    }

    #[test]
    fn who_looks_without_holding_sees_whole_states() {
        let explore = || {
            let table = leaked_table(1);
            let writer = thread::spawn(move || {
                let entry = table.hold(0).unwrap();
                table.set(0, entry.at(Place::Host).in_epoch(1).stale(true));
                table.set(0, entry.at(Place::Host).in_epoch(1).printed(7));
                table.release(0);
            });
            let seen = table.peek(0);
            // The connector asks the host for pages that look so: none whose put was not answered.
            if seen.place() == Place::Host && !seen.is_stale() && !seen.is_held() {
                assert!(seen.epoch() == 1 && seen.matches(7), "{seen:?}");
            }
            writer.join().unwrap();
        };
        check_dfs(explore, None);
    }
}
