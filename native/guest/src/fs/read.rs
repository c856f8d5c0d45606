//! Reading: the kernel's page cache missed, so ask tmem, then the lower file system.
//!
//! The lower file system is read with direct I/O: no second copy stays in the guest's page cache, and, which matters
//! more, a direct read waits for writers and writes dirty pages back first. So what it returns belongs to the
//! version that the file's change time tells before and after it (docs/file-cache.md).

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use tmem_wire::{Key, ObjectId, PAGE_BYTES};

use super::abi::ReadIn;
use super::around::{Span, Window};
use super::buffer::{Buffer, PageSet};
use super::cache::Put;
use super::content::note_dropped;
use super::counters::count;
use super::device::MAX_READ;
use super::handle::Handle;
use super::inode::Inode;
use super::stat::STAT;
use super::tree::{Call, Done, Tree};
use super::version::Version;

/// With more separate gaps than this in one window, all of it from the first gap to the last is read in one go.
const GAPS: usize = 3;

impl Tree {
    pub(crate) fn read(&self, call: &mut Call) -> Done {
        let asked: ReadIn = call.args.take()?;
        let handle = self.handle(call.header.nodeid, asked.fh)?;
        if let Some(version) = handle.dropped.lock().take() {
            note_dropped(&handle.inode, version);
        }
        let size = (asked.size as usize).min(MAX_READ);
        let mut buffer = self.buffers.take(size, |kind| self.cache.steal(kind));
        let stat =
            rustix::fs::statx(&handle.inode.fd, c"", AtFlags::EMPTY_PATH, STAT | StatxFlags::DIOALIGN)?;
        let version = Version::of(&stat);
        let whole = (asked.offset % PAGE_BYTES as u64) as usize == 0 && size % PAGE_BYTES == 0;
        let direct = if whole && self.is_settled(&version) { direct(&handle, &stat) } else { None };
        let Some(direct) = direct else {
            self.note_mixed(&handle.inode);
            let length = read_at(handle.reading()?, &mut buffer.bytes_mut()[..size], asked.offset)?;
            count(&self.cache.counters.bypass_pages, length.div_ceil(PAGE_BYTES));
            call.send(&buffer.bytes()[..length]);
            return Ok(());
        };
        let Some(length) = version.size.checked_sub(asked.offset).filter(|&left| left > 0) else {
            return Ok(());
        };
        let length = size.min(usize::try_from(length).unwrap_or(size));
        let pages = length.div_ceil(PAGE_BYTES);
        let object = handle.inode.name.object(&version);
        let first = u32::try_from(asked.offset / PAGE_BYTES as u64).ok();
        let first = first.filter(|first| self.cacheable && first.checked_add(pages as u32).is_some());
        if let Some(index) = first.filter(|_| size == PAGE_BYTES && !is_direct(&asked)) {
            let key = Key { object, index };
            if let Some(span) = self.span_around(&key, version.size) {
                let page = Page { handle: &handle, direct, version, key };
                return self.read_around(call, &page, &span, buffer);
            }
        }
        let had = first.map_or_else(PageSet::default, |first| {
            self.cache.get(&object, first, pages, &mut buffer.bytes_mut()[..pages * PAGE_BYTES])
        });
        let bytes = &mut buffer.bytes_mut()[..pages * PAGE_BYTES];
        let got = fill_gaps(direct, bytes, asked.offset, had)?.min(length);
        let leave = self.leaves_to_evict(&handle.inode, &version);
        if self.victims && (!leave || !handle.inode.is_at(&version)) {
            // Before the answer: once the kernel has the page it may evict it.
            self.note_mixed(&handle.inode);
        }
        call.send(&buffer.bytes()[..got]);

        let missing = pages - had.len();
        count(&self.cache.counters.hit_pages, had.len());
        count(&self.cache.counters.miss_pages, missing);
        // What tmem had and gave away for good is put again where it is not sure to come back by eviction.
        let had = if self.victims { PageSet::default() } else { had };
        let wanted = !leave && had.len() < pages && got == length && self.cache.accepts();
        let Some(first) = first.filter(|_| wanted) else {
            return Ok(());
        };
        if self.may_put(&handle.inode, &version, object) {
            // Beyond the end of the file a disk block may hold anything.
            buffer.bytes_mut()[length..pages * PAGE_BYTES].fill(0);
            self.cache.put(Put { buffer, object, first, pages, had });
        }
        Ok(())
    }

