//! The arena's layout: constants, the size classes, and the fixed records of its head.
//!
//! ```text
//! 0          superblock                       4 KiB
//! SLAB_TABLE class of every slab, one byte    512 KiB
//! GRANTS     shared-pool grants               4096 × 32 B
//! VMS        VM directory                     4096 × 256 B
//! POOLS      pool directory                   65536 × 64 B
//! HEAD_BYTES slab 0, slab 1, …
//! ```
//!
//! Only the parts in use take memory: the rest is a hole. Every record becomes valid by one store of its state word
//! after everything else is written, and invalid by one store before anything else is.

use tmem_wire::PAGE_BYTES;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// "TMEMAREN".
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"TMEMAREN");
/// Version of this layout. Another version's arena is refused and kept aside.
pub(crate) const VERSION: u32 = 1;

/// Bits of a slot reference that name the slot within its slab.
pub(crate) const SLOT_BITS: u32 = 13;
/// Most slots a slab is divided into.
pub(crate) const MAX_SLOTS: u32 = 1 << SLOT_BITS;
/// Most slabs: what is left of a 32-bit slot reference.
pub(crate) const MAX_SLABS: u32 = 1 << (32 - SLOT_BITS);
/// Smallest and largest slab, bytes.
pub(crate) const SLAB_BYTES_MIN: u32 = 64 << 10;
pub(crate) const SLAB_BYTES_MAX: u32 = 2 << 20;

pub(crate) const MAX_VMS: usize = 4096;
pub(crate) const MAX_POOLS: usize = 65536;
pub(crate) const MAX_GRANTS: usize = 4096;
/// Most pools one VM may have.
pub(crate) const MAX_POOLS_PER_VM: usize = 64;
/// Longest name of a VM, bytes.
pub(crate) const VM_NAME_BYTES: usize = 184;

pub(crate) const SLAB_TABLE: usize = 4096;
pub(crate) const GRANTS: usize = SLAB_TABLE + MAX_SLABS as usize;
pub(crate) const VMS: usize = GRANTS + MAX_GRANTS * size_of::<GrantRecord>();
pub(crate) const POOLS: usize = VMS + MAX_VMS * size_of::<VmRecord>();
/// Bytes before the first slab.
pub(crate) const HEAD_BYTES: usize = 8 << 20;
const _: () = assert!(POOLS + MAX_POOLS * size_of::<PoolRecord>() <= HEAD_BYTES);

/// Bytes of a slot's header.
pub(crate) const HEADER_BYTES: usize = 36;
/// Bytes of a same-filled page's slot: header and word.
const SAME_FILLED_SLOT: usize = HEADER_BYTES + 8;
/// Bytes of a raw page's slot.
const RAW_SLOT: usize = HEADER_BYTES + PAGE_BYTES;

/// The superblock's fixed part.
#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub(crate) struct Superblock {
    pub magic: u64,
    pub version: u32,
    pub slab_bytes: u32,
    /// Secret of this arena: keys are hashed with it and checksums bound to it.
    pub seed: u64,
    /// Hash of the class table, which must be the same for the slots to mean the same.
    pub classes_hash: u64,
    /// XXH3 of the fields above.
    pub check: u64,
}

/// A VM in the directory. Its index is the `VmId`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub(crate) struct VmRecord {
    pub state: u32,
    pub check: u32,
    pub quota_bytes: u64,
    pub min_bytes: u64,
    pub persistent_max_bytes: u64,
    pub weight: u32,
    pub frozen: u32,
    pub boot_id: [u8; 16],
    pub has_boot: u32,
    pub name_len: u32,
    pub name: [u8; VM_NAME_BYTES],
    pub reserved: [u8; 8],
}
const _: () = assert!(size_of::<VmRecord>() == 256);

