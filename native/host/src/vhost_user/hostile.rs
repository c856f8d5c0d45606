//! A hostile guest made of arbitrary bytes: what fuzzers, and tests with seeded randomness, drive the device with.
//!
//! The bytes are a program: each step writes a descriptor, a header, an index or rubbish somewhere in guest memory,
//! makes chains available, lets the device work, resets a ring in mid-flight or moves the clock. Whatever it says, the
//! device must neither panic nor hang, and what it holds for the guest must stay bounded.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use zerocopy::IntoBytes;

use super::counters::Counters;
use super::device::Device;
use super::front::{FROM_GUEST, TO_GUEST};
use super::packet::{Key, Op, HOST_CID};
use super::peer::{Local, Peer, Service, Step, Stream};
use super::streams::{Opened, Opener, Refused, Streams};

const MEMORY_BYTES: usize = 1 << 20;
const GUEST_CID: u64 = 3;
const RING: u16 = 16;
const MAX_STREAMS: usize = 8;
const BUF_ALLOC: u32 = 4096;
/// Where ring `index` has its descriptors; avail and used rings follow at 0x400 and 0x800.
const RINGS_AT: u64 = 0x1000;
const RING_BYTES: u64 = 0x1000;
const BUFFERS_AT: u64 = 0x1_0000;
const BUFFER_BYTES: u64 = 0x1000;

/// Answers some bytes with more bytes, keeps some back, and ends now and then.
struct Fickle(u32);

impl Service for Fickle {
    fn feed(&mut self, input: &[u8], fresh: usize, out: &mut Vec<u8>) -> Step {
        self.0 = self.0.wrapping_add(fresh as u32);
        let consumed = input.len() - input.len() % 7;
        let answer = (consumed * 3).min(64 * 1024);
        out.resize(out.len() + answer, 0xa5);
        Step { consumed, again_in: None, closed: self.0 % 1013 == 1012 }
    }

    fn max_input_bytes(&self) -> usize {
        8192
    }
}

#[derive(Default)]
struct Doors {
    /// The host's ends of the socket streams, so that they stay open, and what they are written to.
    sockets: Vec<(u64, UnixStream)>,
}

impl Opener for Doors {
    fn open(&mut self, port: u32, token: u64) -> Result<Opened, Refused> {
        let peer: Box<dyn Peer> = match port % 4 {
            0 => return Err(Refused("nobody".into())),
            1 => {
                let pair = || -> std::io::Result<(UnixStream, UnixStream)> { UnixStream::pair() };
                let (ours, theirs) = pair().map_err(|error| Refused(error.to_string()))?;
                theirs.set_nonblocking(true).map_err(|error| Refused(error.to_string()))?;
                self.sockets.truncate(MAX_STREAMS);
                self.sockets.push((token, theirs));
                Box::new(Stream::new(ours).map_err(|error| Refused(error.to_string()))?)
            }
            _ => Box::new(Local::new(Box::new(Fickle(port)))),
        };
        Ok(Opened { peer, buf_alloc: BUF_ALLOC })
    }
}

/// Guest memory, once for all runs of a process: mapping it anew would be most of the work.
pub struct Arena(GuestMemoryMmap);

impl Arena {
    /// Some memory.
    ///
    /// # Errors
    /// The host has none.
    pub fn new() -> std::io::Result<Arena> {
        let other = std::io::Error::other::<Box<dyn std::error::Error + Send + Sync>>;
        let file = std::fs::File::from(rustix::fs::memfd_create("hostile", rustix::fs::MemfdFlags::CLOEXEC)?);
        file.set_len(MEMORY_BYTES as u64)?;
        // Two regions that touch, so that ranges may span them.
        let half = MEMORY_BYTES / 2;
        let mut regions = Vec::new();
        for at in [0, half] {
            let region = MmapRegion::from_file(FileOffset::new(file.try_clone()?, at as u64), half)
                .map_err(|error| other(error.into()))?;
            let region = GuestRegionMmap::new(region, GuestAddress(at as u64))
                .ok_or_else(|| std::io::Error::other("a region does not fit"))?;
            regions.push(region);
        }
        Ok(Arena(GuestMemoryMmap::from_regions(regions).map_err(|error| other(error.into()))?))
    }
}

