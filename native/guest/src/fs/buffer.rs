//! Page-aligned buffers, few and lent out: they bound the memory that reads and waiting puts may take.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;
use rustix::mm::{madvise, mmap_anonymous, Advice, MapFlags, ProtFlags};
use tmem_wire::PAGE_BYTES;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::device::MAX_READ;

/// Bytes of the smallest buffers, those for random reads.
pub(crate) const SMALL: usize = 16 << 10;

/// Sizes of buffers in bytes, and how many of each there are: for random reads, and for the kernel's read-ahead. A few
/// serve the readers, the rest wait to be put.
const KINDS: [(usize, usize); 2] = [(SMALL, 48), (MAX_READ, 13)];

/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;

/// Pages of all buffers.
const PAGES: usize = 2 * HUGE_PAGE / PAGE_BYTES;

const _: () = assert!(
    KINDS[0].0 * KINDS[0].1 + KINDS[1].0 * KINDS[1].1 == PAGES * PAGE_BYTES,
    "nothing is resident for nothing"
);

/// How long to wait for a buffer before looking for one to steal again.
const RETRY: Duration = Duration::from_millis(2);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// Buffers of one size that are not on loan. The last that came back goes first: memory becomes resident as it is used.
type Idle = Vec<&'static mut [Page]>;

/// The memory of all buffers, zeroed. It stays for as long as the process.
///
/// With `huge` it is made of huge pages where the kernel has them. What a disk writes into is then one piece instead of
/// one a page, which virtual disks are a good deal faster with; but all of it becomes resident at once.
fn map(huge: bool) -> Result<&'static mut [Page], Errno> {
    let align = if huge { HUGE_PAGE } else { PAGE_BYTES };
    let bytes = PAGES * PAGE_BYTES;
    let room = bytes + align - PAGE_BYTES;
    // SAFETY: a mapping of its own, which is never unmapped; the part of it that begins at an aligned address is whole
    // pages, readable, writable and zeroed, and referred to by what is returned alone.
    unsafe {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let base = mmap_anonymous(std::ptr::null_mut(), room, access, MapFlags::PRIVATE)?.cast::<u8>();
        let start = base.add(base.align_offset(align));
        if huge {
            // Kernels without them get by with what there is.
            let _ = madvise(start.cast(), bytes, Advice::LinuxHugepage);
        }
        Ok(std::slice::from_raw_parts_mut(start.cast(), PAGES))
    }
}

/// All buffers.
pub(crate) struct Buffers {
    kinds: Mutex<[Idle; KINDS.len()]>,
    returned: Condvar,
}

impl Buffers {
    /// All of them, none resident yet. With `huge`, they are made of huge pages.
    pub(crate) fn new(huge: bool) -> Result<Arc<Buffers>, Errno> {
        let mut rest = map(huge)?;
        let kinds = KINDS.map(|(bytes, count)| {
            let pages = bytes / PAGE_BYTES;
            let (own, others) = std::mem::take(&mut rest).split_at_mut(pages * count);
            rest = others;
            own.chunks_exact_mut(pages).collect()
        });
        Ok(Arc::new(Buffers { kinds: Mutex::new(kinds), returned: Condvar::new() }))
    }

    /// A buffer of at least `bytes`, at most [`MAX_READ`]. If there is none, `steal` may free one that only waits
    /// to be put; otherwise wait for another reader to finish.
    pub(crate) fn take(self: &Arc<Buffers>, bytes: usize, steal: impl Fn(usize) -> bool) -> Buffer {
        let kind = KINDS.iter().position(|(size, _)| bytes <= *size).unwrap_or(KINDS.len() - 1);
        loop {
            if let Some(pages) = self.kinds.lock()[kind].pop() {
                return Buffer { pages, kind, home: self.clone() };
            }
            if steal(kind) {
                continue;
            }
            let mut kinds = self.kinds.lock();
            if kinds[kind].is_empty() {
                // Not for ever: a buffer that was handed on to be put does not come back but can be stolen.
                self.returned.wait_for(&mut kinds, RETRY);
            }
        }
    }
}

/// A buffer on loan.
pub(crate) struct Buffer {
    pages: &'static mut [Page],
    kind: usize,
    home: Arc<Buffers>,
}

impl Buffer {
    /// Which kind of buffer this is, as `steal` names it.
    pub(crate) fn kind(&self) -> usize {
        self.kind
    }

    /// Its bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.pages.as_bytes()
    }

    /// Its bytes, to be written.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.pages.as_mut_bytes()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let pages = std::mem::take(&mut self.pages);
        self.home.kinds.lock()[self.kind].push(pages);
        self.home.returned.notify_all();
    }
}

/// Which pages of a READ's window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PageSet(u64);

const _: () = assert!(MAX_READ / PAGE_BYTES <= u64::BITS as usize);

impl PageSet {
    /// Add a page.
    pub(crate) fn insert(&mut self, page: usize) {
        self.0 |= 1 << page;
    }

    /// Whether a page is in it.
    pub(crate) fn contains(self, page: usize) -> bool {
        self.0 >> page & 1 != 0
    }

    /// How many pages are in it.
    pub(crate) fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// The run of pages that this one is in.
    pub(crate) fn run(self, page: usize) -> std::ops::Range<usize> {
        let before = (!self.0 << (63 - page)).leading_zeros() as usize;
        let from = (!(self.0 >> page)).trailing_zeros() as usize;
        page + 1 - before.min(page + 1)..page + from
    }

    /// The runs of pages below `pages` that are not in it, as first page and end.
    pub(crate) fn gaps(self, pages: usize) -> impl Iterator<Item = (usize, usize)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < pages && self.contains(at) {
                at += 1;
            }
            let first = at;
            while at < pages && !self.contains(at) {
                at += 1;
            }
            (first < at).then_some((first, at))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_what_is_missing() {
        let mut set = PageSet::default();
        assert_eq!(set.gaps(3).collect::<Vec<_>>(), [(0, 3)]);
        for page in [0, 1, 5, 62, 63] {
            set.insert(page);
        }
        assert_eq!(set.gaps(64).collect::<Vec<_>>(), [(2, 5), (6, 62)]);
        assert_eq!(set.len(), 5);
        assert_eq!(
            [set.run(0), set.run(1), set.run(5), set.run(62), set.run(63)],
            [0..2, 0..2, 5..6, 62..64, 62..64]
        );
    }

    #[test]
    fn a_buffer_comes_back_and_may_be_stolen() {
        let buffers = Buffers::new(true).unwrap();
        let (_, most) = KINDS[1];
        let mut held: Vec<_> = (0..most).map(|_| buffers.take(MAX_READ, |_| false)).collect();
        held[0].bytes_mut()[MAX_READ - 1] = 1;
        assert_eq!(held[0].bytes().as_ptr() as usize % PAGE_BYTES, 0);
        let held = Mutex::new(held);
        let stolen = buffers.take(MAX_READ, |kind| {
            assert_eq!(kind, 1);
            held.lock().pop().is_some()
        });
        assert_eq!(stolen.bytes().len(), MAX_READ);
        assert_eq!(held.lock().len(), most - 1);
    }
}
