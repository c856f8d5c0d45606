//! The background thread: puts, flushes, and connecting.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tmem_wire::pages::{decode_statuses, write_objects, PutWriter};
use tmem_wire::{Key, ObjectId, Op, PutStatus, PAGE_BYTES};

use super::cache::{ping, Cache, Host, Put, Work, KEEP_ALIVE, PUT_BATCH};
use super::counters::count;
use crate::link::{check, Backoff, LinkError, LinkReader, LinkWriter};
use crate::page::{checksum, Encoder};

/// Frames that may be unanswered, if the host allows as many.
const WINDOW: usize = 4;
/// How long the host may take to answer a put before the connection counts as broken.
const PUT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long puts pause after a frame of which nothing was taken, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// A connection for puts and flushes.
struct Putter {
    reader: LinkReader,
    writer: LinkWriter,
    pool: u32,
    tag: u32,
    frame: Vec<u8>,
    checksums: bool,
    /// Frames unanswered: their tags, and for puts their pages.
    waiting: VecDeque<(u32, Vec<Key>)>,
    window: usize,
    used: Instant,
}

/// Serve the background work of `cache` until it is closed.
pub(crate) fn run(cache: &Arc<Cache>, host: &Host) {
    // Readers first: compressing and sending happens when there is nothing better to do.
    // SAFETY: setpriority touches no memory; 0 means the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
    let mut encoder = Encoder::new(host.compress);
    let mut backoff = Backoff::default();
    let mut pause = Backoff::new(PAUSE.0, PAUSE.1);
    let (mut again, mut paused) = (Instant::now(), Instant::now());
    let mut putter: Option<Putter> = None;
    let mut told = false;
    loop {
        if putter.is_none() && again <= Instant::now() {
            match connect(host) {
                Ok(made) => {
                    log::info!("connected to tmem at {}", host.endpoint);
                    backoff.reset();
                    told = false;
                    putter = Some(made);
                }
                Err(error) => {
                    if !told {
                        log::warn!("no tmem for now, files come from the lower directory alone: {error}");
                        told = true;
                    }
                    again = Instant::now() + backoff.wait();
                }
            }
        }
        let due = if putter.is_some() {
            let due = cache.mend(host, Instant::now());
            // Not before gets can be made, too.
            cache.connected.store(true, Ordering::Relaxed);
            due
        } else {
            Some(again)
        };
        let work = cache.next_work(due);
        if matches!(work, Work::Close) {
            return;
        }
        let Some(link) = &mut putter else {
            if let Work::Put(puts) = &work {
                drop_all(cache, puts);
            }
            continue;
        };
        let done = match work {
            Work::Put(puts) if Instant::now() < paused => {
                drop_all(cache, &puts);
                Ok(true)
            }
            Work::Put(puts) => link.put(cache, puts, &mut encoder),
            Work::Flush(objects) => link.flush(cache, &objects).map(|()| true),
            Work::Idle => link.keep_alive(cache).map(|()| true),
            Work::Close => Ok(true),
        };
        match done {
            Ok(true) => {}
            Ok(false) => paused = Instant::now() + pause.wait(),
            Err(error) => {
                log::warn!("lost tmem, files come from the lower directory alone: {error}");
                count(&cache.counters.link_failures, 1);
                putter = None;
                cache.connected.store(false, Ordering::Relaxed);
                again = Instant::now() + backoff.wait();
                continue;
            }
        }
        if Instant::now() > paused + PAUSE.1 {
            pause.reset();
        }
    }
}

fn drop_all(cache: &Cache, puts: &[Put]) {
    count(&cache.counters.dropped_pages, puts.iter().map(Put::missing).sum());
}

fn connect(host: &Host) -> Result<Putter, LinkError> {
    let (mut link, pool) = host.connect()?;
    link.set_timeout(PUT_TIMEOUT)?;
    let limits = *link.limits();
    let frame_bytes = PUT_BATCH * (PAGE_BYTES + 32);
    let by_bytes = host.endpoint.window_bytes.map_or(WINDOW, |bytes| (bytes / frame_bytes).max(1));
    let window = WINDOW.min(limits.max_in_flight as usize).min(by_bytes).max(1);
    let checksums = limits.features.has(tmem_wire::Features::CHECKSUMS);
    let (reader, writer) = link.split();
    let (frame, waiting) = (Vec::new(), VecDeque::new());
    Ok(Putter { reader, writer, pool, tag: 1, frame, checksums, waiting, window, used: Instant::now() })
}

