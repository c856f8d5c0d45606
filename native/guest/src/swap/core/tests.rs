//! The state machine against a dictionary: two lanes, a host that refuses, connections that break at any moment with
//! requests of theirs arriving late, a swap file that answers out of order, and reclaim all the while.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::Ordering;
use std::time::Duration;

use proptest::prelude::*;
use tmem_wire::pages::{decode_keys, decode_objects, decode_put, write_statuses, GotWriter};
use tmem_wire::{Encoding, GetStatus, PutStatus};

use super::*;
use crate::page::checksum;
use crate::swap::table::Place;

const PAGES: u32 = 96;
const SLOTS: usize = 4;
const LANES: usize = 2;
const HEDGE: Duration = Duration::from_millis(60);

/// A page that tells which write it came from; every fourth is filled with one word.
fn page_of(index: u32, seed: u32) -> Vec<u8> {
    let word = (u64::from(index) << 32 | u64::from(seed)).to_le_bytes();
    let mut page: Vec<u8> = word.iter().copied().cycle().take(PAGE_BYTES).collect();
    if seed % 4 != 0 {
        page[17] ^= 0xff;
    }
    page
}

#[derive(Default)]
struct Store(HashMap<Key, Vec<u8>>);

impl Store {
    /// Do what one frame asks; `refuse` says which puts are refused.
    fn serve(&mut self, frame: &[u8], refuse: u32) -> Vec<u8> {
        let header = Header::decode(frame[..HEADER_BYTES].try_into().unwrap()).unwrap();
        let body = &frame[HEADER_BYTES..];
        let mut out = Vec::new();
        match header.op {
            Op::Put => {
                let mut statuses = Vec::new();
                for (i, put) in decode_put(&header, body).unwrap().enumerate() {
                    self.0.remove(&put.key);
                    if refuse & 1 << i != 0 {
                        statuses.push(PutStatus::OverQuota as u8);
                        continue;
                    }
                    let mut page = vec![0; PAGE_BYTES];
                    let got = tmem_wire::pages::GotPage {
                        status: GetStatus::Hit,
                        encoding: put.encoding,
                        payload: put.payload,
                        checksum: put.checksum,
                    };
                    assert!(crate::page::decode(&got, &mut page).is_some());
                    self.0.insert(put.key, page);
                    statuses.push(PutStatus::Stored as u8);
                }
                write_statuses(&header, &statuses, &mut out);
            }
            Op::Get => {
                let mut writer = GotWriter::begin(&mut out, &header, true);
                for key in decode_keys(&header, body).unwrap() {
                    writer.page_with(|out| match self.0.get(&key) {
                        Some(page) => {
                            out.extend_from_slice(page);
                            (GetStatus::Hit, Encoding::Raw, checksum(page))
                        }
                        None => (GetStatus::Miss, Encoding::None, 0),
                    });
                }
                writer.end();
            }
            Op::FlushPage => {
                let statuses: Vec<u8> = decode_keys(&header, body)
                    .unwrap()
                    .map(|key| u8::from(self.0.remove(&key).is_none()))
                    .collect();
                write_statuses(&header, &statuses, &mut out);
            }
            Op::FlushObject => {
                let objects: Vec<_> = decode_objects(&header, body).unwrap().collect();
                self.0.retain(|key, _| !objects.contains(&key.object));
                write_statuses(&header, &vec![0; objects.len()], &mut out);
            }
            other => panic!("{other:?}"),
        }
        out
    }
}

struct Transfer {
    slot: usize,
    direction: Direction,
    at: usize,
    pages: usize,
    index: u32,
}

struct Hands {
    out: Vec<u8>,
    data: Vec<Vec<u8>>,
    transfers: VecDeque<Transfer>,
    done: VecDeque<(usize, bool)>,
}

