//! The device against a driver: packets in chains of every shape, credit, closing, resets, hostile rings.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod driver;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use driver::{packet, Driver, GUEST_CID, RING_ENTRIES, USER_ADDRESS};
use tmem_host::vhost_user::counters::Counters;
use tmem_host::vhost_user::device::Device;
use tmem_host::vhost_user::front::{Region, FROM_GUEST, TO_GUEST};
use tmem_host::vhost_user::packet::{Header, Key, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use tmem_host::vhost_user::peer::{Local, Peer, Service, Step, Stream};
use tmem_host::vhost_user::streams::{Opened, Opener, Refused, Streams};
use vm_memory::{Bytes, GuestAddress};

/// Port of a service that answers every eight bytes with the same eight.
const ECHO: u32 = 7;
/// Ports from here on lead to sockets, whose other ends the test holds.
const SOCKETS: u32 = 1000;
const BUF_ALLOC: u32 = 128 * 1024;

struct Echo;

impl Service for Echo {
    fn feed(&mut self, input: &[u8], _fresh: usize, out: &mut Vec<u8>) -> Step {
        let whole = input.len() / 8 * 8;
        let whole = whole.min((256 * 1024usize).saturating_sub(out.len()) / 8 * 8);
        out.extend_from_slice(&input[..whole]);
        Step { consumed: whole, ..Step::default() }
    }

    fn max_input_bytes(&self) -> usize {
        64 * 1024
    }
}

#[derive(Default)]
struct Doors {
    sockets: HashMap<u64, (u32, UnixStream)>,
}

impl Opener for Doors {
    fn open(&mut self, port: u32, token: u64) -> Result<Opened, Refused> {
        let peer: Box<dyn Peer> = match port {
            ECHO => Box::new(Local::new(Box::new(Echo))),
            SOCKETS.. => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                theirs.set_nonblocking(true).unwrap();
                self.sockets.insert(token, (port, theirs));
                Box::new(Stream::new(ours).unwrap())
            }
            _ => return Err(Refused("nobody listens".into())),
        };
        Ok(Opened { peer, buf_alloc: BUF_ALLOC })
    }
}

struct Bench {
    driver: Driver,
    device: Device,
    doors: Doors,
    counters: Arc<Counters>,
    now: Instant,
}

fn key(host_port: u32, guest_port: u32) -> Key {
    Key { host_port, guest_port }
}

impl Bench {
    fn new() -> Bench {
        let driver = Driver::new(true);
        let counters = Arc::new(Counters::default());
        let streams = Streams::new(GUEST_CID, 64, counters.clone());
        let device = Device::new("test", streams, counters.clone());
        let mut bench = Bench { driver, device, doors: Doors::default(), counters, now: Instant::now() };
        bench.start(0);
        bench.driver.post(RING_ENTRIES as usize - 1);
        bench
    }

    /// What a front end tells when the driver is ready.
    fn start(&mut self, base: u16) {
        let file = OwnedFd::from(self.driver.file.try_clone().unwrap());
        let front = &mut self.device.front;
        front.features = 1 << 29 | 1 << 32;
        front.regions = vec![Region {
            guest_address: 0,
            size: driver::MEMORY_BYTES as u64,
            user_address: USER_ADDRESS,
            offset: 0,
            file,
        }];
        self.device.map_memory().unwrap();
        for (index, ring) in [(TO_GUEST, &self.driver.to_guest), (FROM_GUEST, &self.driver.from_guest)] {
            let vring = &mut self.device.front.vrings[index];
            vring.size = ring.layout.size;
            vring.base = base;
            vring.descriptors = USER_ADDRESS + ring.layout.descriptors;
            vring.avail = USER_ADDRESS + ring.layout.avail;
            vring.used = USER_ADDRESS + ring.layout.used;
            vring.kick = Some(eventfd());
        }
        self.device.update_rings();
    }

