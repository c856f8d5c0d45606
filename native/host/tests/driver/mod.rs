//! A guest's vsock driver, as small as it can be: memory, two rings, packets in chains of any shape.

#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::sync::atomic::Ordering;

use tmem_host::vhost_user::packet::{Header, Key, Op, HEADER_BYTES, HOST_CID, TYPE_STREAM};
use tmem_host::vhost_user::ring::Layout;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use zerocopy::{FromBytes, IntoBytes};

pub const GUEST_CID: u64 = 42;
pub const MEMORY_BYTES: usize = 16 << 20;
/// Where the pretended front end has guest memory mapped.
pub const USER_ADDRESS: u64 = 0x7000_0000_0000;
pub const RING_ENTRIES: u16 = 128;
const RINGS_AT: u64 = 0x1_0000;
const RING_BYTES: u64 = 0x4000;
const BUFFERS_AT: u64 = 0x10_0000;
const BUFFERS_BYTES: u64 = 4 << 20;

/// One ring as its driver sees it.
pub struct DriverRing {
    pub layout: Layout,
    next_descriptor: u16,
    pub avail: u16,
    used: u16,
    buffers: u64,
    next_buffer: u64,
    /// Chains by head: address and length of each descriptor.
    chains: Vec<Vec<(u64, u32)>>,
}

impl DriverRing {
    fn new(index: u64, event_idx: bool) -> DriverRing {
        let at = RINGS_AT + index * RING_BYTES;
        DriverRing {
            layout: Layout {
                size: RING_ENTRIES,
                descriptors: at,
                avail: at + 0x1000,
                used: at + 0x2000,
                event_idx,
            },
            next_descriptor: 0,
            avail: 0,
            used: 0,
            buffers: BUFFERS_AT + index * BUFFERS_BYTES,
            next_buffer: 0,
            chains: vec![Vec::new(); RING_ENTRIES as usize],
        }
    }

    pub fn write_descriptor(
        &self,
        memory: &GuestMemoryMmap,
        index: u16,
        (address, length, flags, next): (u64, u32, u16, u16),
    ) {
        let at = self.layout.descriptors + u64::from(index) * 16;
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Make head `head` available.
    pub fn offer(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let at = self.layout.avail + 4 + u64::from(self.avail % RING_ENTRIES) * 2;
        memory.write_obj(head, GuestAddress(at)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        memory.store(self.avail, GuestAddress(self.layout.avail + 2), Ordering::Release).unwrap();
    }

    /// Make a chain of empty buffers of these sizes available; returns where they lie.
    pub fn add(&mut self, memory: &GuestMemoryMmap, sizes: &[usize], writable: bool) -> Vec<(u64, u32)> {
        let (head, chain) = self.prepare(memory, sizes, writable);
        self.offer(memory, head);
        chain
    }

    /// A chain of buffers of these sizes that is not available yet: its head, and where the buffers lie.
    fn prepare(
        &mut self,
        memory: &GuestMemoryMmap,
        sizes: &[usize],
        writable: bool,
    ) -> (u16, Vec<(u64, u32)>) {
        let head = self.next_descriptor;
        let mut chain = Vec::new();
        for (at, &size) in sizes.iter().enumerate() {
            if self.next_buffer + size as u64 > BUFFERS_BYTES {
                self.next_buffer = 0;
            }
            let address = self.buffers + self.next_buffer;
            self.next_buffer += size as u64;
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % RING_ENTRIES;
            let last = at + 1 == sizes.len();
            let flags = u16::from(!last) | u16::from(writable) << 1;
            self.write_descriptor(memory, index, (address, size as u32, flags, self.next_descriptor));
            chain.push((address, size as u32));
        }
        self.chains[head as usize].clone_from(&chain);
        (head, chain)
    }

    /// The next used chain and the bytes written to it.
    pub fn take_used(&mut self, memory: &GuestMemoryMmap) -> Option<(Vec<(u64, u32)>, u32)> {
        let index: u16 = memory.load(GuestAddress(self.layout.used + 2), Ordering::Acquire).unwrap();
        if index == self.used {
            return None;
        }
        let at = self.layout.used + 4 + u64::from(self.used % RING_ENTRIES) * 8;
        let head: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        let length: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        Some((self.chains[head as usize].clone(), length))
    }

    /// Ask for an interrupt once the entry `at` was used.
    pub fn want_interrupt(&self, memory: &GuestMemoryMmap, at: u16) {
        let place = self.layout.avail + 4 + u64::from(RING_ENTRIES) * 2;
        memory.store(at, GuestAddress(place), Ordering::Release).unwrap();
    }

    pub fn used_index(&self, memory: &GuestMemoryMmap) -> u16 {
        memory.load(GuestAddress(self.layout.used + 2), Ordering::Acquire).unwrap()
    }
}

/// The driver.
pub struct Driver {
    pub memory: GuestMemoryMmap,
    pub file: File,
    pub to_guest: DriverRing,
    pub from_guest: DriverRing,
    pub events: DriverRing,
}

fn map(file: &File) -> GuestMemoryMmap {
    let region = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), MEMORY_BYTES).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    GuestMemoryMmap::from_regions(vec![region]).unwrap()
}