impl Io for Hands {
    fn requests(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    fn frame(&mut self, slot: usize) -> (&mut Vec<u8>, &mut [u8]) {
        (&mut self.out, &mut self.data[slot])
    }

    fn file(&mut self, slot: usize, direction: Direction, at: usize, pages: usize, index: u32) {
        assert!(pages > 0 && at + pages <= MAX_PAGES && index + pages as u32 <= PAGES);
        self.transfers.push_back(Transfer { slot, direction, at, pages, index });
    }

    fn complete(&mut self, slot: usize, ok: bool) {
        self.done.push_back((slot, ok));
    }
}

struct Lane {
    core: Core,
    hands: Hands,
    /// What the kernel waits for, by slot.
    asked: Vec<Option<(Request, u32)>>,
    /// Frames the host has not read yet, and its answers that have not arrived.
    sent: VecDeque<Vec<u8>>,
    answers: VecDeque<Vec<u8>>,
    connected: bool,
}

struct World {
    shared: Shared,
    lanes: Vec<Lane>,
    store: Store,
    /// Frames of dead connections that the host may still read.
    late: Vec<Vec<u8>>,
    was_late: bool,
    file: Vec<Vec<u8>>,
    /// What each page must read as: the seed of its last write, `None` for zeros.
    expected: Vec<Option<u32>>,
    /// Pages whose last write failed: anything but wrong data of a third party is allowed, so they are not compared.
    unknown: HashSet<u32>,
    now: Instant,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Write { lane: usize, first: u32, pages: u32, seed: u32 },
    Read { lane: usize, first: u32, pages: u32 },
    Discard { lane: usize, first: u32, pages: u32 },
    HostReads { lane: usize, frames: usize, refuse: u32 },
    Answers { lane: usize, frames: usize },
    File { lane: usize, transfers: usize, newest_first: bool, ok: bool },
    Break { lane: usize, late: bool },
    Connect { lane: usize },
    HostReadsLate { at: usize },
    Reclaim { pages: u64 },
    Drain(bool),
    Pass { ms: u64 },
}

impl World {
    fn new(compress: bool) -> World {
        let shared = Shared::map(PAGES).unwrap();
        let options = Options { compress, accept_lz4: true, reclaim_pages_per_s: 2000, hedge: HEDGE };
        let now = Instant::now();
        let lane = |number| Lane {
            core: Core::new(shared, number, SLOTS, options, now),
            hands: Hands {
                out: Vec::with_capacity(OUT_BYTES),
                data: vec![vec![0xaa; MAX_PAGES * PAGE_BYTES]; SLOTS + OWN_SLOTS],
                transfers: VecDeque::new(),
                done: VecDeque::new(),
            },
            asked: vec![None; SLOTS],
            sent: VecDeque::new(),
            answers: VecDeque::new(),
            connected: false,
        };
        World {
            shared,
            lanes: (0..LANES).map(lane).collect(),
            store: Store::default(),
            late: Vec::new(),
            was_late: false,
            file: vec![vec![0; PAGE_BYTES]; PAGES as usize],
            expected: vec![None; PAGES as usize],
            unknown: HashSet::new(),
            now,
        }
    }

    /// The kernel never touches a page that it is writing or discarding.
    fn is_busy(&self, request: &Request) -> bool {
        let range = request.first..request.first + request.pages;
        self.lanes.iter().flat_map(|lane| lane.asked.iter().flatten()).any(|(other, _)| {
            let both_read = other.kind == Kind::Read && request.kind == Kind::Read;
            !both_read && other.first < range.end && range.start < other.first + other.pages
        })
    }

    fn submit(&mut self, l: usize, request: Request, seed: u32) {
        if self.is_busy(&request) {
            return;
        }
        let lane = &mut self.lanes[l];
        let Some(slot) = lane.core.free_slot() else { return };
        for i in 0..request.pages as usize {
            if request.kind == Kind::Write {
                lane.hands.data[slot][i * PAGE_BYTES..][..PAGE_BYTES]
                    .copy_from_slice(&page_of(request.first + i as u32, seed));
            }
        }
        lane.asked[slot] = Some((request, seed));
        lane.core.submit(&mut lane.hands, slot, request);
        self.settle();
    }