    /// What a front end does when the driver resets or the VM pauses.
    fn stop(&mut self) {
        self.device.sync_bases();
        for vring in &mut self.device.front.vrings {
            vring.kick = None;
        }
        self.device.update_rings();
    }

    fn poll(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        for _ in 0..1000 {
            let moved = self.device.serve(&mut self.doors, self.now);
            let received = self.driver.receive();
            if !moved && received.is_empty() {
                return packets;
            }
            packets.extend(received);
        }
        panic!("the device never comes to rest");
    }

    fn open(&mut self, key: Key) {
        self.driver.send(&packet(key, Op::Request, 0), &[]);
        let got = self.poll();
        assert_eq!(ops(&got), [Op::Response], "{got:?}");
    }

    fn socket(&mut self, port: u32) -> (u64, &mut UnixStream) {
        let (token, (_, socket)) = self.doors.sockets.iter_mut().find(|(_, (p, _))| *p == port).unwrap();
        (*token, socket)
    }

    /// Tell the device that a socket is ready, as epoll would.
    fn ready(&mut self, token: u64) {
        self.device.streams.ready(token, true, true, false, self.now);
    }

    fn counter(&self, name: &str) -> u64 {
        self.counters.snapshot().list().into_iter().find(|(n, _)| *n == name).unwrap().1
    }
}

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap()
}

fn ops(packets: &[(Header, Vec<u8>)]) -> Vec<Op> {
    packets.iter().map(|(header, _)| header.operation().unwrap()).collect()
}

fn data(packets: &[(Header, Vec<u8>)]) -> Vec<u8> {
    packets.iter().flat_map(|(_, data)| data.clone()).collect()
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 % 251) as u8).collect()
}

#[test]
fn a_service_answers() {
    let mut bench = Bench::new();
    let stream = key(ECHO, 50);
    bench.open(stream);
    bench.driver.send(&packet(stream, Op::Data, 16), &pattern(16));
    let got = bench.poll();
    assert_eq!((ops(&got), data(&got)), (vec![Op::Data], pattern(16)));
    assert_eq!(got[0].0.fwd_cnt.get(), 16, "what was consumed is credited at once");
}

#[test]
fn what_the_guest_sent_is_handed_back_together_and_before_long() {
    let mut bench = Bench::new();
    let stream = key(ECHO, 50);
    bench.open(stream);
    let used = |bench: &Bench| bench.driver.from_guest.used_index(&bench.driver.memory);
    let start = used(&bench);
    for _ in 0..3 {
        bench.driver.send(&packet(stream, Op::Data, 8), &pattern(8));
        assert_eq!(data(&bench.poll()), pattern(8), "the answer does not wait");
    }
    assert_eq!(used(&bench), start, "three packets are not worth an interrupt");
    let due = bench.device.deadline().expect("they are not forgotten");
    bench.now = due;
    bench.poll();
    assert_eq!(used(&bench), start + 3);
    bench.now = bench.device.deadline().expect("a second look at what the driver wants");
    bench.poll();
    assert_eq!(bench.device.deadline(), None);
    for _ in 0..40 {
        bench.driver.send(&packet(stream, Op::Data, 8), &pattern(8));
        bench.poll();
    }
    assert!(used(&bench) >= start + 3 + 32, "many are worth one at once");
    bench.driver.send(&packet(stream, Op::Shutdown, 0), &[]);
    bench.poll();
    assert_eq!(used(&bench), start + 44, "what must not be taken twice is handed back at once");
    bench.driver.send(&packet(key(ECHO, 51), Op::Request, 0), &[]);
    bench.driver.send(&packet(key(ECHO, 51), Op::Data, 8), &pattern(8));
    bench.poll();
    bench.stop();
    assert_eq!(used(&bench), start + 46, "nothing is held over a pause");
}

