//! Reads, writes and discards of the kernel.

use std::sync::atomic::Ordering;

use tmem_wire::pages::{decode_got, decode_statuses, write_keys, PutWriter};
use tmem_wire::{Features, GetStatus, Header, Op, PutStatus, PAGE_BYTES};

use super::slot::{ones, Bits, Job};
use super::{got_bytes, keys_bytes, put_bytes, AnswerError, Core, Direction, Io, ABANDONED, EPOCH_PERIOD};
use crate::page::{checksum, decode};
use crate::swap::table::{Place, YOUNG};

fn page(i: usize) -> std::ops::Range<usize> {
    i * PAGE_BYTES..(i + 1) * PAGE_BYTES
}

impl Core {
    /// Hold the entries of all pages of a read or write, or of none.
    fn hold_all(&mut self, s: usize) -> bool {
        let slot = &mut self.slots[s];
        for i in 0..slot.pages {
            if self.shared.table.hold(slot.index[i]).is_none() {
                self.release_held(s);
                return false;
            }
            slot.held |= 1 << i;
        }
        true
    }

    pub(super) fn release_held(&mut self, s: usize) {
        let slot = &mut self.slots[s];
        let mut stale = false;
        for i in ones(std::mem::take(&mut slot.held)) {
            stale |= self.shared.table.peek(slot.index[i]).is_stale();
            self.shared.table.release(slot.index[i]);
        }
        if stale {
            // Not before: the sweeper passes over pages that are held.
            self.shared.state.sweep_wanted.store(true, Ordering::Release);
        }
    }

    /// If nothing of the slot is outstanding any more: complete it, or let it start over.
    pub(super) fn finish(&mut self, io: &mut impl Io, s: usize) {
        let slot = &mut self.slots[s];
        if slot.frame.is_some() || slot.files > 0 {
            return;
        }
        match slot.job {
            Job::Read | Job::Write => {
                let again = std::mem::take(&mut slot.again);
                let ok = !slot.failed;
                self.release_held(s);
                if again {
                    self.waiting.push_back(s);
                    return;
                }
                self.shared.count(|c| &c.io_errors, (!ok).into());
                self.slots[s].job = Job::Idle;
                io.complete(s, ok);
            }
            Job::Move => {
                if !self.flush_moved(io, s) {
                    self.waiting.push_back(s);
                }
            }
            Job::Idle | Job::Discard | Job::Sweep => {}
        }
    }

    fn transfer(&mut self, io: &mut impl Io, s: usize, direction: Direction, mask: u32) {
        let slot = self.slots[s];
        for (at, pages) in slot.runs(mask) {
            self.slots[s].files += 1;
            io.file(s, direction, at, pages, slot.index[at]);
        }
    }

    // ── write ──────────────────────────────────────────────────────────────────────────────────────────────────

    pub(super) fn start_write(&mut self, io: &mut impl Io, s: usize) -> bool {
        let pages = self.slots[s].pages;
        let to_host = !self.stalled && !self.shared.state.draining.load(Ordering::Relaxed);
        let session = self.session.filter(|_| to_host);
        if session.is_some() && !self.room(io, put_bytes(pages)) {
            return false;
        }
        if !self.hold_all(s) {
            return false;
        }
        let epoch = self.shared.epoch();
        let tag = self.next_tag(s);
        let (out, data) = io.frame(s);
        let slot = &mut self.slots[s];
        let mut host = 0;
        for i in 0..pages {
            slot.sums[i] = checksum(&data[page(i)]);
            let entry = self.shared.table.peek(slot.index[i]);
            if session.is_some() && !entry.is_stale() {
                // An overwritten host page keeps its key, so that there is only one copy to think of.
                let entry = if entry.place() == Place::Host { entry } else { entry.in_epoch(epoch) };
                self.shared.table.set(slot.index[i], entry.stale(true));
                host |= 1 << i;
            } else if entry.place() == Place::Host {
                self.shared.table.set(slot.index[i], entry.stale(true));
            }
        }
        slot.host = host;
        if let Some(session) = session.filter(|_| host != 0) {
            let before = out.len();
            let checksums = session.features.has(Features::CHECKSUMS);
            let count = host.count_ones() as u16;
            let mut writer = PutWriter::begin(out, tag, session.pool, count, checksums);
            for i in ones(host) {
                let key = self.shared.table.peek(slot.index[i]).key(slot.index[i]);
                self.encoder.put(&mut writer, &key, &data[page(i)], slot.sums[i]);
            }
            writer.end();
            let bytes = out.len() - before;
            self.sent(s, Op::Put, bytes);
        }
        self.transfer(io, s, Direction::Write, ((1 << pages) - 1) & !host);
        true
    }

