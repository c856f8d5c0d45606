//! A session against arbitrary bytes, in pieces of arbitrary sizes. Bytes that start no frame are given a header, so
//! that the fuzzer gets past the magic.
#![no_main]

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tmem_host::listener::SocketOptions;
use tmem_host::{Engine, Limits, Session, State, Vm, VmSpec, Wake, Waker};
use tmem_store::{Store, StoreConfig, VmLimits};
use tmem_wire::{Header, HelloRequest, Op, Role};

struct Nobody;

impl Waker for Nobody {
    fn wake(&self, _: Wake) {}
}

static ENGINE: OnceLock<(Arc<Engine>, Arc<Vm>)> = OnceLock::new();

fn engine() -> (Arc<Engine>, Arc<Vm>) {
    let (store, _) = Store::open(&StoreConfig::memfd(16 << 20)).expect("a store");
    let sockets = SocketOptions { mode: 0o600, gid: None };
    let engine = Engine::new(Arc::new(store), Limits::default(), sockets).expect("an engine");
    let limits = VmLimits { quota_bytes: 8 << 20, min_bytes: 0, weight: 100, persistent_max_bytes: 8 << 20 };
    let vm = engine.add_vm("fuzz", &VmSpec::default(), &limits).expect("a VM");
    (engine, vm)
}

fuzz_target!(|bytes: &[u8]| {
    let (engine, vm) = ENGINE.get_or_init(engine);
    let Some(mut session) = Session::new(engine, vm, "fuzz".into(), Box::new(Nobody)) else { return };
    let mut input = Vec::new();
    let hello = HelloRequest::new(Role::Control, [1; 16]);
    Header::request(Op::Hello, 1).write_frame(&hello.encode(), &mut input);
    let mut rest = bytes;
    while let Some(([op, count, pool, tail_bytes], tail)) = rest.split_first_chunk::<4>() {
        let (body, tail) = tail.split_at(usize::from(*tail_bytes).min(tail.len()));
        rest = tail;
        let op = Op::ALL[usize::from(*op) % Op::ALL.len()];
        let header = Header { count: (*count).into(), pool: (*pool).into(), ..Header::request(op, 7) };
        header.write_frame(body, &mut input);
    }
    let mut out = Vec::new();
    let mut at = 0;
    let mut end = 0;
    loop {
        end = (end + 61).min(input.len());
        match session.feed(&input[at..end], &mut out) {
            Ok(progress) => {
                at += progress.consumed;
                match progress.state {
                    State::Closed => break,
                    State::NeedMemory if !session.grow(Duration::ZERO) => break,
                    _ => {}
                }
            }
            Err(_) => break,
        }
        out.clear();
        if end == input.len() {
            break;
        }
    }
});
