//! What nobody asks for page by page: reclaim on the host's behalf, flushing of stale copies, ageing.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tmem_wire::pages::{decode_statuses, write_objects};
use tmem_wire::{Header, Op, MAX_BATCH};

use super::slot::{ones, Bits, Job, Slot};
use super::{got_bytes, keys_bytes, AnswerError, Core, Io, MAX_PAGES, MOVERS};
use crate::swap::shared::Shared;
use crate::swap::table::{object, Place, EPOCHS, YOUNG};

/// Entries looked at before the kernel's requests get their turn again.
const SCAN_ENTRIES: u32 = 8192;
/// A page is cold after three of these without use.
const AGEING: Duration = Duration::from_secs(20);
/// How long after a reconnect a put from the old connection may still be read by the host.
const ORPHANS_AFTER: Duration = Duration::from_secs(10);
/// Epochs ahead of the present one that are never flushed as orphans: they may come into use at any moment.
const EPOCHS_AHEAD: u32 = 16;

/// Where the background work stands.
#[derive(Debug)]
pub(super) struct Tidy {
    // Reclaim: the clock's hand, how far it is round, the highest age it takes, what it found this round.
    hand: u32,
    round: u32,
    level: u32,
    found: u64,
    /// Pages that may be moved now.
    credit: f64,
    credited: Instant,
    // Ageing.
    aged: Instant,
    ageing_hand: u32,
    /// When to flush epochs that no page uses.
    orphans_due: Option<Instant>,
    /// A sweep over the table is under way.
    sweeping: bool,
    /// When a put was last given up.
    gave_up: Option<Instant>,
}

impl Tidy {
    pub(super) fn new(now: Instant) -> Tidy {
        Tidy {
            hand: 0,
            round: 0,
            level: 0,
            found: 0,
            credit: 0.0,
            credited: now,
            aged: now,
            ageing_hand: 0,
            orphans_due: None,
            sweeping: false,
            gave_up: None,
        }
    }

    /// A put is given up: shall the epoch move on? If so, what the put may leave behind is looked for later.
    pub(super) fn epoch_is_old(&mut self, now: Instant, period: Duration) -> bool {
        let old = self.gave_up.is_none_or(|then| now.duration_since(then) > period);
        if old {
            self.gave_up = Some(now);
            self.orphans_due = Some(now + ORPHANS_AFTER);
        }
        old
    }

    pub(super) fn connected(&mut self, shared: &Shared, now: Instant) {
        shared.state.sweep_wanted.store(true, Ordering::Release);
        self.orphans_due = Some(now + ORPHANS_AFTER);
    }
}

impl Core {
    pub(super) fn tidy_up(&mut self, io: &mut impl Io, now: Instant) {
        self.age_pages(now);
        if self.session.is_none() {
            return;
        }
        self.sweep(io, now);
        self.earn_credit(now);
        for s in self.front..self.front + MOVERS {
            if self.slots[s].job == Job::Idle && self.reclaim_left() > 0 {
                self.start_move(io, s);
            }
        }
    }

    pub(super) fn reclaim_left(&self) -> u64 {
        self.shared.state.reclaim_left.load(Ordering::Relaxed)
    }

    fn age_pages(&mut self, now: Instant) {
        let table = self.shared.table;
        let due = now.duration_since(self.tidy.aged).as_secs_f64() / AGEING.as_secs_f64();
        let steps = (due * f64::from(table.pages())) as u32;
        if steps > 0 {
            self.tidy.aged = now;
            for _ in 0..steps.min(table.pages()) {
                table.grow_old(self.tidy.ageing_hand);
                self.tidy.ageing_hand = (self.tidy.ageing_hand + 1) % table.pages();
            }
        }
    }

    // ── reclaim ────────────────────────────────────────────────────────────────────────────────────────────────

    fn earn_credit(&mut self, now: Instant) {
        let rate = f64::from(self.options.reclaim_pages_per_s);
        let earned = now.duration_since(self.tidy.credited).as_secs_f64() * rate;
        self.tidy.credited = now;
        self.tidy.credit = (self.tidy.credit + earned).min((MOVERS * MAX_PAGES) as f64);
    }