    pub(super) fn put_answered(
        &mut self,
        io: &mut impl Io,
        s: usize,
        header: &Header,
        body: &[u8],
    ) -> Result<(), AnswerError> {
        let statuses = decode_statuses(header, body)?;
        let slot = self.slots[s];
        if statuses.len() != slot.host.count_ones() as usize {
            return Err(AnswerError::Unasked { op: header.op, tag: header.tag });
        }
        self.take_frame(s);
        let table = self.shared.table;
        let mut refused = 0;
        for (i, status) in ones(slot.host).zip(statuses) {
            let entry = table.peek(slot.index[i]).stale(false);
            if PutStatus::from_code(*status) == Some(PutStatus::Stored) {
                table.set(slot.index[i], entry.at(Place::Host).printed(slot.sums[i]).aged(YOUNG));
            } else {
                // A refused put leaves nothing under its key.
                let gone = entry.place() == Place::Host;
                table.set(slot.index[i], if gone { entry.at(Place::Absent) } else { entry });
                refused |= 1 << i;
            }
        }
        self.slots[s].host = 0;
        self.shared.count(|c| &c.puts, (slot.host & !refused).count_ones().into());
        self.shared.count(|c| &c.refused, refused.count_ones().into());
        self.transfer(io, s, Direction::Write, refused);
        self.finish(io, s);
        Ok(())
    }

    /// Puts that the host leaves unanswered for too long go to the swap file. Whatever becomes of them at the host is
    /// stale then.
    pub(super) fn give_up_puts(&mut self, io: &mut impl Io) {
        for s in 0..self.front {
            let slot = &self.slots[s];
            let late = slot.sent_at.is_some_and(|at| self.now.duration_since(at) > self.options.hedge);
            if slot.job != Job::Write || slot.frame.is_none() || !late || self.abandoned.len() == ABANDONED {
                continue;
            }
            self.abandoned.push((slot.tag(s), slot.frame_bytes));
            self.shared.count(|c| &c.hedged, slot.host.count_ones().into());
            self.stalled = true;
            if self.tidy.epoch_is_old(self.now, EPOCH_PERIOD) {
                self.shared.next_epoch();
            }
            self.slots[s].frame = None;
            self.unanswered(io, s);
        }
    }

    pub(super) fn file_was_written(&mut self, s: usize, at: usize, pages: usize, ok: bool) {
        let slot = &mut self.slots[s];
        if !ok {
            slot.failed = true;
            return;
        }
        let table = self.shared.table;
        for i in at..at + pages {
            let entry = table.peek(slot.index[i]);
            table.set(slot.index[i], entry.at(Place::File).printed(slot.sums[i]));
        }
        self.shared.count(|c| &c.writes_file, pages as u64);
    }

    // ── read ───────────────────────────────────────────────────────────────────────────────────────────────────

    pub(super) fn start_read(&mut self, io: &mut impl Io, s: usize) -> bool {
        if !self.hold_all(s) {
            return false;
        }
        let pages = self.slots[s].pages;
        let (mut host, mut file) = (0, 0);
        self.keys.clear();
        for i in 0..pages {
            let index = self.slots[s].index[i];
            let entry = self.shared.table.peek(index);
            match entry.place() {
                Place::Absent => io.frame(s).1[page(i)].fill(0),
                Place::Lost => self.slots[s].failed = true,
                Place::File => file |= 1 << i,
                Place::Host => {
                    host |= 1 << i;
                    self.keys.push(entry.key(index));
                }
            }
        }
        if host != 0 && !self.room(io, got_bytes(self.keys.len())) {
            self.slots[s].failed = false;
            self.release_held(s);
            return false;
        }
        self.slots[s].host = host;
        self.send_get(io, s);
        self.transfer(io, s, Direction::Read, file);
        self.finish(io, s);
        true
    }

    /// Ask for the pages whose keys were collected.
    pub(super) fn send_get(&mut self, io: &mut impl Io, s: usize) {
        let Some(session) = self.session.filter(|_| !self.keys.is_empty()) else { return };
        let lz4 = self.options.accept_lz4 && session.features.has(Features::LZ4);
        let tag = self.next_tag(s);
        write_keys(Op::Get, tag, session.pool, lz4, &self.keys, io.requests());
        self.sent(s, Op::Get, got_bytes(self.keys.len()));
    }

    pub(super) fn got(
        &mut self,
        io: &mut impl Io,
        s: usize,
        header: &Header,
        body: &[u8],
    ) -> Result<(), AnswerError> {
        let pages = decode_got(header, body)?;
        let slot = self.slots[s];
        if pages.len() != slot.host.count_ones() as usize {
            return Err(AnswerError::Unasked { op: header.op, tag: header.tag });
        }
        self.take_frame(s);
        let table = self.shared.table;
        let (_, data) = io.frame(s);
        let mut good = 0;
        for (i, got) in ones(slot.host).zip(pages) {
            let entry = table.peek(slot.index[i]);
            let sum = decode(&got, &mut data[page(i)]).filter(|sum| entry.matches(*sum));
            if let Some(sum) = sum {
                self.slots[s].sums[i] = sum;
                good |= 1 << i;
                if slot.job == Job::Read {
                    table.set(slot.index[i], entry.aged(YOUNG));
                }
            } else {
                table.set(slot.index[i], entry.at(Place::Lost).stale(got.status == GetStatus::Hit));
                self.lost(slot.index[i], got.status);
            }
        }
        self.slots[s].host = 0;
        if slot.job == Job::Move {
            self.fetched(s, good);
            self.transfer(io, s, Direction::Write, good);
        } else {
            self.slots[s].failed |= good != slot.host;
            self.shared.count(|c| &c.reads_host, good.count_ones().into());
        }
        self.finish(io, s);
        Ok(())
    }