/// Reads the program.
struct Program<'a>(&'a [u8]);

impl Program<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn word(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }
}

struct Guest<'a> {
    memory: &'a GuestMemoryMmap,
    device: Device,
    doors: Doors,
    avail: [u16; 2],
    now: Instant,
}

/// Run a program against a device. What must hold is asserted.
///
/// # Panics
/// The device has a bug.
pub fn run(arena: &Arena, program: &[u8]) {
    let memory = &arena.0;
    let _ = memory.write_slice(&[0; 0x4000], GuestAddress(0));
    let counters = Arc::new(Counters::default());
    let streams = Streams::new(GUEST_CID, MAX_STREAMS, counters.clone());
    let mut guest = Guest {
        memory,
        device: Device::new("hostile", streams, counters),
        doors: Doors::default(),
        avail: [0; 2],
        now: Instant::now(),
    };
    guest.device.set_memory(memory.clone());
    guest.start();
    for _ in 0..RING / 2 {
        guest.post();
    }
    let mut program = Program(program);
    while guest.step(&mut program).is_some() {
        assert!(guest.device.streams.count() <= MAX_STREAMS, "more streams than allowed");
    }
    // Whatever happened: after a reset it works again.
    guest.reset();
    for _ in 0..4 {
        guest.post();
    }
    let key = Key { host_port: 2, guest_port: 77 };
    guest.send(key, Op::Request, 0, 0, &[44]);
    guest.device.serve(&mut guest.doors, guest.now);
    assert_eq!(guest.device.streams.count(), 1, "a new stream is not opened after a reset");
}

fn eventfd() -> Option<OwnedFd> {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).ok()
}

