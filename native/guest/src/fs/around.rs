//! Read-around: pages beside the one that was asked for, given to the kernel unasked.
//!
//! For a file that is read at random the kernel asks for single pages, and host and disk take about as long for four.
//! Where the host has much of the neighbourhood already, so that more of it is likely to be wanted, and memory is idle
//! in the guest, the pages around one are read with it and stored into the page cache by a notification.
//!
//! Such a store overwrites whatever the page cache has, so it must be sure that this is nothing newer:
//!
//! * While a file is open for writing nothing is stored into it: its pages may be dirty. `Content::holds` counts.
//! * While pages are being stored, requests to open or to truncate the file are put off; the storing thread serves
//!   them when it is done. They do not wait in the threads that serve requests: the store waits for reads of its
//!   pages, and somebody must be left to serve those.
//! * Between, the file is looked at before and after: pages of a version that others changed are dropped again.
//! * The kernel's node keeps a reference while its pages wait, for node ids are used again.
//!
//! docs/file-cache.md says why this shows nobody stale data.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;
use tmem_wire::{Key, PAGE_BYTES};

use super::buffer::{PageSet, SMALL};
use super::cache::Put;
use super::caller::Rights;
use super::counters::count;
use super::device::Device;
use super::inode::Inode;
use super::tree::{Call, Tree};
use super::version::Version;
use super::worker::Server;
use crate::memory;

/// Pages read in the place of one, aligned to as many.
const WINDOW: usize = 4;
const _: () = assert!(WINDOW * PAGE_BYTES <= SMALL, "a window is read into the buffer of its page");
/// Of so many pages around a miss, aligned, ...
const NEIGHBOURHOOD: u32 = 64;
/// ... so many must be at the host.
const KNOWN: usize = 8;
/// One in so many of the guest's pages must be unused: pages that nobody asked for should not drive others out.
const UNUSED: u64 = 8;
/// Windows that may wait to be stored. They hold buffers that readers need.
const WAITING: usize = 16;

/// Pages to be read together.
pub(crate) struct Span {
    /// Index of the first.
    pub(crate) first: u32,
    /// How many.
    pub(crate) pages: usize,
}

impl Span {
    /// The pages of which this is so, by their indices.
    pub(crate) fn pages_where(&self, so: impl Fn(u32) -> bool) -> PageSet {
        let mut pages = PageSet::default();
        for page in (0..self.pages).filter(|&page| so(self.first + page as u32)) {
            pages.insert(page);
        }
        pages
    }
}

/// Pages of one file's version, read around one that was asked for.
pub(crate) struct Window {
    /// The file. A reference is held for it.
    pub(crate) inode: Arc<Inode>,
    /// Its version.
    pub(crate) version: Version,
    /// Which bytes of the buffer are its own: whole pages, and the end of the file.
    pub(crate) there: Range<usize>,
    /// The pages, as they are to be put to the host afterwards.
    pub(crate) put: Put,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Window>,
    /// The node whose pages are being stored; no node has the id 0.
    storing: u64,
    /// Requests put off meanwhile, each with the device that it came from and that its answer belongs to.
    put_off: Vec<(Arc<Device>, Vec<u8>)>,
}

/// What waits to be stored, and who waits for that.
pub(crate) struct Around {
    /// Whether pages may be stored at all.
    enabled: bool,
    state: Mutex<State>,
    wake: Condvar,
}

/// Keeps pages from being stored into a file for as long as it exists.
pub(crate) struct Hold(Option<Arc<Inode>>);

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(inode) = &self.0 {
            inode.content.lock().holds -= 1;
        }
    }
}

impl Around {
    /// Nothing waits yet. Without `enabled`, nothing ever will.
    pub(crate) fn new(enabled: bool) -> Around {
        Around { enabled, state: Mutex::default(), wake: Condvar::new() }
    }

    /// Keep pages from being stored into `inode`; `None` while some are.
    pub(crate) fn hold(&self, inode: &Arc<Inode>) -> Option<Hold> {
        self.hold_or_put_off(inode, None)
    }

    /// The same for a request; while pages are being stored it is put off, and served later by another thread.
    pub(crate) fn hold_for(&self, call: &mut Call, inode: &Arc<Inode>) -> Option<Hold> {
        let hold = self.hold_or_put_off(inode, Some(call));
        call.sent |= hold.is_none();
        hold
    }