    /// Take the frames out of the lanes' buffers and look at what was completed.
    fn settle(&mut self) {
        for l in 0..LANES {
            let lane = &mut self.lanes[l];
            assert_eq!(lane.hands.out.capacity(), OUT_BYTES, "the buffer of requests had to grow");
            let mut bytes = &lane.hands.out[..];
            while let Some(head) = bytes.first_chunk::<HEADER_BYTES>() {
                let length = HEADER_BYTES + Header::decode(head).unwrap().length as usize;
                lane.sent.push_back(bytes[..length].to_vec());
                bytes = &bytes[length..];
            }
            lane.hands.out.clear();
            while let Some((slot, ok)) = self.lanes[l].hands.done.pop_front() {
                self.completed(l, slot, ok);
            }
        }
    }

    fn completed(&mut self, l: usize, slot: usize, ok: bool) {
        let (request, seed) = self.lanes[l].asked[slot].take().unwrap();
        for i in 0..request.pages {
            let index = request.first + i;
            match request.kind {
                Kind::Write if ok => {
                    self.expected[index as usize] = Some(seed);
                    self.unknown.remove(&index);
                }
                Kind::Write => drop(self.unknown.insert(index)),
                Kind::Discard => {
                    assert!(ok);
                    self.expected[index as usize] = None;
                    self.unknown.remove(&index);
                }
                Kind::Read => {
                    let range = request.first..request.first + request.pages;
                    if range.clone().any(|index| self.unknown.contains(&index)) {
                        continue;
                    }
                    assert!(ok, "read of {range:?} failed");
                    let got = &self.lanes[l].hands.data[slot][i as usize * PAGE_BYTES..][..PAGE_BYTES];
                    let want = self.expected[index as usize]
                        .map_or(vec![0; PAGE_BYTES], |seed| page_of(index, seed));
                    assert!(
                        got == want,
                        "page {index} is not what was written: {:?}",
                        self.shared.table.peek(index)
                    );
                }
            }
        }
    }

    fn connect(&mut self, l: usize) {
        let lane = &mut self.lanes[l];
        if !lane.connected {
            let session = Session {
                pool: 7,
                features: Features::ALL,
                max_batch: 64,
                max_in_flight: 3,
                window_bytes: 100_000,
            };
            lane.core.connected(session, self.now);
            lane.connected = true;
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write { lane, first, pages, seed } => {
                self.submit(lane, Request { kind: Kind::Write, first, pages }, seed);
            }
            Step::Read { lane, first, pages } => {
                self.submit(lane, Request { kind: Kind::Read, first, pages }, 0);
            }
            Step::Discard { lane, first, pages } => {
                self.submit(lane, Request { kind: Kind::Discard, first, pages }, 0);
            }
            Step::HostReads { lane, frames, refuse } => {
                let Lane { sent, answers, .. } = &mut self.lanes[lane];
                for _ in 0..frames {
                    let Some(frame) = sent.pop_front() else { break };
                    answers.push_back(self.store.serve(&frame, refuse));
                }
            }
            Step::Answers { lane, frames } => {
                for _ in 0..frames {
                    let Lane { core, hands, answers, .. } = &mut self.lanes[lane];
                    let Some(frame) = answers.pop_front() else { break };
                    let header = Header::decode(frame[..HEADER_BYTES].try_into().unwrap()).unwrap();
                    core.answered(hands, &header, &frame[HEADER_BYTES..]).unwrap();
                    self.settle();
                }
            }
            Step::File { lane, transfers, newest_first, ok } => {
                for _ in 0..transfers {
                    let Lane { core, hands, .. } = &mut self.lanes[lane];
                    let next =
                        if newest_first { hands.transfers.pop_back() } else { hands.transfers.pop_front() };
                    let Some(Transfer { slot, direction, at, pages, index }) = next else { break };
                    // Reads that fail are a test of their own.
                    let ok = ok || direction == Direction::Read;
                    for i in 0..if ok { pages } else { 0 } {
                        let memory = &mut hands.data[slot][(at + i) * PAGE_BYTES..][..PAGE_BYTES];
                        match direction {
                            Direction::Read => memory.copy_from_slice(&self.file[index as usize + i]),
                            Direction::Write => self.file[index as usize + i].copy_from_slice(memory),
                        }
                    }
                    core.file_done(hands, slot, at, pages, ok);
                    self.settle();
                }
            }
            Step::Break { lane, late } => {
                let Lane { core, hands, sent, answers, connected, .. } = &mut self.lanes[lane];
                if std::mem::take(connected) {
                    answers.clear();
                    let unread: Vec<_> = sent.drain(..).collect();
                    if late {
                        self.late.extend(unread);
                    }
                    core.disconnected(hands);
                    self.settle();
                }
            }
            Step::Connect { lane } => self.connect(lane),
            Step::HostReadsLate { at } => {
                if !self.late.is_empty() {
                    let frame = self.late.remove(at % self.late.len());
                    self.store.serve(&frame, 0);
                    self.was_late = true;
                }
            }
            Step::Reclaim { pages } => {
                self.shared.state.reclaim_left.store(pages, Ordering::Relaxed);
            }
            Step::Drain(on) => self.shared.state.draining.store(on, Ordering::Relaxed),
            Step::Pass { ms } => {
                self.now += Duration::from_millis(ms);
                for l in 0..LANES {
                    let Lane { core, hands, .. } = &mut self.lanes[l];
                    core.poll(hands, self.now);
                    self.settle();
                }
            }
        }
    }