    fn start_move(&mut self, io: &mut impl Io, s: usize) {
        let left = &self.shared.state.reclaim_left;
        let want = (MAX_PAGES as u64).min(left.load(Ordering::Relaxed));
        // Whole batches, but for the last: small ones would cost the link more than they are worth.
        if self.tidy.credit < want as f64 || !self.room(io, got_bytes(MAX_PAGES)) {
            return;
        }
        let mut slot = Slot { job: Job::Move, turn: self.slots[s].turn, ..Slot::default() };
        let exhausted = self.pick(&mut slot, want as usize);
        if exhausted {
            left.store(0, Ordering::Relaxed);
        }
        if slot.pages == 0 {
            return;
        }
        if !exhausted {
            left.fetch_sub((slot.pages as u64).min(left.load(Ordering::Relaxed)), Ordering::Relaxed);
        }
        self.tidy.credit -= slot.pages as f64;
        self.keys.clear();
        for &index in &slot.index[..slot.pages] {
            self.keys.push(self.shared.table.peek(index).key(index));
        }
        slot.held = (1 << slot.pages) - 1;
        slot.host = slot.held;
        self.slots[s] = slot;
        self.send_get(io, s);
    }

    /// Hold up to `want` of the coldest host pages; `true` if there are none left at all.
    fn pick(&mut self, slot: &mut Slot, want: usize) -> bool {
        let table = self.shared.table;
        let tidy = &mut self.tidy;
        for _ in 0..SCAN_ENTRIES.min(table.pages()) {
            if slot.pages == want {
                return false;
            }
            let (index, level) = (tidy.hand, tidy.level);
            let fits = |entry: crate::swap::table::Entry| {
                entry.place() == Place::Host && !entry.is_stale() && entry.age() <= level
            };
            let entry = table.peek(index);
            if fits(entry) && !entry.is_held() {
                match table.hold(index) {
                    Some(entry) if fits(entry) => {
                        slot.index[slot.pages] = index;
                        slot.pages += 1;
                        tidy.found += 1;
                    }
                    Some(_) => table.release(index),
                    None => {}
                }
            }
            tidy.hand = (tidy.hand + 1) % table.pages();
            tidy.round += 1;
            if tidy.round == table.pages() {
                tidy.round = 0;
                if tidy.level < YOUNG {
                    tidy.level += 1;
                } else if std::mem::take(&mut tidy.found) == 0 {
                    tidy.level = 0;
                    return true;
                }
            }
        }
        false
    }

    /// The host sent these pages; the others are lost.
    pub(super) fn fetched(&mut self, s: usize, good: u32) {
        let slot = &mut self.slots[s];
        for i in ones(slot.held & !good) {
            self.shared.table.release(slot.index[i]);
        }
        slot.held = good;
    }

    pub(super) fn moved_to_file(&mut self, s: usize, at: usize, pages: usize, ok: bool) {
        let table = self.shared.table;
        let slot = &mut self.slots[s];
        for i in at..at + pages {
            if ok {
                table.set(slot.index[i], table.peek(slot.index[i]).at(Place::File).stale(true));
            } else {
                slot.held &= !(1 << i);
                table.release(slot.index[i]);
            }
        }
        if !ok {
            self.shared.state.reclaim_left.store(0, Ordering::Relaxed);
            log::error!("reclaim stops: the swap file cannot be written; the pages stay at the host");
        }
    }

    /// The pages are in the file; have the host forget them. `false` if that has to wait.
    pub(super) fn flush_moved(&mut self, io: &mut impl Io, s: usize) -> bool {
        let slot = self.slots[s];
        if self.session.is_none() || slot.held == 0 {
            self.move_unanswered(s);
            return true;
        }
        if !self.room(io, keys_bytes(slot.held.count_ones() as usize)) {
            return false;
        }
        self.keys.clear();
        for i in ones(slot.held) {
            self.keys.push(self.shared.table.peek(slot.index[i]).key(slot.index[i]));
        }
        self.send_flush(io, s);
        true
    }

    /// The connection was lost under a move: pages not in the file yet stay where they are, the others are marked.
    pub(super) fn move_unanswered(&mut self, s: usize) {
        self.release_held(s);
        self.slots[s].job = Job::Idle;
    }

    // ── stale copies ───────────────────────────────────────────────────────────────────────────────────────────