    fn lost(&self, index: u32, status: GetStatus) {
        self.shared.count(|c| &c.lost, 1);
        if !self.shared.state.host_lost_pages.swap(true, Ordering::Relaxed) {
            let why = match status {
                GetStatus::Hit => "sent other data than was put",
                GetStatus::Miss => {
                    "does not have it any more (was the host rebooted, or the pool destroyed?)"
                }
                GetStatus::Lost => "says it was damaged",
            };
            log::error!(
                "swap page {index} is lost: the host {why}; programs that need a lost page get an I/O error. \
                 Further losses are counted in the status, not logged"
            );
        }
    }

    pub(super) fn file_was_read(&mut self, io: &mut impl Io, s: usize, at: usize, pages: usize, ok: bool) {
        let slot = &mut self.slots[s];
        let (_, data) = io.frame(s);
        let intact = |i: usize| self.shared.table.peek(slot.index[i]).matches(checksum(&data[page(i)]));
        if ok && (at..at + pages).all(intact) {
            self.shared.count(|c| &c.reads_file, pages as u64);
        } else {
            if ok {
                log::error!("swap file: pages {}+{pages} are not what was written there", slot.index[at]);
            }
            slot.failed = true;
        }
    }

    // ── discard ────────────────────────────────────────────────────────────────────────────────────────────────

    /// Go on with a discard; `false` if it has to wait.
    pub(super) fn discard_on(&mut self, io: &mut impl Io, s: usize) -> bool {
        let table = self.shared.table;
        loop {
            let slot = &mut self.slots[s];
            if slot.at == slot.end {
                slot.job = Job::Idle;
                io.complete(s, true);
                return true;
            }
            let batch = self.session.map_or(tmem_wire::MAX_BATCH, |session| session.max_batch);
            if self.session.is_some() && !self.room(io, keys_bytes(batch)) {
                return false;
            }
            let slot = &mut self.slots[s];
            self.keys.clear();
            slot.flush = Bits::default();
            slot.chunk = slot.at;
            let mut blocked = false;
            let mut discarded = 0;
            while slot.at < slot.end.min(slot.chunk + batch as u32) {
                let index = slot.at;
                let entry = table.peek(index);
                if entry.place() != Place::Absent || entry.is_stale() || entry.is_held() {
                    let Some(entry) = table.hold(index) else {
                        blocked = true;
                        break;
                    };
                    discarded += u64::from(entry.place() != Place::Absent);
                    let at_host = entry.place() == Place::Host || entry.is_stale();
                    if at_host && self.session.is_some() {
                        table.set(index, entry.stale(true));
                        slot.flush.set(index - slot.chunk);
                        self.keys.push(entry.key(index));
                    } else {
                        table.set(index, entry.at(Place::Absent).stale(at_host));
                        table.release(index);
                        if at_host {
                            self.shared.state.sweep_wanted.store(true, Ordering::Release);
                        }
                    }
                }
                slot.at += 1;
            }
            self.shared.count(|c| &c.discards, discarded);
            if !self.keys.is_empty() {
                self.send_flush(io, s);
                return true;
            }
            if blocked {
                return false;
            }
        }
    }

    /// Flush the keys that were collected.
    pub(super) fn send_flush(&mut self, io: &mut impl Io, s: usize) {
        let Some(session) = self.session else { return };
        let tag = self.next_tag(s);
        write_keys(Op::FlushPage, tag, session.pool, false, &self.keys, io.requests());
        self.sent(s, Op::FlushPage, keys_bytes(self.keys.len()));
    }

    /// A discard's chunk is over: flushed, or (`stale`) left for the sweeper.
    pub(super) fn discarded(&mut self, io: &mut impl Io, s: usize, stale: bool) {
        let slot = self.slots[s];
        for bit in slot.flush.iter() {
            let index = slot.chunk + bit;
            self.shared.table.set(index, self.shared.table.peek(index).at(Place::Absent).stale(stale));
            self.shared.table.release(index);
        }
        if stale {
            self.shared.state.sweep_wanted.store(true, Ordering::Release);
        }
        if !self.discard_on(io, s) {
            self.waiting.push_back(s);
        }
    }

    // ── lost connection ────────────────────────────────────────────────────────────────────────────────────────

    /// The frame of this slot will not be answered.
    pub(super) fn unanswered(&mut self, io: &mut impl Io, s: usize) {
        let host = std::mem::take(&mut self.slots[s].host);
        match self.slots[s].job {
            Job::Write => self.transfer(io, s, Direction::Write, host),
            Job::Read => {
                self.slots[s].again = true;
                self.slots[s].failed = false;
                self.finish(io, s);
            }
            Job::Discard => self.discarded(io, s, true),
            Job::Move => self.move_unanswered(s),
            Job::Sweep => self.sweep_unanswered(s),
            Job::Idle => {}
        }
    }
}
