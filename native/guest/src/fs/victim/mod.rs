//! Pages that the guest's kernel evicts, caught on their way out: what cleancache did, on a stock kernel.
//!
//! | module | holds |
//! |---|---|
//! | [`program`] | the BPF program at the kernel's eviction |
//! | [`btf`], [`direct_map`] | what differs from kernel to kernel, and from boot to boot |
//! | [`load`] | loading and attaching it |
//! | [`ring`] | the pages, from the kernel to this process |
//!
//! A page is put under the version that the kernel's page cache stands for, if that is still the file's version, and
//! if everything the page cache got of the file since it was last emptied came from reads of that version
//! (`Content::pure_since`). docs/file-cache.md has the argument.

mod btf;
mod direct_map;
mod load;
mod program;
mod ring;

use std::sync::Arc;

use rustix::event::{poll, PollFd, PollFlags};
use rustix::io::Errno;
use tmem_wire::PAGE_BYTES;

use super::buffer::{Buffer, PageSet};
use super::cache::Put;
use super::content::version_of_evicted;
use super::counters::count;
use super::inode::Inode;
use super::stat::{stat_fd, Identity};
use super::tree::Tree;
use super::version::Version;
use ring::{Evicted, Ring};

/// Pages gathered before they are put together.
const RUN: usize = 4;
/// The bit of a folio of several pages in the kernel's page flags. Their numbers are the kernel's business, but this
/// one has been the same since folios exist.
const LARGE: u64 = 1 << 6;

/// Why evicted pages cannot be caught.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VictimError {
    /// Something this kernel does not have or does not show.
    #[error("this kernel lacks {0}")]
    Missing(&'static str),
    /// The kernel refuses the program.
    #[error("the kernel does not take the BPF program: {0}")]
    Refused(Errno),
}

/// The attached program. Dropping it detaches it.
pub(crate) struct Victims {
    ring: Ring,
    _link: std::os::fd::OwnedFd,
    /// The device of the lower files.
    lower: u64,
}

/// Pages in a row, on their way into one put.
struct Run {
    inode: Arc<Inode>,
    first: u64,
    pages: usize,
    /// When the first of them was evicted.
    since: u64,
    buffer: Buffer,
}

impl Victims {
    /// Catch the pages of the mount with this device number whose lower files are on `lower`.
    pub(crate) fn attach(mount: rustix::fs::Dev, lower: u64) -> Result<Victims, VictimError> {
        let (ring, link) = load::attach(mount)?;
        Ok(Victims { ring, _link: link, lower })
    }

    /// Put what is evicted for as long as the process lives.
    pub(crate) fn run(&mut self, tree: &Tree) {
        loop {
            if let Err(error) = poll(&mut [PollFd::new(&self.ring, PollFlags::IN)], None) {
                if error != Errno::INTR {
                    log::error!("evicted pages are not seen any more: {error}");
                    return;
                }
            }
            let (mut run, mut seen) = (None, 0);
            let lower = self.lower;
            while self.ring.next(|evicted| gather(tree, lower, &mut run, evicted)) {
                seen += 1;
            }
            if let Some(run) = run {
                finish(tree, run);
            }
            count(&tree.cache.counters.evicted_pages, seen);
        }
    }
}

/// Add a page to the run, or finish it and begin another.
fn gather(tree: &Tree, lower: u64, run: &mut Option<Run>, evicted: &Evicted<'_>) {
    // Only the first page of a large folio was copied; FUSE has none on kernels before 6.16.
    if evicted.flags & LARGE != 0 || !tree.cache.accepts() {
        return;
    }
    if let Some(run) = run {
        if run.inode.name.identity.inode == evicted.inode
            && evicted.index == run.first + run.pages as u64
            && run.pages < RUN
        {
            run.buffer.bytes_mut()[run.pages * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(evicted.page);
            run.pages += 1;
            run.since = run.since.min(evicted.time);
            return;
        }
    }
    if let Some(done) = run.take() {
        finish(tree, done);
    }
    let Some(inode) = tree.inodes.find(&Identity { device: lower, inode: evicted.inode }) else { return };
    // The kernel evicts in bursts: wait for puts to get on, with the ring to hold what comes meanwhile, rather than
    // drop pages that were gathered before.
    let mut buffer = tree.buffers.take(RUN * PAGE_BYTES, |_| false);
    buffer.bytes_mut()[..PAGE_BYTES].copy_from_slice(evicted.page);
    *run = Some(Run { inode, first: evicted.index, pages: 1, since: evicted.time, buffer });
}

/// Put a run, if its content is sure to be that of the file's version.
fn finish(tree: &Tree, mut run: Run) {
    let Some(version) = version_of_evicted(&run.inode, run.since) else { return };
    let Ok(stat) = stat_fd(&run.inode.fd) else { return };
    if Version::of(&stat) != version {
        return;
    }
    let left = version.size.saturating_sub(run.first * PAGE_BYTES as u64);
    let length = usize::try_from(left).unwrap_or(usize::MAX).min(run.pages * PAGE_BYTES);
    let pages = length.div_ceil(PAGE_BYTES);
    let Ok(first) = u32::try_from(run.first) else { return };
    if pages == 0 || first.checked_add(pages as u32).is_none() {
        return;
    }
    run.buffer.bytes_mut()[length..].fill(0);
    let object = run.inode.name.object(&version);
    let old = run.inode.content.lock().object.replace(object);
    if let Some(old) = old.filter(|old| *old != object) {
        tree.cache.forget(old);
    }
    tree.cache.put(Put { buffer: run.buffer, object, first, pages, had: PageSet::default() });
}
