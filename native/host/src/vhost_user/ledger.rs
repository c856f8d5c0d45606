//! A table of open streams in shared memory, which outlives the process that serves them.
//!
//! When that process dies, its successor finds here which streams the guest still believes in, and tells it with a RESET
//! each that they are gone. (QEMU keeps the device's event queue to itself, so that the one event for all of them,
//! TRANSPORT_RESET, is not ours to send.)

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::packet::Key;

/// Bytes of an entry: both ports, and whether it is in use.
const ENTRY_BYTES: usize = 16;
const IN_USE: u64 = 1;

/// The table.
pub struct Ledger {
    file: File,
    region: MmapRegion,
    entries: usize,
}

impl Ledger {
    /// An empty table for `entries` streams.
    ///
    /// # Errors
    /// The host is short of memory or descriptors.
    pub fn create(entries: usize) -> io::Result<Ledger> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("tmem-streams", flags)?);
        file.set_len((entries * ENTRY_BYTES) as u64)?;
        Ledger::map(file)
    }

    /// The table another process left, extended to `entries` streams if it is smaller.
    ///
    /// # Errors
    /// The descriptor is not one of such a table.
    pub fn adopt(table: OwnedFd, entries: usize) -> io::Result<Ledger> {
        let file = File::from(table);
        let bytes = (entries * ENTRY_BYTES) as u64;
        if file.metadata()?.len() < bytes {
            file.set_len(bytes)?;
        }
        Ledger::map(file)
    }

    fn map(file: File) -> io::Result<Ledger> {
        let bytes = file.metadata()?.len() as usize;
        let region =
            MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), bytes).map_err(io::Error::other)?;
        Ok(Ledger { file, region, entries: bytes / ENTRY_BYTES })
    }

    /// The descriptor to hand to the keeper.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Stream `at` is open now.
    pub fn note(&mut self, at: usize, key: Key) {
        if at < self.entries {
            let ports = u64::from(key.host_port) | u64::from(key.guest_port) << 32;
            let slice = self.region.as_volatile_slice();
            // In range, as `at` is; the state last, so that a death half-way leaves an entry that is not in use.
            let _ = slice.write_obj(ports, at * ENTRY_BYTES);
            let _ = slice.store(IN_USE, at * ENTRY_BYTES + 8, Ordering::Release);
        }
    }

    /// Stream `at` is gone.
    pub fn strike(&mut self, at: usize) {
        if at < self.entries {
            let _ = self.region.as_volatile_slice().store(0u64, at * ENTRY_BYTES + 8, Ordering::Release);
        }
    }

    /// All streams are gone.
    pub fn clear(&mut self) {
        for at in 0..self.entries {
            self.strike(at);
        }
    }

    /// Take all streams out of the table.
    pub fn drain(&mut self) -> Vec<Key> {
        let slice = self.region.as_volatile_slice();
        let mut keys = Vec::new();
        for at in 0..self.entries {
            let ports: u64 = slice.read_obj(at * ENTRY_BYTES).unwrap_or(0);
            let state: u64 = slice.read_obj(at * ENTRY_BYTES + 8).unwrap_or(0);
            if state == IN_USE {
                keys.push(Key { host_port: ports as u32, guest_port: (ports >> 32) as u32 });
            }
        }
        self.clear();
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_finds_what_was_open() {
        let mut ledger = Ledger::create(4).unwrap();
        let key = |n| Key { host_port: n, guest_port: n + 100 };
        for at in 0..4 {
            ledger.note(at, key(at as u32));
        }
        ledger.strike(1);
        let descriptor = OwnedFd::from(ledger.file().try_clone().unwrap());
        drop(ledger);
        let mut next = Ledger::adopt(descriptor, 8).unwrap();
        assert_eq!(next.drain(), [key(0), key(2), key(3)]);
        assert_eq!(next.drain(), []);
        next.note(7, key(7));
        assert_eq!(next.drain(), [key(7)]);
    }
}