    /// Read the pages around one, from the host if it has that one, and else from the lower file. Answer with the one, and
    /// have the others given to the kernel, and put if they came from the file.
    fn read_around(&self, call: &mut Call, page: &Page, span: &Span, mut buffer: Buffer) -> Done {
        let (inode, version, key) = (&page.handle.inode, page.version, page.key);
        let offset = u64::from(span.first) * PAGE_BYTES as u64;
        let whole = span.pages * PAGE_BYTES;
        let bytes = usize::try_from(version.size - offset).map_or(whole, |left| left.min(whole));
        let asked = (key.index - span.first) as usize;
        let mut got = PageSet::default();
        if self.cache.presence.likely(&key) {
            got = self.cache.get(&key.object, span.first, span.pages, &mut buffer.bytes_mut()[..whole]);
        }
        let hit = got.contains(asked);
        // Of what came from the host nothing is put.
        let had = span.pages_where(|index| hit || self.cache.presence.has(&Key { index, ..key }));
        let there = if hit {
            let run = got.run(asked);
            run.start * PAGE_BYTES..(run.end * PAGE_BYTES).min(bytes)
        } else {
            0..read_at(page.direct, &mut buffer.bytes_mut()[..whole], offset)?.min(bytes)
        };
        let answer = asked * PAGE_BYTES..(asked + 1) * PAGE_BYTES;
        let whole_answer = there.start <= answer.start && answer.end.min(bytes) <= there.end;
        // Until it is answered the kernel knows the file.
        let kept = whole_answer && there.len() > PAGE_BYTES && self.inodes.keep(inode);
        call.send(&buffer.bytes()[answer.start.min(there.end)..answer.end.min(there.end)]);
        let counters = &self.cache.counters;
        count(if hit { &counters.hit_pages } else { &counters.miss_pages }, 1);
        if !kept {
            return Ok(());
        }
        if !hit && (there.end < bytes || !self.may_put(inode, &version, key.object)) {
            self.drop_references(inode.node, 1);
            return Ok(());
        }
        buffer.bytes_mut()[bytes..whole].fill(0);
        let put = Put { buffer, object: key.object, first: span.first, pages: span.pages, had };
        self.store_later(Window { inode: inode.clone(), version, there, put });
        Ok(())
    }

    /// Whether pages that were read under `version` may be put as `object`: it is still the file's version. What was
    /// put before as another object is forgotten.
    fn may_put(&self, inode: &Inode, version: &Version, object: ObjectId) -> bool {
        if !inode.is_at(version) {
            return false;
        }
        let old = inode.content.lock().object.replace(object);
        if let Some(old) = old.filter(|old| *old != object) {
            self.cache.forget(old);
        }
        true
    }

    /// Whether pages read from now on may be cached under this version.
    fn is_settled(&self, version: &Version) -> bool {
        self.fine_clock || version.settled()
    }
}

/// A page that the kernel's page cache lacks.
struct Page<'h> {
    handle: &'h Handle,
    direct: &'h OwnedFd,
    version: Version,
    key: Key,
}

/// Whether the caller reads past the page cache.
fn is_direct(asked: &ReadIn) -> bool {
    OFlags::from_bits_retain(asked.flags).contains(OFlags::DIRECT)
}

/// The descriptor for direct reads, if the lower file system has such a thing for this file.
fn direct<'h>(handle: &'h Handle, stat: &Statx) -> Option<&'h OwnedFd> {
    let able = |align: u32| align > 0 && align as usize <= PAGE_BYTES;
    let open = || {
        if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0
            || !able(stat.stx_dio_mem_align)
            || !able(stat.stx_dio_offset_align)
        {
            return None;
        }
        handle.inode.reopen(OFlags::RDONLY | OFlags::DIRECT).ok()
    };
    handle.direct.get_or_init(open).as_ref()
}

/// Read until the buffer is full or the file ends.
fn read_at(fd: impl AsFd, to: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let mut done = 0;
    while done < to.len() {
        match rustix::io::pread(&fd, &mut to[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            // What was read is told; the error comes back with the next read.
            Err(error) if done == 0 => return Err(error),
            Err(_) => break,
        }
        if done % 512 != 0 {
            // A direct read that ends between sectors ended with the file.
            break;
        }
    }
    Ok(done)
}

/// Read the pages that are not in `had`. Returns how many bytes from the start of the window are there: fewer than
/// the window has if the file became shorter.
fn fill_gaps(direct: &OwnedFd, to: &mut [u8], offset: u64, had: PageSet) -> Result<usize, Errno> {
    let pages = to.len() / PAGE_BYTES;
    let gaps: Vec<_> = had.gaps(pages).collect();
    let whole;
    let gaps = match gaps[..] {
        [(first, _), .., (_, end)] if gaps.len() > GAPS => {
            whole = [(first, end)];
            &whole[..]
        }
        _ => &gaps[..],
    };
    for &(first, end) in gaps {
        let (from, until) = (first * PAGE_BYTES, end * PAGE_BYTES);
        let read = read_at(direct, &mut to[from..until], offset + from as u64)?;
        if read < until - from {
            return Ok(from + read);
        }
    }
    Ok(to.len())
}
