//! Pages in tmem: asking for them, and putting them in the background.
//!
//! Gets are made by the thread that serves the read, over one of a few connections. Puts, flushes and all
//! connecting are the business of one thread of low priority, so that nothing a reader waits for waits for the
//! host, except its own get, and that not for long.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tmem_wire::pages::{decode_got, write_keys};
use tmem_wire::{GetStatus, Header, HelloRequest, Key, ObjectId, Op, PoolCreate, HEADER_BYTES, PAGE_BYTES};

use super::buffer::{Buffer, PageSet};
use super::counters::{count, Counters};
use super::presence::Presence;
use crate::link::{check, Backoff, Endpoint, Link, LinkError, LinkReader, LinkWriter};
use crate::page::decode;

/// Pages asked for in one frame; a large window takes several frames in one go. Bounds a connection's buffer.
const GET_BATCH: usize = 32;
/// How long a connection may rest. Then it is tried, so that tmemd does not take this end for dead, and a dead
/// connection is replaced before a reader needs it.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// How long a put may wait for others to travel with, and how many pages make it worth going.
const GATHER: Duration = Duration::from_millis(3);
/// Pages in one PUT frame.
pub(crate) const PUT_BATCH: usize = 32;
/// How long the host may leave a get unanswered that its reader has given up, before the connection counts as broken.
const LATE: Duration = Duration::from_secs(5);
/// How often, and how long at a time, such an answer is waited for.
const COLLECT: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(1));
/// Flushes that may wait. More are dropped: they only save memory at the host.
const FLUSHES: usize = 1024;

/// How to reach the host, and what to ask of it.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// Where it listens.
    pub(crate) endpoint: Endpoint,
    /// What this end says of itself.
    pub(crate) hello: HelloRequest,
    /// The pool for this mount.
    pub(crate) pool: PoolCreate,
    /// How long a reader waits for the host.
    pub(crate) get_timeout: Duration,
    /// Whether pages travel compressed.
    pub(crate) compress: bool,
    /// Connections for gets.
    pub(crate) connections: usize,
}

impl Host {
    /// The largest frame a GET is answered with.
    pub(crate) const FRAME_BYTES: u32 = (HEADER_BYTES + GET_BATCH * (PAGE_BYTES + 32)) as u32;

    /// A connection attached to the pool.
    pub(crate) fn connect(&self) -> Result<(Link, u32), LinkError> {
        let mut link = Link::connect(&self.endpoint, &self.hello, Duration::from_secs(2))?;
        let pool = link.create_pool(&self.pool)?;
        Ok((link, pool))
    }
}

/// A connection for gets.
struct Getter {
    reader: LinkReader,
    writer: LinkWriter,
    pool: u32,
    tag: u32,
    frame: Vec<u8>,
    proven: bool,
    used: Instant,
    /// Answers on their way that nobody waits for any more. Until they are here, readers do without this connection.
    owed: usize,
}