/// A VM's membership in a pool. Its index is the `PoolId`, and what slot headers name the pool by.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub(crate) struct PoolRecord {
    pub state: u32,
    pub check: u32,
    pub vm: u16,
    /// 0 persistent, 1 ephemeral inclusive, 2 ephemeral exclusive.
    pub kind: u8,
    pub shared: u8,
    pub reserved: u32,
    pub uuid: [u8; 16],
    pub name: [u8; 32],
}
const _: () = assert!(size_of::<PoolRecord>() == 64);

/// The permission of a VM to join a shared pool.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub(crate) struct GrantRecord {
    pub state: u32,
    pub check: u32,
    pub vm: u32,
    pub reserved: u32,
    pub uuid: [u8; 16],
}
const _: () = assert!(size_of::<GrantRecord>() == 32);

/// `state` of a record in use; everything else is free.
pub(crate) const IN_USE: u32 = 0x5553_4544;

/// The slot sizes of a slab size. Every size takes as much as fits without losing a slot, so that a slab's tail is
/// not wasted but makes its slots larger.
#[derive(Debug, Clone)]
pub(crate) struct Classes {
    slot_bytes: Vec<u32>,
    slots: Vec<u32>,
    /// Class by (slot bytes needed) / 4.
    by_need: Vec<u8>,
}

impl Classes {
    pub(crate) fn new(slab_bytes: u32) -> Classes {
        let mut wanted = vec![SAME_FILLED_SLOT];
        // Steps keep the mean loss to rounding under 2 % from half a page up, and the number of classes, each of
        // which has a partly filled slab, under a hundred.
        wanted.extend((64..1024).step_by(32).map(|payload| HEADER_BYTES + payload));
        wanted.extend((1024..PAGE_BYTES).step_by(64).map(|payload| HEADER_BYTES + payload));
        wanted.push(RAW_SLOT);
        let (mut slot_bytes, mut slots) = (Vec::new(), Vec::new());
        for want in wanted {
            let count = slab_bytes / want as u32;
            let bytes = (slab_bytes / count) & !3;
            let bytes = if want == SAME_FILLED_SLOT { want as u32 } else { bytes.min(RAW_SLOT as u32 + 64) };
            if slot_bytes.last() != Some(&bytes) {
                slot_bytes.push(bytes);
                slots.push(count.min(MAX_SLOTS));
            }
        }
        let mut by_need = Vec::new();
        let mut class = 0;
        for need in (0..=RAW_SLOT).step_by(4) {
            while (slot_bytes[class] as usize) < need {
                class += 1;
            }
            by_need.push(class as u8);
        }
        Classes { slot_bytes, slots, by_need }
    }

    /// The class for a payload of at most a page.
    pub(crate) fn for_payload(&self, bytes: usize) -> u8 {
        self.by_need[(HEADER_BYTES + bytes).div_ceil(4)]
    }

    pub(crate) fn len(&self) -> usize {
        self.slot_bytes.len()
    }

    pub(crate) fn slot_bytes(&self, class: u8) -> u32 {
        self.slot_bytes[usize::from(class)]
    }

    pub(crate) fn slots(&self, class: u8) -> u32 {
        self.slots[usize::from(class)]
    }

    pub(crate) fn hash(&self) -> u64 {
        let bytes: Vec<u8> = self.slot_bytes.iter().flat_map(|bytes| bytes.to_le_bytes()).collect();
        xxhash_rust::xxh3::xxh3_64(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_payload_fits_its_class_with_little_to_spare() {
        for slab_bytes in [64 << 10, 256 << 10, 2 << 20] {
            let classes = Classes::new(slab_bytes);
            assert!(classes.len() < 128);
            for payload in 8..=PAGE_BYTES {
                let class = classes.for_payload(payload);
                let slot = classes.slot_bytes(class) as usize;
                assert!(slot >= HEADER_BYTES + payload);
                assert!(class == 0 || (classes.slot_bytes(class - 1) as usize) < HEADER_BYTES + payload);
                assert!(classes.slots(class) * classes.slot_bytes(class) <= slab_bytes);
            }
            assert_eq!(classes.slot_bytes(0) as usize, SAME_FILLED_SLOT);
        }
    }
}