impl Guest<'_> {
    fn ring_at(index: usize) -> u64 {
        RINGS_AT + index as u64 * RING_BYTES
    }

    fn start(&mut self) {
        let front = &mut self.device.front;
        front.features = 1 << 29 | 1 << 32;
        for index in [TO_GUEST, FROM_GUEST] {
            let at = Self::ring_at(index);
            let vring = &mut front.vrings[index];
            vring.size = RING;
            vring.base = 0;
            (vring.descriptors, vring.avail, vring.used) = (at, at + 0x400, at + 0x800);
            vring.kick = eventfd();
            vring.call = eventfd();
        }
        // Addresses of the front end are those of the guest here.
        if front.regions.is_empty() {
            if let Some(file) = eventfd() {
                let size = MEMORY_BYTES as u64;
                front.regions =
                    vec![super::front::Region { guest_address: 0, size, user_address: 0, offset: 0, file }];
            }
        }
        self.device.update_rings();
    }

    fn reset(&mut self) {
        self.device.reset();
        for vring in &mut self.device.front.vrings {
            vring.kick = None;
        }
        self.device.update_rings();
        let _ = self.memory.write_slice(&[0; 0x4000], GuestAddress(0));
        self.avail = [0; 2];
        self.start();
    }

    fn describe(&self, index: usize, at: u16, (address, length, flags, next): (u64, u32, u16, u16)) {
        let place = Self::ring_at(index) + u64::from(at % RING) * 16;
        let _ = self.memory.write_obj(address, GuestAddress(place));
        let _ = self.memory.write_obj(length, GuestAddress(place + 8));
        let _ = self.memory.write_obj(flags, GuestAddress(place + 12));
        let _ = self.memory.write_obj(next, GuestAddress(place + 14));
    }

    fn offer(&mut self, index: usize, head: u16) {
        let at = Self::ring_at(index) + 0x400;
        let _ = self.memory.write_obj(head, GuestAddress(at + 4 + u64::from(self.avail[index] % RING) * 2));
        self.avail[index] = self.avail[index].wrapping_add(1);
        let _ = self.memory.write_obj(self.avail[index], GuestAddress(at + 2));
    }

    fn post(&mut self) {
        let head = self.avail[TO_GUEST] % RING;
        let address = BUFFERS_AT + u64::from(head) * BUFFER_BYTES;
        self.describe(TO_GUEST, head, (address, BUFFER_BYTES as u32, 2, 0));
        self.offer(TO_GUEST, head);
    }

    fn send(&mut self, key: Key, op: Op, flags: u32, claimed: u32, lengths: &[u32]) {
        let mut header = key.packet(HOST_CID, op);
        header.src_cid = GUEST_CID.into();
        header.dst_cid = HOST_CID.into();
        header.src_port = key.guest_port.into();
        header.dst_port = key.host_port.into();
        header.flags = flags.into();
        header.len = claimed.into();
        header.buf_alloc = 10_000.into();
        let first = self.avail[FROM_GUEST] % RING;
        let address = BUFFERS_AT + u64::from(RING + first) * BUFFER_BYTES;
        let _ = self.memory.write_slice(header.as_bytes(), GuestAddress(address));
        let mut at = address;
        for (number, length) in lengths.iter().enumerate() {
            let last = number + 1 == lengths.len();
            let descriptor = (first + number as u16) % RING;
            self.describe(FROM_GUEST, descriptor, (at, *length, u16::from(!last), (descriptor + 1) % RING));
            at += u64::from(*length);
        }
        self.offer(FROM_GUEST, first);
    }

    /// One step; `None` at the end of the program.
    fn step(&mut self, program: &mut Program<'_>) -> Option<()> {
        let step = program.byte()?;
        match step % 16 {
            0..=3 => {
                let (ports, what, length) = (program.byte()?, program.byte()?, program.word()?);
                let key = Key { host_port: u32::from(ports >> 4), guest_port: u32::from(ports & 15) };
                let op = Op::from_code(u16::from(what % 8)).unwrap_or(Op::Data);
                let length = u32::from(length % 5000);
                // Mostly honest, so that streams get somewhere.
                let lengths: &[u32] = match what >> 6 {
                    0 => &[44 + length],
                    1 => &[44, length],
                    2 => &[20, 24, length / 2, length - length / 2],
                    _ => &[44, length / 3],
                };
                self.send(key, op, u32::from(what >> 3 & 3), length, lengths);
            }
            4 => {
                for _ in 0..=step >> 4 {
                    self.post();
                }
            }
            5..=7 => {
                self.device.serve(&mut self.doors, self.now);
            }
            8 => {
                let (at, ring) = (u16::from(program.byte()?), usize::from(step >> 4 & 1));
                let address = u64::from(program.word()?) << (program.byte()? % 49);
                let descriptor =
                    (address, u32::from(program.word()?), u16::from(program.byte()? % 8), program.word()?);
                self.describe(ring, at, descriptor);
            }
            9 => {
                let head = u16::from(program.byte()? % 20);
                self.offer(usize::from(step >> 4 & 1), head);
            }
            10 => {
                // Anywhere in rings and headers.
                let (at, value) = (program.word()?, program.word()?);
                let _ = self.memory.write_obj(value, GuestAddress(u64::from(at) % 0x4000));
            }
            11 => {
                let (at, value) = (program.byte()?, program.byte()?);
                let header = BUFFERS_AT + u64::from(RING + u16::from(at % 16)) * BUFFER_BYTES;
                let _ = self.memory.write_obj(value, GuestAddress(header + u64::from(at >> 4) * 3));
            }
            12 => {
                self.now += Duration::from_millis(u64::from(program.byte()?) * 50);
                self.device.streams.tick(self.now);
            }
            13 => {
                let sockets = std::mem::take(&mut self.doors.sockets);
                for (token, socket) in &sockets {
                    let _ = (&mut &*socket).write(&[1; 500]);
                    self.device.streams.ready(*token, true, true, step >> 4 == 15, self.now);
                }
                self.doors.sockets = sockets;
            }
            14 => {
                self.device.arm();
                self.device.has_work();
                self.device.streams.wake(self.now);
            }
            _ => match step >> 4 {
                0..=5 => self.reset(),
                6..=8 => {
                    // A pause.
                    self.device.sync_bases();
                    let kicks: Vec<_> =
                        self.device.front.vrings.iter_mut().map(|vring| vring.kick.take()).collect();
                    self.device.update_rings();
                    for (vring, kick) in self.device.front.vrings.iter_mut().zip(kicks) {
                        vring.kick = kick;
                    }
                    self.device.update_rings();
                }
                9..=11 => {
                    self.doors.sockets.pop();
                }
                _ => self.device.streams.abort_all(),
            },
        }
        Some(())
    }
}