/// A driver whose wish for an interrupt is seen only after the entry that it is for: an emulated one without barriers.
#[test]
fn a_wish_for_an_interrupt_that_is_seen_late_is_heard() {
    let mut bench = Bench::new();
    bench.device.front.vrings[TO_GUEST].call = Some(eventfd());
    let stream = key(ECHO, 50);
    bench.open(stream);
    bench.now += Duration::from_secs(1);
    bench.poll();
    let next = bench.driver.to_guest.used_index(&bench.driver.memory);
    bench.driver.to_guest.want_interrupt(&bench.driver.memory, next.wrapping_sub(100));
    bench.driver.send(&packet(stream, Op::Data, 8), &pattern(8));
    bench.device.serve(&mut bench.doors, bench.now);
    let calls = bench.counter("calls");
    bench.driver.to_guest.want_interrupt(&bench.driver.memory, next);
    for expected in [calls + 1, calls + 1] {
        bench.now += Duration::from_secs(1);
        bench.device.serve(&mut bench.doors, bench.now);
        assert_eq!(bench.counter("calls"), expected, "once, and only once");
    }
}

#[test]
fn nothing_is_due_once_the_front_end_is_gone() {
    let mut bench = Bench::new();
    bench.open(key(ECHO, 50));
    assert!(bench.device.deadline().is_some());
    bench.device.disconnect();
    assert_eq!(bench.device.deadline(), None, "the thread would never sleep");
}

#[test]
fn packets_may_be_cut_anywhere() {
    let mut bench = Bench::new();
    let stream = key(ECHO, 50);
    bench.open(stream);
    let shapes: &[(usize, &[usize])] = &[
        (8, &[44]),
        (8, &[10, 34]),
        (8, &[1, 1, 1, 41, 3]),
        (4096, &[44, 4096 - 100]),
        (40_000, &[44]),
        (40_000, &[44, 4096, 4096, 4096, 4096, 4096, 4096, 4096, 4096]),
        (65_536, &[]),
        (65_536, &[20, 24, 1, 65_000]),
        (100_000, &[44, 4096, 32_768, 60_000]),
    ];
    let mut fwd_cnt = 0;
    for (bytes, cuts) in shapes {
        let bytes = bytes / 8 * 8;
        let header = Header { fwd_cnt: (fwd_cnt as u32).into(), ..packet(stream, Op::Data, bytes) };
        bench.driver.send_cut(&header, &pattern(bytes), cuts);
        let got = bench.poll();
        assert_eq!(data(&got), pattern(bytes), "{bytes} bytes cut at {cuts:?}");
        fwd_cnt += bytes;
    }
    assert_eq!(bench.counter("bad_chains"), 0);
}

#[test]
fn room_for_packets_may_be_cut_anywhere() {
    let mut bench = Bench::new();
    // Use up the ordinary buffers first.
    let stream = key(ECHO, 50);
    bench.driver = Driver::new(true);
    bench.device.reset();
    bench.start(0);
    for sizes in [&[10, 34, 7, 4096][..], &[44, 100], &[1; 60], &[4096, 4096], &[45]] {
        bench.driver.to_guest.add(&bench.driver.memory, sizes, true);
    }
    bench.open(stream);
    bench.driver.send(&packet(stream, Op::Data, 20_000), &pattern(20_000));
    let got = bench.poll();
    assert_eq!(data(&got), pattern(20_000));
}