    fn sweep(&mut self, io: &mut impl Io, now: Instant) {
        let s = self.front + MOVERS;
        if self.slots[s].job != Job::Idle {
            return;
        }
        if !self.tidy.sweeping {
            if self.shared.state.sweep_wanted.swap(false, Ordering::AcqRel) {
                self.tidy.sweeping = true;
                self.slots[s].at = 0;
            } else if self.tidy.orphans_due.is_some_and(|due| due <= now) {
                self.flush_orphans(io, s);
                return;
            } else {
                return;
            }
        }
        let batch = self.session.map_or(MAX_BATCH, |session| session.max_batch);
        if !self.room(io, keys_bytes(batch)) {
            return;
        }
        let table = self.shared.table;
        let slot = &mut self.slots[s];
        self.keys.clear();
        slot.flush = Bits::default();
        let mut looked = 0;
        // A chunk starts at its first stale page and spans no more pages than it has bits.
        while slot.at < table.pages() && looked < SCAN_ENTRIES {
            let index = slot.at;
            if self.keys.is_empty() {
                slot.chunk = index;
            } else if index - slot.chunk >= batch as u32 {
                break;
            }
            // A host page that is marked had a write under way when its server died; the kernel repeats it.
            let wants = |entry: crate::swap::table::Entry| entry.is_stale() && entry.place() != Place::Host;
            let entry = table.peek(index);
            if wants(entry) && !entry.is_held() {
                match table.hold(index) {
                    Some(entry) if wants(entry) => {
                        slot.flush.set(index - slot.chunk);
                        self.keys.push(entry.key(index));
                    }
                    Some(_) => table.release(index),
                    None => {}
                }
            }
            slot.at += 1;
            looked += 1;
        }
        if slot.at == table.pages() {
            self.tidy.sweeping = false;
        }
        if !self.keys.is_empty() {
            slot.job = Job::Sweep;
            self.send_flush(io, s);
        }
    }

    /// Flush epochs that were used but that no page names any more: a put that the host read late landed there.
    fn flush_orphans(&mut self, io: &mut impl Io, s: usize) {
        let Some(session) = self.session else { return };
        if !self.room(io, keys_bytes(EPOCHS as usize)) {
            return;
        }
        self.tidy.orphans_due = None;
        let epoch = self.shared.epoch();
        let mut used = 0_u64;
        for ahead in 0..EPOCHS_AHEAD {
            used |= 1 << ((epoch + ahead) % EPOCHS);
        }
        let table = self.shared.table;
        for index in 0..table.pages() {
            let entry = table.peek(index);
            if entry.place() == Place::Host || entry.is_stale() || entry.is_held() {
                used |= 1 << entry.epoch();
            }
        }
        let mut objects = [[0; 16]; EPOCHS as usize];
        let mut count = 0;
        for unused in (0..EPOCHS).filter(|e| used & 1 << e == 0) {
            objects[count] = object(unused);
            count += 1;
        }
        if count > 0 {
            let tag = self.next_tag(s);
            write_objects(tag, session.pool, &objects[..count], io.requests());
            self.slots[s].job = Job::Sweep;
            self.slots[s].flush = Bits::default();
            self.sent(s, Op::FlushObject, keys_bytes(count));
        }
    }

    pub(super) fn sweep_unanswered(&mut self, s: usize) {
        let slot = self.slots[s];
        for bit in slot.flush.iter() {
            self.shared.table.release(slot.chunk + bit);
        }
        self.slots[s].job = Job::Idle;
        self.tidy.sweeping = false;
        self.shared.state.sweep_wanted.store(true, Ordering::Release);
    }

    // ── answers ────────────────────────────────────────────────────────────────────────────────────────────────

    pub(super) fn flush_answered(
        &mut self,
        io: &mut impl Io,
        s: usize,
        header: &Header,
        body: &[u8],
    ) -> Result<(), AnswerError> {
        // Flushed or not there: either way the key holds nothing now, whatever the statuses say.
        decode_statuses(header, body)?;
        self.take_frame(s);
        let slot = self.slots[s];
        let table = self.shared.table;
        match slot.job {
            Job::Discard => self.discarded(io, s, false),
            Job::Sweep => {
                for bit in slot.flush.iter() {
                    let index = slot.chunk + bit;
                    table.set(index, table.peek(index).stale(false));
                    table.release(index);
                }
                self.slots[s].job = Job::Idle;
            }
            Job::Move => {
                for i in ones(slot.held) {
                    table.set(slot.index[i], table.peek(slot.index[i]).stale(false));
                }
                self.shared.count(|c| &c.reclaimed, slot.held.count_ones().into());
                self.release_held(s);
                self.slots[s].job = Job::Idle;
            }
            Job::Idle | Job::Read | Job::Write => {}
        }
        Ok(())
    }
}