impl Putter {
    /// Put pages; `false` if the host took none of those it answered for meanwhile.
    fn put(&mut self, cache: &Cache, puts: Vec<Put>, encoder: &mut Encoder) -> Result<bool, LinkError> {
        let mut taken = true;
        let missing: Vec<(usize, usize)> = puts
            .iter()
            .enumerate()
            .flat_map(|(n, put)| {
                put.had.gaps(put.pages).flat_map(|(first, end)| first..end).map(move |page| (n, page))
            })
            .collect();
        for batch in missing.chunks(PUT_BATCH) {
            while self.waiting.len() >= self.window {
                taken &= self.answer(cache)?;
            }
            self.frame.clear();
            self.tag = self.tag.wrapping_add(1);
            let mut keys = Vec::with_capacity(batch.len());
            let count = batch.len() as u16;
            let mut writer = PutWriter::begin(&mut self.frame, self.tag, self.pool, count, self.checksums);
            for &(n, page) in batch {
                let put = &puts[n];
                let key = Key { object: put.object, index: put.first + page as u32 };
                let bytes = &put.buffer.bytes()[page * PAGE_BYTES..][..PAGE_BYTES];
                encoder.put(&mut writer, &key, bytes, checksum(bytes));
                keys.push(key);
            }
            writer.end();
            self.writer.send(&self.frame)?;
            self.used = Instant::now();
            self.waiting.push_back((self.tag, keys));
        }
        // Readers may have the buffers back; the frames are on their way.
        drop(puts);
        // Whatever is answered by now; the rest at the next put. Only a full window is waited for, but an idle
        // link should not keep pages from being found.
        while self.waiting.len() > self.window / 2 {
            taken &= self.answer(cache)?;
        }
        if cache.idle() {
            while !self.waiting.is_empty() {
                taken &= self.answer(cache)?;
            }
        }
        Ok(taken)
    }

    fn flush(&mut self, cache: &Cache, objects: &[ObjectId]) -> Result<(), LinkError> {
        while self.waiting.len() >= self.window {
            self.answer(cache)?;
        }
        self.frame.clear();
        self.tag = self.tag.wrapping_add(1);
        write_objects(self.tag, self.pool, objects, &mut self.frame);
        self.writer.send(&self.frame)?;
        self.waiting.push_back((self.tag, Vec::new()));
        count(&cache.counters.invalidated_objects, objects.len());
        while cache.idle() && !self.waiting.is_empty() {
            self.answer(cache)?;
        }
        Ok(())
    }

    /// Nothing to do: collect answers, and see whether the other end is still there.
    fn keep_alive(&mut self, cache: &Cache) -> Result<(), LinkError> {
        while !self.waiting.is_empty() {
            self.answer(cache)?;
        }
        if self.used + KEEP_ALIVE <= Instant::now() {
            ping(&mut self.reader, &mut self.writer)?;
            self.used = Instant::now();
        }
        Ok(())
    }

    /// Wait for one answer; `false` if it refuses every page of a put.
    fn answer(&mut self, cache: &Cache) -> Result<bool, LinkError> {
        let (header, body) = loop {
            let (header, body) = self.reader.recv("the answer to a put")?;
            if header.is_answer() {
                break (header, body.to_vec());
            }
        };
        check(&header, &body)?;
        let unexpected = || LinkError::Unexpected { asked: Op::Put, got: header.op };
        let at = self.waiting.iter().position(|(tag, _)| *tag == header.tag).ok_or_else(unexpected)?;
        let (_, keys) = self.waiting.remove(at).ok_or_else(unexpected)?;
        if keys.is_empty() {
            return Ok(true);
        }
        let statuses = decode_statuses(&header, &body)?;
        let mut stored = 0;
        for (key, &status) in keys.iter().zip(statuses) {
            if PutStatus::from_code(status) == Some(PutStatus::Stored) {
                cache.presence.stored(key);
                stored += 1;
            } else {
                cache.presence.missed(key);
            }
        }
        count(&cache.counters.put_pages, stored);
        count(&cache.counters.refused_pages, keys.len() - stored);
        Ok(stored > 0)
    }
}