impl Driver {
    pub fn new(event_idx: bool) -> Driver {
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MEMORY_BYTES as u64).unwrap();
        Driver {
            memory: map(&file),
            file,
            to_guest: DriverRing::new(0, event_idx),
            from_guest: DriverRing::new(1, event_idx),
            events: DriverRing::new(2, event_idx),
        }
    }

    /// A second view of the same memory, for the device.
    pub fn device_memory(&self) -> GuestMemoryMmap {
        map(&self.file)
    }

    /// Forget everything and start anew, as a driver does after a reset.
    pub fn restart(&mut self, event_idx: bool) {
        let zeros = vec![0; 0x10_0000];
        self.memory.write_slice(&zeros, GuestAddress(0)).unwrap();
        self.to_guest = DriverRing::new(0, event_idx);
        self.from_guest = DriverRing::new(1, event_idx);
        self.events = DriverRing::new(2, event_idx);
    }

    /// Offer `count` buffers of 4 KiB in one descriptor each, as Linux does.
    pub fn post(&mut self, count: usize) {
        for _ in 0..count {
            self.to_guest.add(&self.memory, &[4096], true);
        }
    }

    /// Send a packet, cut into descriptors of these sizes; the last takes the rest.
    pub fn send_cut(&mut self, header: &Header, data: &[u8], cuts: &[usize]) {
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(data);
        let mut sizes = cuts.to_vec();
        sizes.push(bytes.len().saturating_sub(cuts.iter().sum()));
        let (head, chain) = self.from_guest.prepare(&self.memory, &sizes, false);
        let mut rest = &bytes[..];
        for (address, length) in chain {
            let (now, later) = rest.split_at((length as usize).min(rest.len()));
            self.memory.write_slice(now, GuestAddress(address)).unwrap();
            rest = later;
        }
        // Only now: a device that is awake takes it at once.
        self.from_guest.offer(&self.memory, head);
    }

    /// Send a packet in one descriptor.
    pub fn send(&mut self, header: &Header, data: &[u8]) {
        self.send_cut(header, data, &[]);
    }

    /// All packets received, their buffers offered again.
    pub fn receive(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        while let Some((chain, written)) = self.to_guest.take_used(&self.memory) {
            let mut bytes = Vec::new();
            for (address, length) in &chain {
                let mut part = vec![0; *length as usize];
                self.memory.read_slice(&mut part, GuestAddress(*address)).unwrap();
                bytes.extend(part);
            }
            bytes.truncate(written as usize);
            let (header, data) = bytes.split_at(HEADER_BYTES);
            let header = Header::read_from_bytes(header).unwrap();
            assert_eq!(header.len.get() as usize, data.len());
            assert_eq!((header.src_cid.get(), header.dst_cid.get()), (HOST_CID, GUEST_CID));
            packets.push((header, data.to_vec()));
            let sizes: Vec<usize> = chain.iter().map(|(_, length)| *length as usize).collect();
            self.to_guest.add(&self.memory, &sizes, true);
        }
        packets
    }
}

/// A packet from the guest with plenty of credit.
pub fn packet(key: Key, op: Op, length: usize) -> Header {
    Header {
        src_cid: GUEST_CID.into(),
        dst_cid: HOST_CID.into(),
        src_port: key.guest_port.into(),
        dst_port: key.host_port.into(),
        len: (length as u32).into(),
        kind: TYPE_STREAM.into(),
        op: (op as u16).into(),
        flags: 0.into(),
        buf_alloc: (256 * 1024).into(),
        fwd_cnt: 0.into(),
    }
}