    fn hold_or_put_off(&self, inode: &Arc<Inode>, call: Option<&Call>) -> Option<Hold> {
        if !self.enabled || inode.kind != libc::S_IFREG {
            return Some(Hold(None));
        }
        let mut state = self.state.lock();
        if state.storing == inode.node {
            state.put_off.extend(call.map(|call| (call.device.clone(), call.request.to_vec())));
            return None;
        }
        inode.content.lock().holds += 1;
        drop(state);
        Some(Hold(Some(inode.clone())))
    }

    /// Have a window stored and put some time later; gives it back if too many wait.
    fn offer(&self, window: Window) -> Option<Window> {
        let mut state = self.state.lock();
        if state.waiting.len() == WAITING {
            return Some(window);
        }
        state.waiting.push_back(window);
        drop(state);
        self.wake.notify_one();
        None
    }

    fn next(&self) -> Window {
        let mut state = self.state.lock();
        loop {
            if let Some(window) = state.waiting.pop_front() {
                return window;
            }
            self.wake.wait(&mut state);
        }
    }

    /// Begin to store pages of this version; `false` if that must not be.
    fn begin(&self, window: &Window) -> bool {
        let mut state = self.state.lock();
        let content = window.inode.content.lock();
        // With another size than the version's, the kernel would take the end of the pages for the end of the file.
        let free = content.holds == 0 && content.changes == 0 && content.told == Some(window.version);
        if free {
            state.storing = window.inode.node;
        }
        free
    }

    /// What was put off meanwhile.
    fn end(&self) -> Vec<(Arc<Device>, Vec<u8>)> {
        let mut state = self.state.lock();
        state.storing = 0;
        std::mem::take(&mut state.put_off)
    }
}

impl Tree {
    /// What to read in place of a page that the kernel lacks, of a file of so many bytes; `None` if only the page itself
    /// is worth reading.
    pub(crate) fn span_around(&self, key: &Key, file_bytes: u64) -> Option<Span> {
        if !self.around.enabled || !self.cache.accepts() {
            return None;
        }
        let first = key.index - key.index % WINDOW as u32;
        let left = file_bytes.div_ceil(PAGE_BYTES as u64).checked_sub(first.into())?;
        let pages = usize::try_from(left).map_or(WINDOW, |left| left.min(WINDOW));
        // The last possible index ends a neighbourhood.
        let start = key.index - key.index % NEIGHBOURHOOD;
        let known = (start..=start + (NEIGHBOURHOOD - 1))
            .filter(|&index| self.cache.presence.has(&Key { index, ..*key }))
            .take(KNOWN)
            .count();
        (known == KNOWN && memory::is_unused(UNUSED)).then_some(Span { first, pages })
    }

    /// Store the window into the page cache, and put it to the host, some time later.
    pub(crate) fn store_later(&self, window: Window) {
        if let Some(window) = self.around.offer(window) {
            self.give_up(window);
        }
    }

    /// What is left to do with a window, stored or not.
    fn give_up(&self, window: Window) {
        if window.put.missing() > 0 {
            self.cache.put(window.put);
        }
        self.drop_references(window.inode.node, 1);
    }

    fn store(&self, window: &Window, device: &Device) -> Result<(), Errno> {
        let (inode, bytes) = (&window.inode, &window.put.buffer.bytes()[window.there.clone()]);
        let offset = u64::from(window.put.first) * PAGE_BYTES as u64 + window.there.start as u64;
        if !inode.is_at(&window.version) {
            return Ok(());
        }
        let stored = device.store(inode.node, offset, bytes);
        if !inode.is_at(&window.version) {
            // Also after a failure, which may have come after the first page.
            return device.invalidate_inode(inode.node, offset as i64);
        }
        stored.map(|()| count(&self.cache.counters.around_pages, bytes.len().div_ceil(PAGE_BYTES) - 1))
    }
}

/// Store what waits, for as long as the process lives.
pub(crate) fn run(tree: &Arc<Tree>, device: &Device) -> Result<(), Errno> {
    let mut server = Server::new(Rights::of_this_thread()?);
    loop {
        let window = tree.around.next();
        if tree.around.begin(&window) {
            match tree.store(&window, device) {
                // The kernel has forgotten the file, or has no memory for its pages.
                Ok(()) | Err(Errno::NOENT | Errno::NOMEM) => {}
                Err(error) => log::debug!("the kernel took no pages around a read: {error}"),
            }
            for (answers_to, request) in tree.around.end() {
                server.serve(tree, &answers_to, &request)?;
            }
        }
        tree.give_up(window);
    }
}
