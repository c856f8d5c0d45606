// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! The BPF program: runs where the kernel evicts a page, and copies pages of one mount to the ring.
//!
//! It is attached to the entry of `workingset_eviction(folio, memcg)`, which reclaim calls for every clean page of a
//! file when it is certain to go: unmapped, with no reference left but the kernel's own, its content still in place.
//! Pages that are truncated or invalidated do not come this way. What it does, in C:
//!
//! ```c
//! inode = folio->mapping->host;
//! if (inode->i_sb->s_dev != DEVICE) return 0;
//! record = bpf_ringbuf_reserve(&ring, sizeof *record, 0);
//! if (!record) return 0;                       // the page is not cached at the host: no harm
//! record->inode = inode->i_ino; record->index = folio->index; record->flags = folio->flags;
//! record->time = bpf_ktime_get_ns();
//! bpf_probe_read_kernel(record->page, 4096, page_to_virt(folio));
//! bpf_ringbuf_submit(record, 0);
//! ```
//!
//! The helpers are for programs under the GPL only, hence the licence of this file, which the program is loaded under.

use super::btf::Btf;
use super::direct_map::DirectMap;
use super::VictimError;
use tmem_wire::PAGE_BYTES;

/// Where the kernel calls it.
pub(super) const HOOK: &str = "workingset_eviction";
/// What the kernel is told of the licence.
pub(super) const LICENSE: &std::ffi::CStr = c"Dual BSD/GPL";
/// Bytes of a record: inode, index, flags, time, page.
pub(super) const RECORD_BYTES: usize = 32 + PAGE_BYTES;

const GET_FUNC_ARG: i32 = 183;
const KTIME_GET_NS: i32 = 5;
const PROBE_READ_KERNEL: i32 = 113;
const RINGBUF_RESERVE: i32 = 131;
const RINGBUF_SUBMIT: i32 = 132;
/// The register with the frame's end, and the instruction that loads 64 bits.
const FRAME: u8 = 10;
const LOAD_64: u8 = 0x18;
/// In the source register of [`LOAD_64`]: the value is a map's descriptor.
const IS_MAP: u8 = 1;

#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn op(&mut self, op: u8, to: u8, from: u8, offset: i16, value: i32) -> &mut Code {
        self.0.extend([op, to | from << 4]);
        self.0.extend(offset.to_ne_bytes());
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn load(&mut self, to: u8, from: u8, offset: i16) -> &mut Code {
        self.op(0x79, to, from, offset, 0)
    }

    fn store(&mut self, to: u8, offset: i16, from: u8) -> &mut Code {
        self.op(0x7b, to, from, offset, 0)
    }

    fn copy(&mut self, to: u8, from: u8) -> &mut Code {
        self.op(0xbf, to, from, 0, 0)
    }

    fn set(&mut self, to: u8, value: i32) -> &mut Code {
        self.op(0xb7, to, 0, 0, value)
    }

    fn add(&mut self, to: u8, value: i32) -> &mut Code {
        self.op(0x07, to, 0, 0, value)
    }

    fn call(&mut self, helper: i32) -> &mut Code {
        self.op(0x85, 0, 0, 0, helper)
    }

    fn wide(&mut self, to: u8, kind: u8, value: u64) -> &mut Code {
        self.op(LOAD_64, to, kind, 0, value as u32 as i32).op(0, 0, 0, 0, (value >> 32) as u32 as i32)
    }

    fn instructions(&self) -> i16 {
        (self.0.len() / 8) as i16
    }
}

/// The program for the mount with this device number, in the kernel's encoding, and this ring.
pub(super) fn assemble(btf: &Btf, map: &DirectMap, device: u32, ring: i32) -> Result<Vec<u8>, VictimError> {
    let (host, super_block) = (btf.offset("address_space", "host")?, btf.offset("inode", "i_sb")?);
    let mut head = Code::default();
    head.copy(9, 1) // the context
        .load(6, 1, 0) // the folio
        .load(7, 6, btf.offset("folio", "mapping")?)
        .load(7, 7, host) // the inode
        .load(8, 7, super_block)
        .op(0x61, 0, 8, btf.offset("super_block", "s_dev")?, 0);

    let mut reserve = Code::default();
    reserve
        .load(8, 7, btf.offset("inode", "i_ino")?)
        // The folio's address as a number: its pointer may not be calculated with.
        .copy(1, 9)
        .set(2, 0)
        .copy(3, FRAME)
        .add(3, -8)
        .call(GET_FUNC_ARG)
        .wide(1, IS_MAP, ring as u64)
        .set(2, RECORD_BYTES as i32)
        .set(3, 0)
        .call(RINGBUF_RESERVE);

    // Pages are 2^6 bytes of `struct page` apart, and 2^12 of memory.
    let shift = 12 - btf.size("page")?.ilog2() as i32;
    let mut fill = Code::default();
    fill.copy(7, 0)
        .store(7, 0, 8)
        .load(1, 6, btf.offset("folio", "index")?)
        .store(7, 8, 1)
        .load(1, 6, btf.offset("folio", "flags")?)
        .store(7, 16, 1)
        .call(KTIME_GET_NS)
        .store(7, 24, 0)
        .load(3, FRAME, -8)
        .wide(1, 0, map.pages)
        .op(0x1f, 3, 1, 0, 0) // subtract
        .op(0x67, 3, 0, 0, shift) // shift left
        .wide(1, 0, map.memory)
        .op(0x0f, 3, 1, 0, 0) // add
        .copy(1, 7)
        .add(1, 32)
        .set(2, PAGE_BYTES as i32)
        .call(PROBE_READ_KERNEL)
        .copy(1, 7)
        .set(2, 0)
        .call(RINGBUF_SUBMIT);

    let mut code = head;
    // Another file system's page: go to the end.
    code.op(0x56, 0, 0, reserve.instructions() + 1 + fill.instructions(), device as i32);
    code.0.append(&mut reserve.0);
    // The ring is full: go to the end.
    code.op(0x15, 0, 0, fill.instructions(), 0);
    code.0.append(&mut fill.0);
    code.set(0, 0).op(0x95, 0, 0, 0, 0);
    Ok(code.0)
}