#[test]
fn a_socket_carries_both_ways_and_more_than_it_holds() {
    let mut bench = Bench::new();
    let stream = key(SOCKETS, 50);
    bench.open(stream);
    let sent = pattern(BUF_ALLOC as usize);
    let mut got: Vec<u8> = Vec::new();
    let mut credit = 0;
    // Twice what the socket's buffers can be expected to hold, as fast as credit allows.
    let sent = sent.repeat(4);
    let mut unsent = &sent[..];
    while got.len() < sent.len() {
        while credit + BUF_ALLOC >= (sent.len() - unsent.len() + 32_768) as u32 && !unsent.is_empty() {
            let (part, rest) = unsent.split_at(32_768);
            bench.driver.send(&packet(stream, Op::Data, part.len()), part);
            unsent = rest;
        }
        for (header, _) in bench.poll() {
            assert_eq!(header.operation(), Some(Op::CreditUpdate));
            credit = header.fwd_cnt.get();
        }
        let (token, socket) = bench.socket(SOCKETS);
        let mut buffer = [0; 8192];
        match socket.read(&mut buffer) {
            Ok(bytes) => got.extend(&buffer[..bytes]),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        bench.ready(token);
    }
    assert!(got == sent, "the bytes differ");
    let (token, socket) = bench.socket(SOCKETS);
    let back = pattern(20_000);
    socket.write_all(&back).unwrap();
    bench.ready(token);
    assert!(data(&bench.poll()) == back);
    assert_eq!(bench.counter("violations"), 0);
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut bench = Bench::new();
    let stream = key(SOCKETS, 50);
    let little = |op, fwd_cnt: u32| Header {
        buf_alloc: 1000.into(),
        fwd_cnt: fwd_cnt.into(),
        ..packet(stream, op, 0)
    };
    bench.driver.send(&little(Op::Request, 0), &[]);
    bench.poll();
    let sent = pattern(5000);
    let (token, socket) = bench.socket(SOCKETS);
    socket.write_all(&sent).unwrap();
    bench.ready(token);
    let mut got = Vec::new();
    for round in 0.. {
        let packets = bench.poll();
        let bytes = data(&packets);
        assert!(bytes.len() <= 1000);
        got.extend(bytes);
        if got.len() == sent.len() {
            break;
        }
        assert_eq!(*ops(&packets).last().unwrap(), Op::CreditRequest, "round {round}");
        bench.driver.send(&little(Op::CreditUpdate, got.len() as u32), &[]);
    }
    assert!(got == sent);
}

#[test]
fn more_than_the_credit_ends_the_stream() {
    let mut bench = Bench::new();
    let stream = key(SOCKETS, 50);
    bench.open(stream);
    let mut resets = 0;
    for _ in 0..20 {
        bench.driver.send(&packet(stream, Op::Data, 65_536), &pattern(65_536));
        resets += ops(&bench.poll()).iter().filter(|op| **op == Op::Reset).count();
    }
    assert!(resets >= 1);
    assert_eq!(bench.counter("violations"), 1);
    assert_eq!(bench.device.streams.count(), 0);
}

#[test]
fn closing_by_the_guest_delivers_everything_first() {
    let mut bench = Bench::new();
    let stream = key(SOCKETS, 50);
    bench.open(stream);
    bench.driver.send(&packet(stream, Op::Data, 5000), &pattern(5000));
    let bye = Header { flags: SHUTDOWN_BOTH.into(), ..packet(stream, Op::Shutdown, 0) };
    bench.driver.send(&bye, &[]);
    assert_eq!(ops(&bench.poll()), [Op::Reset]);
    let (_, socket) = bench.socket(SOCKETS);
    let mut got = Vec::new();
    socket.read_to_end(&mut got).unwrap();
    assert!(got == pattern(5000));
    assert_eq!(bench.device.streams.count(), 0);
}

#[test]
fn half_closing_by_the_guest_leaves_the_other_half() {
    let mut bench = Bench::new();
    let stream = key(SOCKETS, 50);
    bench.open(stream);
    bench.driver.send(&packet(stream, Op::Data, 10), &pattern(10));
    let bye = Header { flags: SHUTDOWN_SEND.into(), ..packet(stream, Op::Shutdown, 0) };
    bench.driver.send(&bye, &[]);
    assert_eq!(ops(&bench.poll()), []);
    let (token, socket) = bench.socket(SOCKETS);
    let mut got = Vec::new();
    socket.read_to_end(&mut got).unwrap();
    assert_eq!(got, pattern(10));
    socket.write_all(b"answer").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    bench.ready(token);
    let packets = bench.poll();
    assert_eq!(ops(&packets), [Op::Data, Op::Shutdown]);
    assert_eq!(data(&packets), b"answer");
    assert_eq!(packets[1].0.flags.get(), SHUTDOWN_BOTH);
    // The guest never confirms: after a while the stream is taken down all the same.
    bench.now += Duration::from_secs(3);
    bench.device.streams.tick(bench.now);
    assert_eq!(ops(&bench.poll()), [Op::Reset]);
    assert_eq!(bench.device.streams.count(), 0);
}

#[test]
fn closing_by_the_host_is_told_and_confirmed() {
    let mut bench = Bench::new();
    let stream = key(SOCKETS, 50);
    bench.open(stream);
    let (token, socket) = bench.socket(SOCKETS);
    socket.write_all(b"bye").unwrap();
    socket.shutdown(Shutdown::Both).unwrap();
    bench.device.streams.ready(token, true, true, true, bench.now);
    let packets = bench.poll();
    assert_eq!(ops(&packets), [Op::Data, Op::Shutdown]);
    assert_eq!(packets[1].0.flags.get(), SHUTDOWN_BOTH);
    bench.driver.send(&packet(stream, Op::Reset, 0), &[]);
    assert_eq!(ops(&bench.poll()), []);
    assert_eq!(bench.device.streams.count(), 0);
}

#[test]
fn a_guest_that_stops_receiving_is_heard_further() {
    let mut bench = Bench::new();
    let stream = key(SOCKETS, 50);
    bench.open(stream);
    let half = Header { flags: SHUTDOWN_RECEIVE.into(), ..packet(stream, Op::Shutdown, 0) };
    bench.driver.send(&half, &[]);
    bench.driver.send(&packet(stream, Op::Data, 10), &pattern(10));
    bench.poll();
    let (_, socket) = bench.socket(SOCKETS);
    let mut got = [0; 10];
    socket.read_exact(&mut got).unwrap();
    assert_eq!(got.to_vec(), pattern(10));
}

#[test]
fn unknown_streams_ports_types_and_ids() {
    let mut bench = Bench::new();
    bench.driver.send(&packet(key(9, 50), Op::Request, 0), &[]);
    bench.driver.send(&packet(key(ECHO, 51), Op::Data, 3), b"abc");
    bench.driver.send(&packet(key(ECHO, 52), Op::Reset, 0), &[]);
    let odd = Header { kind: 2.into(), ..packet(key(ECHO, 53), Op::Request, 0) };
    bench.driver.send(&odd, &[]);
    let odd = Header { op: 99.into(), ..packet(key(ECHO, 54), Op::Request, 0) };
    bench.driver.send(&odd, &[]);
    let got = bench.poll();
    assert_eq!(ops(&got), [Op::Reset; 4]);
    assert_eq!(got[2].0.kind.get(), 2, "a refusal is of the type it refuses");
    // Nobody to answer.
    let foreign = Header { src_cid: 99.into(), ..packet(key(ECHO, 55), Op::Request, 0) };
    bench.driver.send(&foreign, &[]);
    let elsewhere = Header { dst_cid: 99.into(), ..packet(key(ECHO, 55), Op::Request, 0) };
    bench.driver.send(&elsewhere, &[]);
    assert_eq!(ops(&bench.poll()), []);
    assert_eq!(bench.counter("bad_packets"), 4);
    assert_eq!(bench.device.streams.count(), 0);
}

#[test]
fn streams_are_limited_and_slots_used_again() {
    let mut bench = Bench::new();
    for round in 0..3 {
        for port in 0..70 {
            bench.driver.send(&packet(key(ECHO, 100 + port), Op::Request, 0), &[]);
        }
        let got = ops(&bench.poll());
        assert_eq!(got.iter().filter(|op| **op == Op::Response).count(), 64, "round {round}");
        assert_eq!(got.iter().filter(|op| **op == Op::Reset).count(), 6);
        for port in 0..64 {
            bench.driver.send(&packet(key(ECHO, 100 + port), Op::Reset, 0), &[]);
        }
        bench.poll();
        assert_eq!(bench.device.streams.count(), 0);
    }
}

#[test]
fn a_host_program_reaches_the_guest() {
    let mut bench = Bench::new();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut token = 0;
    let now = bench.now;
    bench
        .device
        .streams
        .open(22, BUF_ALLOC, now, |t| {
            token = t;
            Ok(Box::new(Stream::new(ours)?))
        })
        .unwrap();
    let got = bench.poll();
    assert_eq!(ops(&got), [Op::Request]);
    let host_port = got[0].0.src_port.get();
    assert_eq!(got[0].0.dst_port.get(), 22);
    let stream = key(host_port, 22);
    bench.driver.send(&packet(stream, Op::Response, 0), &[]);
    bench.driver.send(&packet(stream, Op::Data, 5), b"hello");
    bench.poll();
    let mut line = vec![0; format!("OK {host_port}\nhello").len()];
    theirs.read_exact(&mut line).unwrap();
    assert_eq!(String::from_utf8(line).unwrap(), format!("OK {host_port}\nhello"));
    // Another, which the guest turns down.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    bench.device.streams.open(23, BUF_ALLOC, now, |_| Ok(Box::new(Stream::new(ours)?))).unwrap();
    let got = bench.poll();
    bench.driver.send(&packet(key(got[0].0.src_port.get(), 23), Op::Reset, 0), &[]);
    bench.poll();
    assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    // And one it does not answer at all.
    let (ours, _theirs) = UnixStream::pair().unwrap();
    bench.device.streams.open(24, BUF_ALLOC, now, |_| Ok(Box::new(Stream::new(ours)?))).unwrap();
    bench.poll();
    bench.now += Duration::from_secs(11);
    bench.device.streams.tick(bench.now);
    assert_eq!(ops(&bench.poll()), [Op::Reset]);
    assert_eq!(bench.device.streams.count(), 1);
}

#[test]
fn a_pause_keeps_the_streams_and_a_reset_does_not() {
    let mut bench = Bench::new();
    let stream = key(ECHO, 50);
    bench.open(stream);
    bench.stop();
    bench.driver.send(&packet(stream, Op::Data, 8), &pattern(8));
    assert_eq!(ops(&bench.poll()), [], "nothing moves while the VM is paused");
    let bases: Vec<u16> = bench.device.front.vrings.iter().map(|vring| vring.base).collect();
    for (vring, base) in bench.device.front.vrings.iter_mut().zip(bases) {
        vring.base = base;
        if vring.size > 0 {
            vring.kick = Some(eventfd());
        }
    }
    bench.device.update_rings();
    assert_eq!(data(&bench.poll()), pattern(8));
    bench.stop();
    bench.driver.restart(true);
    bench.start(0);
    bench.driver.post(100);
    assert_eq!(bench.device.streams.count(), 0, "a driver that starts anew has lost its streams");
    bench.open(stream);
}

#[test]
fn hostile_chains_are_counted_and_cost_only_themselves() {
    let mut bench = Bench::new();
    let stream = key(ECHO, 50);
    bench.open(stream);
    let memory = bench.driver.device_memory();
    let header = packet(stream, Op::Data, 8);
    memory.write_slice(zerocopy::IntoBytes::as_bytes(&header), GuestAddress(0x8000)).unwrap();
    let hostile: &[&[(u64, u32, u16, u16)]] = &[
        // A loop.
        &[(0x8000, 44, 1, 101), (0x8100, 8, 1, 100)],
        // The next descriptor lies outside the table.
        &[(0x8000, 44, 1, 30_000)],
        // Outside memory, at its end, around the end of the address space.
        &[(1 << 40, 52, 0, 0)],
        &[(driver::MEMORY_BYTES as u64 - 20, 52, 0, 0)],
        &[(u64::MAX - 10, 52, 0, 0)],
        // Writable where it must be readable.
        &[(0x8000, 52, 2, 0)],
        &[(0x8000, 44, 1, 101), (0x8100, 8, 2, 0)],
        // Too short for a header; for the length it tells.
        &[(0x8000, 43, 0, 0)],
        &[(0x8000, 0, 0, 0)],
        &[(0x8000, 50, 0, 0)],
        // Tables of tables, a table outside memory, of odd length, that loops to itself.
        &[(0x9000, 32, 4, 0)],
        &[(1 << 40, 32, 4, 0)],
        &[(0x8000, 33, 4, 0)],
        &[(0xa000, 0, 4, 0)],
    ];
    // An indirect table within an indirect table.
    for (at, value) in [(0x9000u64, 0x9100u64), (0x9010, 0x9100)] {
        memory.write_obj(value, GuestAddress(at)).unwrap();
        memory.write_obj(32u32, GuestAddress(at + 8)).unwrap();
        memory.write_obj(4u16, GuestAddress(at + 12)).unwrap();
    }
    for (round, chain) in hostile.iter().enumerate() {
        for (at, descriptor) in chain.iter().enumerate() {
            bench.driver.from_guest.write_descriptor(&memory, 100 + at as u16, *descriptor);
        }
        bench.driver.from_guest.offer(&memory, 100);
        assert_eq!(ops(&bench.poll()), [], "{chain:?}");
        assert_eq!(bench.counter("bad_chains"), round as u64 + 1, "{chain:?}");
    }
    // The stream has not noticed.
    bench.driver.from_guest.write_descriptor(&memory, 100, (0x8000, 52, 0, 0));
    bench.driver.from_guest.offer(&memory, 100);
    assert_eq!(ops(&bench.poll()), [Op::Data]);
}

#[test]
fn rings_that_make_no_sense_rest_until_reset() {
    for index in [TO_GUEST, FROM_GUEST] {
        let mut bench = Bench::new();
        bench.open(key(ECHO, 50));
        let memory = bench.driver.device_memory();
        let ring = if index == TO_GUEST { &mut bench.driver.to_guest } else { &mut bench.driver.from_guest };
        // More available than the ring has entries.
        memory.write_obj(ring.avail.wrapping_add(1000), GuestAddress(ring.layout.avail + 2)).unwrap();
        bench.driver.from_guest.offer(&memory, 0);
        let now = bench.now;
        bench.device.streams.wake(now);
        for _ in 0..10 {
            bench.device.serve(&mut bench.doors, now);
            bench.device.arm();
            bench.device.has_work();
        }
        if index == FROM_GUEST {
            // `offer` above mended the index; break it again.
            memory.write_obj(5000u16, GuestAddress(bench.driver.from_guest.layout.avail + 2)).unwrap();
            bench.device.serve(&mut bench.doors, now);
            assert_eq!(bench.counter("broken_rings"), 1);
        }
        bench.stop();
        bench.driver.restart(true);
        bench.start(0);
        bench.driver.post(10);
        bench.open(key(ECHO, 60));
    }
    // A head outside the table.
    let mut bench = Bench::new();
    let memory = bench.driver.device_memory();
    bench.driver.from_guest.offer(&memory, RING_ENTRIES);
    assert_eq!(ops(&bench.poll()), []);
    assert_eq!(bench.counter("broken_rings"), 1);
}

#[test]
fn a_guest_that_reads_no_answers_bounds_itself() {
    let mut bench = Bench::new();
    let stream = key(ECHO, 50);
    bench.open(stream);
    // The guest's room for answers is used up and never given back; its own credit must run out in turn.
    let mut sent = 0u32;
    let mut credit = BUF_ALLOC;
    let mut refused = false;
    for _ in 0..100 {
        let bytes = 32_768.min(credit.saturating_sub(sent)) as usize;
        if bytes == 0 {
            refused = true;
            break;
        }
        bench.driver.send(&packet(stream, Op::Data, bytes), &pattern(bytes));
        sent += bytes as u32;
        for (header, _) in bench.poll() {
            credit = header.fwd_cnt.get() + header.buf_alloc.get();
        }
    }
    assert!(refused, "{sent} bytes were taken and none of the answers read");
    assert_eq!(bench.counter("violations"), 0);
}