    /// Let everything come to its end with a working host.
    fn quiesce(&mut self) {
        for _ in 0..2000 {
            for lane in 0..LANES {
                self.step(Step::Connect { lane });
                self.step(Step::HostReads { lane, frames: 8, refuse: 0 });
                self.step(Step::Answers { lane, frames: 8 });
                self.step(Step::File { lane, transfers: 8, newest_first: false, ok: true });
            }
            self.step(Step::Pass { ms: 10 });
            let tidy = !self.shared.state.sweep_wanted.load(Ordering::Relaxed)
                && self.shared.state.reclaim_left.load(Ordering::Relaxed) == 0;
            if tidy && self.lanes.iter().all(|lane| lane.core.is_idle() && lane.sent.is_empty()) {
                return;
            }
        }
        panic!("it never comes to rest");
    }

    fn check(&mut self) {
        self.quiesce();
        for first in (0..PAGES).step_by(MAX_PAGES) {
            self.step(Step::Read { lane: 0, first, pages: MAX_PAGES as u32 });
            self.quiesce();
        }
        let table = self.shared.table;
        for index in 0..PAGES {
            let entry = table.peek(index);
            assert!(!entry.is_held(), "page {index} is held for ever: {entry:?}");
            assert!(entry.place() != Place::Lost || self.unknown.contains(&index), "page {index} was lost");
            assert!(!entry.is_stale() || entry.place() == Place::Host, "page {index} stays stale: {entry:?}");
            if entry.place() == Place::Host && !entry.is_stale() {
                assert!(self.store.0.contains_key(&entry.key(index)));
            }
        }
        // A put that was given up may be read after another lane flushed its key; the orphans' sweep is for that.
        let hedged = self.shared.state.counters.hedged.load(Ordering::Relaxed) > 0;
        if !self.was_late && !hedged {
            let known: HashSet<Key> = (0..PAGES)
                .filter(|index| table.peek(*index).place() == Place::Host)
                .map(|index| table.peek(index).key(index))
                .collect();
            let stored: HashSet<Key> = self.store.0.keys().copied().collect();
            assert!(stored.is_subset(&known), "the host keeps pages that nobody knows of");
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    let lane = 0..LANES;
    let range =
        || (0..PAGES, 1..=MAX_PAGES as u32).prop_map(|(first, pages)| (first, pages.min(PAGES - first)));
    prop_oneof![
        8 => (lane.clone(), range(), any::<u32>())
            .prop_map(|(lane, (first, pages), seed)| Step::Write { lane, first, pages, seed }),
        5 => (lane.clone(), range()).prop_map(|(lane, (first, pages))| Step::Read { lane, first, pages }),
        2 => (lane.clone(), 0..PAGES, 1..PAGES)
            .prop_map(|(lane, first, pages)| Step::Discard { lane, first, pages: pages.min(PAGES - first) }),
        8 => (lane.clone(), 1..4_usize, prop_oneof![Just(0), Just(u32::MAX), any::<u32>()])
            .prop_map(|(lane, frames, refuse)| Step::HostReads { lane, frames, refuse }),
        8 => (lane.clone(), 1..4_usize).prop_map(|(lane, frames)| Step::Answers { lane, frames }),
        6 => (lane.clone(), 1..6_usize, any::<bool>(), prop::bool::weighted(0.97))
            .prop_map(|(lane, transfers, newest_first, ok)| Step::File { lane, transfers, newest_first, ok }),
        1 => (lane.clone(), any::<bool>()).prop_map(|(lane, late)| Step::Break { lane, late }),
        2 => lane.prop_map(|lane| Step::Connect { lane }),
        1 => any::<usize>().prop_map(|at| Step::HostReadsLate { at }),
        1 => (0..64_u64).prop_map(|pages| Step::Reclaim { pages }),
        1 => any::<bool>().prop_map(Step::Drain),
        4 => prop_oneof![8 => 1..20_u64, 1 => Just(11_000_u64)].prop_map(|ms| Step::Pass { ms }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_pages_read_as_they_were_written(
        steps in prop::collection::vec(step(), 1..160),
        compress in any::<bool>(),
    ) {
        let mut world = World::new(compress);
        for step in steps {
            world.step(step);
        }
        world.check();
    }
}

#[test]
fn refused_pages_and_only_they_go_to_the_file() {
    let mut world = World::new(false);
    world.step(Step::Connect { lane: 0 });
    world.step(Step::Write { lane: 0, first: 0, pages: 8, seed: 1 });
    world.step(Step::HostReads { lane: 0, frames: 1, refuse: 0b1010_0101 });
    world.step(Step::Answers { lane: 0, frames: 1 });
    let runs: Vec<_> = world.lanes[0].hands.transfers.iter().map(|t| (t.index, t.pages)).collect();
    assert_eq!(runs, [(0, 1), (2, 1), (5, 1), (7, 1)]);
    world.check();
    assert_eq!(world.shared.table.census(), ([u64::from(PAGES) - 8, 4, 4, 0], 0));
}

#[test]
fn a_put_that_arrives_late_is_never_read() {
    let mut world = World::new(false);
    world.step(Step::Connect { lane: 0 });
    world.step(Step::Write { lane: 0, first: 3, pages: 1, seed: 1 });
    world.step(Step::Break { lane: 0, late: true });
    world.quiesce();
    world.step(Step::Write { lane: 0, first: 3, pages: 1, seed: 2 });
    world.quiesce();
    assert_eq!(world.shared.table.peek(3).place(), Place::Host);
    world.step(Step::HostReadsLate { at: 0 });
    world.check();
    // What the late put left behind is found and flushed.
    assert_eq!(world.store.0.len(), 2);
    world.step(Step::Pass { ms: 11_000 });
    world.check();
    assert_eq!(world.store.0.len(), 1);
}

#[test]
fn a_lost_connection_costs_no_page_and_no_wait_for_writes() {
    let mut world = World::new(false);
    world.step(Step::Connect { lane: 0 });
    world.step(Step::Write { lane: 0, first: 0, pages: 16, seed: 1 });
    world.step(Step::HostReads { lane: 0, frames: 1, refuse: 0 });
    world.step(Step::Answers { lane: 0, frames: 1 });
    world.step(Step::Read { lane: 0, first: 0, pages: 2 });
    world.step(Step::Break { lane: 0, late: false });
    // A write goes to the file at once; the read waits.
    world.step(Step::Write { lane: 0, first: 4, pages: 2, seed: 2 });
    world.step(Step::File { lane: 0, transfers: 9, newest_first: false, ok: true });
    assert_eq!(world.lanes[0].asked.iter().flatten().count(), 1);
    world.step(Step::Pass { ms: 1000 });
    assert_eq!(world.lanes[0].asked.iter().flatten().count(), 1);
    world.check();
    // The host's copies of the overwritten pages were flushed.
    assert_eq!(world.store.0.len(), 14);
}

#[test]
fn a_host_that_does_not_answer_is_not_waited_for() {
    let mut world = World::new(false);
    world.step(Step::Connect { lane: 0 });
    world.step(Step::Write { lane: 0, first: 0, pages: 4, seed: 1 });
    world.step(Step::Pass { ms: 50 });
    assert!(world.lanes[0].hands.transfers.is_empty());
    world.step(Step::Pass { ms: 50 });
    world.step(Step::File { lane: 0, transfers: 1, newest_first: false, ok: true });
    assert_eq!(world.lanes[0].asked.iter().flatten().count(), 0, "the write is done without the host");
    // Until the host answers, nothing more is put.
    let frames = world.lanes[0].sent.len();
    world.step(Step::Write { lane: 0, first: 8, pages: 4, seed: 2 });
    assert_eq!((world.lanes[0].sent.len(), world.lanes[0].hands.transfers.len()), (frames, 1));
    // Its late answer is taken for what it is, and what it stored is flushed.
    world.step(Step::HostReads { lane: 0, frames: 1, refuse: 0 });
    assert_eq!(world.store.0.len(), 4);
    world.check();
    assert_eq!(world.store.0.len(), 0);
    assert_eq!(world.shared.state.counters.hedged.load(Ordering::Relaxed), 4);
    world.step(Step::Write { lane: 0, first: 0, pages: 4, seed: 3 });
    world.check();
    assert_eq!(world.shared.table.peek(0).place(), Place::Host);
}

#[test]
fn pages_the_host_lost_are_errors_not_wrong_data() {
    let mut world = World::new(false);
    world.step(Step::Connect { lane: 0 });
    world.step(Step::Write { lane: 0, first: 0, pages: 3, seed: 1 });
    world.quiesce();
    let (damaged, lost) = (world.shared.table.peek(0).key(0), world.shared.table.peek(1).key(1));
    world.store.0.insert(damaged, page_of(0, 9));
    world.store.0.remove(&lost);
    for index in 0..2 {
        world.unknown.insert(index);
        world.step(Step::Read { lane: 0, first: index, pages: 1 });
        world.quiesce();
        assert_eq!(world.shared.table.peek(index).place(), Place::Lost);
    }
    assert_eq!(world.shared.state.counters.lost.load(Ordering::Relaxed), 2);
    assert_eq!(world.shared.state.counters.io_errors.load(Ordering::Relaxed), 2);
    // Written again, they are as good as new.
    world.step(Step::Write { lane: 0, first: 0, pages: 3, seed: 5 });
    world.check();
}

#[test]
fn reclaim_takes_cold_pages_first_and_empties_the_host() {
    let mut world = World::new(false);
    world.step(Step::Connect { lane: 0 });
    for first in (0..64).step_by(MAX_PAGES) {
        world.step(Step::Write { lane: 0, first, pages: MAX_PAGES as u32, seed: 1 });
        world.quiesce();
    }
    // A minute later only the first sixteen pages are still in use.
    world.step(Step::Pass { ms: 60_000 });
    world.step(Step::Read { lane: 0, first: 0, pages: MAX_PAGES as u32 });
    world.quiesce();
    world.step(Step::Reclaim { pages: 40 });
    world.quiesce();
    let (places, stale) = world.shared.table.census();
    assert_eq!((places[Place::Host as usize], places[Place::File as usize], stale), (24, 40, 0));
    assert!((0..16).all(|index| world.shared.table.peek(index).place() == Place::Host));
    world.step(Step::Reclaim { pages: 1000 });
    world.check();
    assert_eq!(world.store.0.len(), 0);
    assert_eq!(world.shared.table.census().0[Place::File as usize], 64);
}

#[test]
fn reclaim_keeps_its_rate() {
    let mut world = World::new(false);
    world.step(Step::Connect { lane: 0 });
    for first in (0..PAGES).step_by(MAX_PAGES) {
        world.step(Step::Write { lane: 0, first, pages: MAX_PAGES as u32, seed: 1 });
        world.quiesce();
    }
    world.step(Step::Pass { ms: 1 });
    world.step(Step::Reclaim { pages: 96 });
    for _ in 0..10 {
        world.step(Step::Pass { ms: 1 });
        world.step(Step::HostReads { lane: 0, frames: 9, refuse: 0 });
        world.step(Step::Answers { lane: 0, frames: 9 });
        world.step(Step::File { lane: 0, transfers: 9, newest_first: false, ok: true });
    }
    // 2000 pages a second, and what was saved up before: two batches.
    let moved = world.shared.table.census().0[Place::File as usize];
    assert!((16..=20 + 32).contains(&moved), "{moved} pages in 10 ms");
    world.check();
}

#[test]
fn nonsense_from_the_host_is_an_error_and_a_broken_connection() {
    let mut world = World::new(false);
    world.step(Step::Connect { lane: 0 });
    world.step(Step::Write { lane: 0, first: 0, pages: 2, seed: 1 });
    let Lane { core, hands, .. } = &mut world.lanes[0];
    let unasked = Header { tag: 3, ..Header::request(Op::Get, 0).answer() };
    assert!(matches!(core.answered(hands, &unasked, &[]), Err(AnswerError::Unasked { .. })));
    let tag = 1 << 16; // the first frame of slot 0
    let failed = Header { status: 8, ..Header::request(Op::Put, tag).answer() };
    assert_eq!(core.answered(hands, &failed, b"sorry"), Err(AnswerError::Failed { op: Op::Put, status: 8 }));
    let short = Header { count: 1, length: 1, ..Header::request(Op::Put, tag).answer() };
    assert!(core.answered(hands, &short, &[0]).is_err());
    world.step(Step::Break { lane: 0, late: false });
    world.check();
    assert_eq!(world.expected[0], Some(1));
}

#[test]
fn after_a_crash_the_kernels_repeated_write_wins() {
    let mut world = World::new(false);
    world.step(Step::Connect { lane: 0 });
    world.step(Step::Write { lane: 0, first: 0, pages: 4, seed: 1 });
    world.quiesce();
    world.step(Step::Write { lane: 0, first: 2, pages: 4, seed: 2 });
    world.step(Step::Break { lane: 1, late: false });
    let unread: Vec<_> = world.lanes[0].sent.drain(..).collect();
    // The process dies with a put on its way; another takes over table, file and device.
    let shared = world.shared;
    assert_eq!(shared.table.release_all(), 4);
    shared.next_epoch();
    shared.state.sweep_wanted.store(true, Ordering::Relaxed);
    let mut next = World::new(false);
    let options = Options { compress: false, accept_lz4: true, reclaim_pages_per_s: 1000, hedge: HEDGE };
    for (number, lane) in next.lanes.iter_mut().enumerate() {
        lane.core = Core::new(shared, number, SLOTS, options, next.now);
    }
    next.shared = shared;
    next.store = std::mem::take(&mut world.store);
    next.expected = world.expected;
    next.late = unread;
    next.step(Step::Connect { lane: 0 });
    next.step(Step::Write { lane: 0, first: 2, pages: 4, seed: 2 });
    next.quiesce();
    next.step(Step::HostReadsLate { at: 0 });
    next.check();
}
