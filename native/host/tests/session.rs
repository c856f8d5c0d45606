//! The session's state machine, without any I/O: what a transport may rely on.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test fails by panicking

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use tmem_host::limits::{LARGE_BUFFERS_BYTES, OUT_HIGH_WATER};
use tmem_host::listener::SocketOptions;
use tmem_host::{Engine, Limits, Session, State, VmSpec, Wake, Waker};
use tmem_store::{Store, StoreConfig, VmLimits};
use tmem_wire::pages::{write_keys, PutWriter};
use tmem_wire::{
    Encoding, ErrorCode, Header, HelloRequest, Key, Op, PoolCreate, PoolKind, Role, HEADER_BYTES, MAX_BATCH,
    PAGE_BYTES,
};

struct Silent;

impl Waker for Silent {
    fn wake(&self, _: Wake) {}
}

#[derive(Default)]
struct Counters {
    notices: AtomicU32,
    ends: AtomicU32,
}

#[derive(Default, Clone)]
struct Counting(Arc<Counters>);

impl Waker for Counting {
    fn wake(&self, why: Wake) {
        let counter = if why == Wake::Notices { &self.0.notices } else { &self.0.ends };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

impl Counting {
    fn notices(&self) -> u32 {
        self.0.notices.load(Ordering::Relaxed)
    }

    fn ends(&self) -> u32 {
        self.0.ends.load(Ordering::Relaxed)
    }
}

fn engine(limits: Limits) -> Arc<Engine> {
    let (store, _) = Store::open(&StoreConfig::memfd(16 << 20)).unwrap();
    let engine = Engine::new(Arc::new(store), limits, SocketOptions { mode: 0o600, gid: None }).unwrap();
    engine
        .add_vm("a", &VmSpec::default(), &VmLimits { quota_bytes: 16 << 20, ..VmLimits::default() })
        .unwrap();
    engine
}

fn session(engine: &Arc<Engine>) -> Session {
    Session::new(engine, &engine.vm("a").unwrap(), "test".to_owned(), Box::new(Silent)).expect("room for it")
}

fn hello(role: Role, boot: u8) -> Vec<u8> {
    let request = HelloRequest::new(role, [boot; 16]);
    let mut out = Vec::new();
    Header::request(Op::Hello, 0).write_frame(&request.encode(), &mut out);
    out
}

fn create(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let body = PoolCreate::private(PoolKind::Persistent, name).encode();
    Header::request(Op::PoolCreate, 1).write_frame(&body, &mut out);
    out
}

fn keys(count: usize) -> Vec<Key> {
    (0..count as u32).map(|index| Key { object: [3; 16], index }).collect()
}

fn put(pool: u32, count: usize) -> Vec<u8> {
    let mut out = Vec::new();
    let mut writer = PutWriter::begin(&mut out, 2, pool, count as u16, false);
    for key in keys(count) {
        let mut page = [key.index as u8; PAGE_BYTES];
        page[..4].copy_from_slice(b"tmem");
        writer.page(&key, Encoding::Raw, &page, 0);
    }
    writer.end();
    out
}

fn get(pool: u32, count: usize) -> Vec<u8> {
    let mut out = Vec::new();
    write_keys(Op::Get, 3, pool, false, &keys(count), &mut out);
    out
}

/// Split into frames.
fn frames(mut bytes: &[u8]) -> Vec<(Header, &[u8])> {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let header = Header::decode(bytes.first_chunk().unwrap()).unwrap();
        let (frame, rest) = bytes.split_at(HEADER_BYTES + header.length as usize);
        frames.push((header, &frame[HEADER_BYTES..]));
        bytes = rest;
    }
    frames
}

/// Be a transport that gets its input in pieces of the given sizes, and return all that is sent.
fn drive(session: &mut Session, input: &[u8], mut piece: impl FnMut() -> usize) -> (Vec<u8>, bool) {
    let (mut sent, mut held, mut rest) = (Vec::new(), Vec::new(), input);
    loop {
        let mut out = Vec::new();
        let fed = session.feed(&held, &mut out);
        assert!(out.len() < OUT_HIGH_WATER + (MAX_BATCH + 1) * (PAGE_BYTES + 40), "output is bounded");
        sent.extend_from_slice(&out);
        let Ok(progress) = fed else { return (sent, false) };
        held.drain(..progress.consumed);
        match progress.state {
            State::OutputFull => {}
            State::Closed => return (sent, false),
            State::NeedMemory => assert!(session.grow(Duration::ZERO)),
            State::Throttled(wait) => std::thread::sleep(wait),
            State::NeedInput(bytes) => {
                assert!(bytes > held.len(), "it asks for more than it has");
                if rest.is_empty() {
                    return (sent, true);
                }
                let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
                held.extend_from_slice(now);
                rest = later;
            }
        }
    }
}

fn conversation() -> Vec<u8> {
    let mut input = [hello(Role::Swap, 1), create("p")].concat();
    // The first pool of a fresh store; its number comes from a session of its own in `pool_number`.
    let pool = pool_number();
    input.extend(put(pool, 3));
    input.extend(get(pool, 5));
    Header::request(Op::Stats, 7).write_frame(&[], &mut input);
    input.extend(put(pool, MAX_BATCH));
    input.extend(get(pool, MAX_BATCH));
    Header { pool, ..Header::request(Op::FlushPool, 8) }.write_frame(&[], &mut input);
    input.extend(get(pool, 2));
    Header { pool: pool + 1, ..Header::request(Op::FlushPool, 9) }.write_frame(&[], &mut input);
    input
}

fn pool_number() -> u32 {
    let engine = engine(Limits::default());
    let mut session = session(&engine);
    let (sent, open) = drive(&mut session, &[hello(Role::Swap, 1), create("p")].concat(), || usize::MAX);
    assert!(open);
    frames(&sent)[1].0.pool
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However the bytes arrive, the answers are the same.
    #[test]
    fn chunks_do_not_matter(sizes in proptest::collection::vec(1usize..70_000, 1..40)) {
        let input = conversation();
        let (whole, open) = drive(&mut session(&engine(Limits::default())), &input, || usize::MAX);
        prop_assert!(open);
        let mut sizes = sizes.into_iter().cycle();
        let (pieces, open) =
            drive(&mut session(&engine(Limits::default())), &input, || sizes.next().unwrap_or(1));
        prop_assert!(open);
        prop_assert_eq!(whole, pieces);
    }

    /// Whatever a guest sends, the session answers in whole frames and ends or waits; it never panics.
    #[test]
    fn any_bytes_are_survived(
        noise in proptest::collection::vec(any::<u8>(), 0..300),
        cut in 0usize..2_000_000,
        flips in proptest::collection::vec((0usize..2_000_000, any::<u8>()), 0..4),
    ) {
        let mut input = conversation();
        let length = input.len();
        for (at, value) in flips {
            input[at % length] = value;
        }
        input.truncate(cut % (length + 1));
        input.extend(noise);
        let (sent, _) = drive(&mut session(&engine(Limits::default())), &input, || usize::MAX);
        frames(&sent);
    }
}

#[test]
fn the_conversation_is_answered_as_specified() {
    let engine = engine(Limits::default());
    let (sent, open) = drive(&mut session(&engine), &conversation(), || usize::MAX);
    assert!(open);
    let answers = frames(&sent);
    let ops: Vec<_> = answers.iter().map(|(header, _)| (header.op, header.status)).collect();
    let no_such_pool = ErrorCode::NoSuchPool as u16;
    assert_eq!(
        ops,
        [
            (Op::Hello, 0),
            (Op::PoolCreate, 0),
            (Op::Put, 0),
            (Op::Get, 0),
            (Op::Stats, 0),
            (Op::Put, 0),
            (Op::Get, 0),
            (Op::FlushPool, 0),
            (Op::Get, 0),
            (Op::FlushPool, no_such_pool),
        ]
    );
    assert!(answers.iter().all(|(header, _)| header.is_answer()));
}

#[test]
fn a_frame_that_is_too_large_for_small_buffers_needs_a_permit() {
    let limits = Limits { in_flight_bytes: LARGE_BUFFERS_BYTES, ..Limits::default() };
    let engine = engine(limits);
    let (mut first, mut second) = (session(&engine), session(&engine));
    for session in [&mut first, &mut second] {
        session.feed(&hello(Role::Swap, 1), &mut Vec::new()).unwrap();
        let input = put(1, MAX_BATCH);
        // By the header alone.
        let progress = session.feed(&input[..HEADER_BYTES], &mut Vec::new()).unwrap();
        assert_eq!((progress.consumed, progress.state), (0, State::NeedMemory));
    }
    assert!(first.grow(Duration::ZERO));
    assert!(!second.grow(Duration::from_millis(10)), "the VM's share is used up");
    first.shrink();
    assert!(second.grow(Duration::ZERO));
}

#[test]
fn a_session_before_hello_gets_no_memory() {
    let engine = engine(Limits::default());
    let mut session = session(&engine);
    assert!(session.feed(&put(1, MAX_BATCH)[..HEADER_BYTES], &mut Vec::new()).is_err());
}

#[test]
fn output_is_held_back_until_it_is_sent() {
    let engine = engine(Limits::default());
    let mut session = session(&engine);
    let mut out = Vec::new();
    session.feed(&[hello(Role::Swap, 1), create("p")].concat(), &mut out).unwrap();
    let pool = frames(&out)[1].0.pool;
    assert!(session.grow(Duration::ZERO));
    session.feed(&put(pool, MAX_BATCH), &mut out).unwrap();
    out.clear();
    let input = [get(pool, 40), get(pool, 40), get(pool, 40)].concat();
    let progress = session.feed(&input, &mut out).unwrap();
    assert_eq!(progress.state, State::OutputFull);
    assert!(progress.consumed < input.len());
    let again = session.feed(&input[progress.consumed..], &mut out).unwrap();
    assert_eq!((again.consumed, again.state), (0, State::OutputFull), "nothing more while it waits");
    out.clear();
    let rest = session.feed(&input[progress.consumed..], &mut out).unwrap();
    assert_eq!(progress.consumed + rest.consumed, input.len());
}

#[test]
fn control_sessions_are_woken_for_notices_and_others_are_not() {
    let engine = engine(Limits::default());
    let vm = engine.vm("a").unwrap();
    let (woken, ignored) = (Counting::default(), Counting::default());
    let mut control = Session::new(&engine, &vm, String::new(), Box::new(woken.clone())).unwrap();
    let mut swap = Session::new(&engine, &vm, String::new(), Box::new(ignored.clone())).unwrap();
    control.feed(&hello(Role::Control, 1), &mut Vec::new()).unwrap();
    swap.feed(&hello(Role::Swap, 1), &mut Vec::new()).unwrap();
    let limits = VmLimits { quota_bytes: 1 << 20, ..VmLimits::default() };
    engine.set_limits("a", &limits).unwrap();
    engine.set_limits("a", &limits).unwrap();
    assert_eq!(woken.notices(), 1, "an unchanged quota is no news");
    engine.set_limits("a", &VmLimits { quota_bytes: 2 << 20, ..limits }).unwrap();
    engine.set_frozen("a", true).unwrap();
    assert_eq!(ignored.notices(), 0);
    let mut out = Vec::new();
    control.feed(&[], &mut out).unwrap();
    let told: Vec<_> = frames(&out).iter().map(|(header, body)| (header.op, body[..8].to_vec())).collect();
    // The two changes of the quota are merged.
    let quota = (2u64 << 20).to_le_bytes().to_vec();
    assert_eq!(told, [(Op::Quota, quota), (Op::Frozen, 1u64.to_le_bytes().to_vec())]);
}

#[test]
fn draining_answers_what_has_arrived_and_closes() {
    let engine = engine(Limits::default());
    let woken = Counting::default();
    let vm = engine.vm("a").unwrap();
    let mut session = Session::new(&engine, &vm, String::new(), Box::new(woken.clone())).unwrap();
    session.feed(&hello(Role::Control, 1), &mut Vec::new()).unwrap();
    let draining = std::thread::spawn({
        let engine = engine.clone();
        move || engine.drain(Duration::from_secs(10))
    });
    while woken.ends() == 0 {
        std::thread::yield_now();
    }
    let mut input = Vec::new();
    Header::request(Op::Ping, 1).write_frame(&[], &mut input);
    Header::request(Op::Ping, 2).write_frame(&[], &mut input);
    input.truncate(HEADER_BYTES + 5);
    let mut out = Vec::new();
    let progress = session.feed(&input, &mut out).unwrap();
    assert_eq!((progress.consumed, progress.state), (HEADER_BYTES, State::Closed));
    let ops: Vec<_> = frames(&out).iter().map(|(header, _)| header.op).collect();
    assert_eq!(ops, [Op::Shutdown, Op::Ping]);
    drop(session);
    assert!(draining.join().unwrap(), "all sessions were done in time");
    assert!(Session::new(&engine, &vm, String::new(), Box::new(Silent)).is_none());
}

#[test]
fn a_new_boot_closes_the_old_one_s_sessions_and_its_pools_stay_away() {
    let engine = engine(Limits::default());
    let (mut old, mut new) = (session(&engine), session(&engine));
    old.feed(&hello(Role::Swap, 1), &mut Vec::new()).unwrap();
    new.feed(&hello(Role::Swap, 2), &mut Vec::new()).unwrap();
    let progress = old.feed(&create("p"), &mut Vec::new()).unwrap();
    assert_eq!((progress.consumed, progress.state), (0, State::Closed));
    assert!(engine.store().pool_stats(engine.vm("a").unwrap().id).is_empty());
}

#[test]
fn a_removed_vm_s_sessions_close() {
    let engine = engine(Limits::default());
    let mut session = session(&engine);
    session.feed(&hello(Role::Swap, 1), &mut Vec::new()).unwrap();
    let removing = std::thread::spawn({
        let engine = engine.clone();
        move || engine.remove_vm("a").unwrap()
    });
    while session.feed(&[], &mut Vec::new()).unwrap().state != State::Closed {
        std::thread::yield_now();
    }
    drop(session);
    assert_eq!(removing.join().unwrap(), 0);
    assert_eq!(engine.connections(), 0);
}