impl Getter {
    /// Receive answers that nobody waits for. Those still missing after `wait` are no failure: the host is slow.
    fn collect(&mut self, wait: Duration) -> Result<(), LinkError> {
        self.reader.set_timeout(wait)?;
        while self.owed > 0 {
            match self.reader.recv("answers given up") {
                Ok((header, _)) => self.owed -= usize::from(header.is_answer()),
                Err(LinkError::Timeout { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One empty round trip, whose answer may be late.
    fn ping(&mut self, wait: Duration) -> Result<(), LinkError> {
        self.frame.clear();
        Header::request(Op::Ping, 0).write_frame(&[], &mut self.frame);
        self.writer.send(&self.frame)?;
        self.owed = 1;
        self.collect(wait)
    }
}

/// One empty round trip over a connection with nothing else in flight.
pub(crate) fn ping(reader: &mut LinkReader, writer: &mut LinkWriter) -> Result<(), LinkError> {
    let mut frame = Vec::with_capacity(HEADER_BYTES);
    Header::request(Op::Ping, 0).write_frame(&[], &mut frame);
    writer.send(&frame)?;
    loop {
        let (header, body) = reader.recv("the answer to PING")?;
        if header.is_answer() {
            return check(&header, body);
        }
    }
}

struct Slot {
    getter: Option<Getter>,
    backoff: Backoff,
    again: Instant,
}

impl Slot {
    /// Whether a reader can use the connection now.
    fn is_ready(&self) -> bool {
        self.getter.as_ref().is_some_and(|getter| getter.owed == 0)
    }
}

/// Pages waiting to be put: those of `buffer` that are not in `had`.
pub(crate) struct Put {
    /// The pages, from `first` on.
    pub(crate) buffer: Buffer,
    /// Their object.
    pub(crate) object: ObjectId,
    /// Index of the first.
    pub(crate) first: u32,
    /// How many.
    pub(crate) pages: usize,
    /// Pages that came from tmem and need not be put.
    pub(crate) had: PageSet,
}

impl Put {
    /// Pages to put.
    pub(crate) fn missing(&self) -> usize {
        self.pages - self.had.len()
    }
}

#[derive(Default)]
struct Queue {
    puts: VecDeque<Put>,
    /// Pages to put in them.
    pages: usize,
    /// When the oldest came, roughly.
    since: Option<Instant>,
    flushes: VecDeque<ObjectId>,
    closing: bool,
}

impl Queue {
    /// Puts that fill a frame, or one that fills several.
    fn gather(&mut self) -> Vec<Put> {
        let mut taken = Vec::new();
        let mut pages = 0;
        while let Some(put) = self.puts.front() {
            if pages > 0 && pages + put.missing() > PUT_BATCH {
                break;
            }
            pages += put.missing();
            taken.extend(self.puts.pop_front());
        }
        self.pages -= pages;
        self.since = None;
        taken
    }
}

/// What the background thread has to do next.
pub(crate) enum Work {
    /// Put pages.
    Put(Vec<Put>),
    /// Flush objects.
    Flush(Vec<ObjectId>),
    /// Nothing for now.
    Idle,
    /// The file system was unmounted.
    Close,
}

/// The pages of one mount.
pub(crate) struct Cache {
    /// How to reach the host; `None` for a mere pass-through.
    pub(crate) host: Option<Host>,
    slots: Vec<Mutex<Slot>>,
    next: AtomicU32,
    queue: Mutex<Queue>,
    wake: Condvar,
    /// Which pages the host may have.
    pub(crate) presence: Presence,
    /// Whether puts reach the host.
    pub(crate) connected: AtomicBool,
    /// What happened so far.
    pub(crate) counters: Arc<Counters>,
}

impl Cache {
    /// A cache that is not connected yet, for a guest of so much memory.
    pub(crate) fn new(host: Option<Host>, counters: Arc<Counters>, memory_kib: u64) -> Cache {
        let connections = host.as_ref().map_or(0, |host| host.connections);
        let slot = || Slot { getter: None, backoff: Backoff::default(), again: Instant::now() };
        Cache {
            host,
            slots: (0..connections).map(|_| Mutex::new(slot())).collect(),
            next: AtomicU32::new(0),
            queue: Mutex::default(),
            wake: Condvar::new(),
            presence: Presence::new(memory_kib),
            connected: AtomicBool::new(false),
            counters,
        }
    }

    /// Read from tmem what it has of `pages` pages from `first` on; the set of those it had.
    pub(crate) fn get(&self, object: &ObjectId, first: u32, pages: usize, to: &mut [u8]) -> PageSet {
        let mut had = PageSet::default();
        if !self.connected.load(Ordering::Relaxed) {
            return had;
        }
        let mut keys = [Key { object: *object, index: 0 }; super::device::MAX_READ / PAGE_BYTES];
        let mut asked = 0;
        for index in first..first + pages as u32 {
            keys[asked].index = index;
            asked += usize::from(self.presence.likely(&keys[asked]));
        }
        let keys = &keys[..asked];
        if keys.is_empty() {
            return had;
        }
        let Some(mut slot) = self.slot() else { return had };
        let Some(mut getter) = slot.getter.take_if(|getter| getter.owed == 0) else { return had };
        let done = self.get_over(&mut getter, keys, |key, page| {
            let at = (key.index - first) as usize;
            let stored = decode(page, &mut to[at * PAGE_BYTES..][..PAGE_BYTES]).is_some();
            if stored {
                had.insert(at);
            }
            stored
        });
        match done {
            Ok(missing) => {
                getter.used = Instant::now();
                getter.owed = missing;
                if missing > 0 {
                    // A slow host is no reason to connect anew: the answers are thrown away when they come.
                    count(&self.counters.link_failures, 1);
                } else if !getter.proven {
                    getter.proven = true;
                    slot.backoff.reset();
                }
                slot.getter = Some(getter);
                drop(slot);
                if missing > 0 {
                    self.wake.notify_one();
                }
            }
            Err(error) => {
                log::debug!("a get failed, reading from the lower directory instead: {error}");
                count(&self.counters.link_failures, 1);
                slot.again = Instant::now() + slot.backoff.wait();
                drop(slot);
                self.wake.notify_one();
            }
        }
        count(&self.counters.get_missed_pages, keys.len() - had.len());
        had
    }

    /// Ask and wait, as long as a reader waits; the number of answers that have not come by then.
    fn get_over(
        &self,
        getter: &mut Getter,
        keys: &[Key],
        mut page: impl FnMut(&Key, &tmem_wire::pages::GotPage<'_>) -> bool,
    ) -> Result<usize, LinkError> {
        let compress = self.host.as_ref().is_some_and(|host| host.compress);
        getter.frame.clear();
        let first = getter.tag;
        for batch in keys.chunks(GET_BATCH) {
            write_keys(Op::Get, getter.tag, getter.pool, compress, batch, &mut getter.frame);
            getter.tag = getter.tag.wrapping_add(1);
        }
        getter.writer.send(&getter.frame)?;
        for missing in (1..=keys.chunks(GET_BATCH).len()).rev() {
            // Answers come in any order, and a notice may come in between.
            loop {
                let (header, body) = match getter.reader.recv("the answer to a get") {
                    Ok(answer) => answer,
                    Err(LinkError::Timeout { .. }) => return Ok(missing),
                    Err(error) => return Err(error),
                };
                if !header.is_answer() {
                    continue;
                }
                check(&header, body)?;
                let batch = keys.chunks(GET_BATCH).nth(header.tag.wrapping_sub(first) as usize);
                let Some(batch) = batch.filter(|b| header.op == Op::Get && b.len() == header.count.into())
                else {
                    return Err(LinkError::Unexpected { asked: Op::Get, got: header.op });
                };
                for (key, got) in batch.iter().zip(decode_got(&header, body)?) {
                    if got.status == GetStatus::Hit && page(key, &got) {
                        if self.is_exclusive() {
                            self.presence.taken(key);
                        } else {
                            self.presence.hit(key);
                        }
                    } else {
                        self.presence.missed(key);
                    }
                }
                break;
            }
        }
        Ok(0)
    }

    /// Whether the host gives a page away when it is asked for.
    fn is_exclusive(&self) -> bool {
        let kind = self.host.as_ref().map(|host| host.pool.kind);
        kind == Some(tmem_wire::PoolKind::Ephemeral { exclusive: true })
    }

    /// Whether pages may be handed to [`Cache::put`] at all.
    pub(crate) fn accepts(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Put pages some time later, or not at all.
    pub(crate) fn put(&self, put: Put) {
        let mut queue = self.queue.lock();
        let before = queue.pages;
        queue.pages += put.missing();
        queue.puts.push_back(put);
        // The first starts the wait for others, and enough of them end it.
        let wake = before == 0 || (before < PUT_BATCH && queue.pages >= PUT_BATCH);
        drop(queue);
        if wake {
            self.wake.notify_one();
        }
    }

    /// Drop the oldest waiting put that holds a buffer of this kind, because a reader needs it.
    pub(crate) fn steal(&self, kind: usize) -> bool {
        let mut queue = self.queue.lock();
        let found = queue.puts.iter().position(|put| put.buffer.kind() == kind);
        let stolen = found.and_then(|at| queue.puts.remove(at));
        if let Some(put) = &stolen {
            queue.pages -= put.missing();
            count(&self.counters.dropped_pages, put.missing());
        }
        drop(queue);
        stolen.is_some()
    }

    /// Pages of this object will not be asked for again: give their memory back some time later.
    pub(crate) fn forget(&self, object: ObjectId) {
        if !self.accepts() {
            return;
        }
        let mut queue = self.queue.lock();
        if queue.flushes.len() < FLUSHES {
            queue.flushes.push_back(object);
        }
        drop(queue);
        self.wake.notify_one();
    }

    /// Wait for something to do in the background, at most until `until`.
    pub(crate) fn next_work(&self, until: Option<Instant>) -> Work {
        let mut queue = self.queue.lock();
        loop {
            if queue.closing {
                return Work::Close;
            }
            if !queue.flushes.is_empty() {
                let most = queue.flushes.len().min(tmem_wire::MAX_BATCH);
                return Work::Flush(queue.flushes.drain(..most).collect());
            }
            let mut until = until;
            if queue.puts.is_empty() {
                queue.since = None;
            } else {
                let since = *queue.since.get_or_insert_with(Instant::now);
                if queue.pages >= PUT_BATCH || since.elapsed() >= GATHER {
                    return Work::Put(queue.gather());
                }
                let due = since + GATHER;
                until = Some(until.map_or(due, |until| until.min(due)));
            }
            match until {
                None => self.wake.wait(&mut queue),
                Some(until) => {
                    if self.wake.wait_until(&mut queue, until).timed_out() && queue.puts.is_empty() {
                        return Work::Idle;
                    }
                }
            }
            // Woken for a connection to mend, perhaps.
            if queue.puts.is_empty() && queue.flushes.is_empty() && !queue.closing {
                return Work::Idle;
            }
        }
    }

    /// Whether nothing waits to be sent.
    pub(crate) fn idle(&self) -> bool {
        let queue = self.queue.lock();
        queue.puts.is_empty() && queue.flushes.is_empty()
    }

    /// End the background thread. What waits is dropped.
    pub(crate) fn close(&self) {
        let mut queue = self.queue.lock();
        queue.closing = true;
        queue.puts.clear();
        queue.pages = 0;
        drop(queue);
        self.wake.notify_all();
    }

    /// Make connections for gets that are missing and due, and try those at rest; when to come back.
    pub(crate) fn mend(&self, host: &Host, now: Instant) -> Option<Instant> {
        let mut due = Some(now + KEEP_ALIVE);
        for slot in &self.slots {
            {
                let Some(mut slot) = slot.try_lock() else { continue };
                if let Some(getter) = &mut slot.getter {
                    let tried = if getter.owed > 0 {
                        getter.collect(COLLECT.1)
                    } else if getter.used + KEEP_ALIVE <= now {
                        getter.used = now;
                        getter.ping(host.get_timeout)
                    } else {
                        continue;
                    };
                    let tried = tried.and_then(|()| getter.reader.set_timeout(host.get_timeout));
                    if tried.is_ok() && getter.owed == 0 {
                        continue;
                    }
                    if tried.is_ok() && getter.used + LATE > now {
                        let soon = now + COLLECT.0;
                        due = Some(due.map_or(soon, |due| due.min(soon)));
                        continue;
                    }
                    slot.getter = None;
                    count(&self.counters.link_failures, 1);
                }
                if slot.again > now {
                    due = Some(due.map_or(slot.again, |due| due.min(slot.again)));
                    continue;
                }
            }
            // Readers do without this connection meanwhile, rather than wait for it.
            let made = host.connect().and_then(|(mut link, pool)| {
                link.set_timeout(host.get_timeout)?;
                Ok((link.split(), pool))
            });
            let mut slot = slot.lock();
            match made {
                Ok(((reader, writer), pool)) => {
                    slot.getter = Some(Getter {
                        reader,
                        writer,
                        pool,
                        tag: 1,
                        frame: Vec::new(),
                        proven: false,
                        used: Instant::now(),
                        owed: 0,
                    });
                }
                Err(error) => {
                    log::debug!("no connection for gets: {error}");
                    slot.again = Instant::now() + slot.backoff.wait();
                    due = Some(due.map_or(slot.again, |due| due.min(slot.again)));
                }
            }
        }
        due
    }

    fn slot(&self) -> Option<parking_lot::MutexGuard<'_, Slot>> {
        let count = self.slots.len();
        if count == 0 {
            return None;
        }
        let first = self.next.fetch_add(1, Ordering::Relaxed) as usize;
        (0..count)
            .find_map(|n| self.slots[(first + n) % count].try_lock().filter(|slot| slot.is_ready()))
            .or_else(|| Some(self.slots[first % count].lock()))
    }
}
