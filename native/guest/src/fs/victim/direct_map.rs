//! Where this kernel has all memory mapped, and the array of `struct page`: from one of them to the page's content.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;

use zerocopy::FromBytes;

use super::VictimError;

/// The two places. They differ from boot to boot where the kernel's addresses are randomised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DirectMap {
    /// Address of the memory's first byte.
    pub(super) memory: u64,
    /// Address of the first page's `struct page`.
    pub(super) pages: u64,
}

#[derive(FromBytes)]
#[repr(C)]
struct Segment {
    kind: u32,
    _flags: u32,
    offset: u64,
    address: u64,
    _physical: u64,
    bytes: u64,
    _memory: u64,
    _align: u64,
}

impl DirectMap {
    /// Those of the running kernel: the values of two of its variables, read from its own core file.
    pub(super) fn of_kernel() -> Result<DirectMap, VictimError> {
        if !cfg!(target_arch = "x86_64") {
            return Err(VictimError::Missing("the direct map of an x86-64 processor"));
        }
        let (memory, pages) = symbols("page_offset_base", "vmemmap_base")
            .ok_or(VictimError::Missing("the addresses of data in /proc/kallsyms"))?;
        let core = File::open("/proc/kcore").map_err(|_| VictimError::Missing("/proc/kcore"))?;
        let read = |at| word(&core, at).ok_or(VictimError::Missing("those addresses in /proc/kcore"));
        Ok(DirectMap { memory: read(memory)?, pages: read(pages)? })
    }
}

/// The addresses of two symbols.
fn symbols(first: &str, second: &str) -> Option<(u64, u64)> {
    let (mut one, mut two) = (None, None);
    let mut table = BufReader::with_capacity(1 << 16, File::open("/proc/kallsyms").ok()?);
    let mut line = String::new();
    while table.read_line(&mut line).ok()? > 0 {
        let mut words = line.split_ascii_whitespace();
        let (address, name) = (words.next()?, words.nth(1)?);
        if name == first || name == second {
            // Zero for those who may not know.
            let found = u64::from_str_radix(address, 16).ok().filter(|&address| address != 0);
            *(if name == first { &mut one } else { &mut two }) = found;
        }
        line.clear();
    }
    Some((one?, two?))
}

/// The word at an address, from an ELF core file.
fn word(core: &File, at: u64) -> Option<u64> {
    let mut header = [0; 64];
    core.read_exact_at(&mut header, 0).ok()?;
    let first = u64::from_ne_bytes(*header[32..].first_chunk()?);
    let count = u16::from_ne_bytes(*header[56..].first_chunk()?);
    for n in 0..u64::from(count) {
        let mut bytes = [0; size_of::<Segment>()];
        core.read_exact_at(&mut bytes, first + n * size_of::<Segment>() as u64).ok()?;
        let segment = Segment::read_from_bytes(&bytes).ok()?;
        if segment.kind == 1 && at.checked_sub(segment.address).is_some_and(|inside| inside < segment.bytes) {
            let mut value = [0; 8];
            core.read_exact_at(&mut value, segment.offset + (at - segment.address)).ok()?;
            return Some(u64::from_ne_bytes(value));
        }
    }
    None
}
