//! The guest's operations: put, get, flush.
//!
//! Lock order: shard of the index, then list of a VM, then class of the allocator. The directory's read side may be
//! taken under any of them, so nothing takes them while it holds the write side.

use std::borrow::Cow;
use std::cell::RefCell;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::Arc;

use tmem_wire::{Encoding, FlushStatus, GetStatus, Key, ObjectId, PutStatus, PAGE_BYTES};

use crate::charge::{self, cost, Charge};
use crate::codec::{self, Page, BLOCK_MAX};
use crate::config::{Incompressible, VmId};
use crate::index::{hash, Cursor, Shard, BLOCK_BYTES};
use crate::pool::{count, Pool, PoolRef};
use crate::slot::{SlotRef, State};
use crate::store::Store;
use crate::sync;
use crate::tuner;

struct Scratch {
    page: Page,
    block: [u8; BLOCK_MAX],
}

sync::thread_local! {
    static SCRATCH: RefCell<Box<Scratch>> =
        RefCell::new(Box::new(Scratch { page: [0; PAGE_BYTES], block: [0; BLOCK_MAX] }));
}

/// A page that has left the index; its slot is not yet free.
pub(crate) struct Taken {
    at: SlotRef,
    pub(crate) state: State,
    owner: Arc<Pool>,
    block_gone: bool,
}

impl Store {
    /// Store a page. `payload` must have the length its encoding calls for. `checksum`, if given, is the low half of
    /// the XXH3-64 of the page itself. Everything but `Stored` means that no page, old or new, is there.
    pub fn put(
        &self,
        pool: &PoolRef,
        key: &Key,
        encoding: Encoding,
        payload: &[u8],
        checksum: Option<u32>,
    ) -> PutStatus {
        let pool = &pool.0;
        let status = if pool.vm.frozen.load(SeqCst) {
            PutStatus::Frozen
        } else {
            SCRATCH.with(|scratch| {
                self.encode(pool, key, encoding, payload, checksum, &mut scratch.borrow_mut())
            })
        };
        if status == PutStatus::Stored {
            count(&pool.counters.puts_accepted, 1);
        } else {
            self.drop_page(pool, key);
            count(&pool.counters.puts_refused, 1);
        }
        status
    }

    fn encode(
        &self,
        pool: &Arc<Pool>,
        key: &Key,
        encoding: Encoding,
        payload: &[u8],
        checksum: Option<u32>,
        scratch: &mut Scratch,
    ) -> PutStatus {
        let Scratch { page: decoded, block } = scratch;
        let page: &Page = match encoding {
            Encoding::Raw => match payload.try_into() {
                Ok(page) => page,
                Err(_) => return PutStatus::Corrupt,
            },
            Encoding::SameFilled => match payload.try_into() {
                Ok(word) => {
                    codec::fill(u64::from_le_bytes(word), decoded);
                    decoded
                }
                Err(_) => return PutStatus::Corrupt,
            },
            Encoding::Lz4 if !payload.is_empty() && payload.len() < PAGE_BYTES => {
                if !codec::decompress(payload, decoded) {
                    return PutStatus::Corrupt;
                }
                decoded
            }
            Encoding::Lz4 | Encoding::None => return PutStatus::Corrupt,
        };
        let sum = codec::checksum(page);
        if checksum.is_some_and(|given| given != sum) {
            return PutStatus::Corrupt;
        }
        if let Some(word) = codec::same_filled(page) {
            return self.place(pool, key, Encoding::SameFilled, &word.to_le_bytes(), sum);
        }
        if encoding != Encoding::Lz4 && !self.compression.load(Relaxed) {
            return self.place(pool, key, Encoding::Raw, page, sum);
        }
        let limit = match self.incompressible {
            Incompressible::StoreRaw => codec::STORE_RAW_ABOVE,
            Incompressible::Refuse => codec::REFUSE_ABOVE,
        };
        let compressed = match encoding {
            Encoding::Lz4 => Some(payload),
            _ => codec::compress(page, &mut block[..limit]).map(|bytes| &block[..bytes]),
        };
        match compressed.filter(|compressed| compressed.len() <= limit) {
            Some(compressed) => self.place(pool, key, Encoding::Lz4, compressed, sum),
            None if self.incompressible == Incompressible::Refuse => PutStatus::Incompressible,
            None => self.place(pool, key, Encoding::Raw, page, sum),
        }
    }

    /// Store an encoded page. If there is no room while the old one is there too, the old one goes first.
    fn place(&self, pool: &Arc<Pool>, key: &Key, encoding: Encoding, payload: &[u8], sum: u32) -> PutStatus {
        match self.try_place(pool, key, encoding, payload, sum) {
            PutStatus::OverQuota | PutStatus::NoMemory if self.drop_page(pool, key) => {
                self.try_place(pool, key, encoding, payload, sum)
            }
            status => status,
        }
    }

    fn try_place(
        &self,
        pool: &Arc<Pool>,
        key: &Key,
        encoding: Encoding,
        payload: &[u8],
        sum: u32,
    ) -> PutStatus {
        let class = self.slabs.classes().for_payload(payload.len());
        let mut charge = Charge::new(self, pool);
        if pool.is_persistent() && !charge.page() {
            return PutStatus::OverQuota;
        }
        if let Err(status) = charge.bytes(cost(pool, self.slabs.classes().slot_bytes(class)) + BLOCK_BYTES) {
            return status;
        }
        let Some(at) = self.allocate(pool, class) else { return PutStatus::NoMemory };
        let slot = self.slabs.slot(at);
        let more = cost(pool, slot.bytes()) + BLOCK_BYTES - charge.bytes;
        if more > 0 {
            if let Err(status) = charge.bytes(more) {
                self.slabs.free(at);
                return status;
            }
        }
        let hash = self.key_hash(key);
        slot.fill(key, sum ^ hash as u32, payload);

        let mut shard = pool.index.lock(key);
        // Looked at under the lock: whoever freezes the VM or destroys the pool takes the lock after saying so.
        let refused = if pool.vm.frozen.load(SeqCst) {
            Some(PutStatus::Frozen)
        } else if pool.gone.load(SeqCst) {
            Some(PutStatus::NoMemory)
        } else {
            None
        };
        if let Some(status) = refused {
            drop(shard);
            self.slabs.free(at);
            return status;
        }
        let inserted = shard.insert(key, at);
        slot.publish(State::valid(encoding, payload.len(), pool.number));
        if !pool.is_persistent() {
            let mut eviction = pool.vm.ephemeral.lock();
            let order = eviction.order;
            eviction.list.add(&self.slabs, at, order);
            let pages = pool.vm.ephemeral_pages.used();
            if pool.is_inclusive() && tuner::sampled(hash, pages) {
                eviction.put(hash, pages);
            }
        }
        charge::add(pool, encoding, payload.len(), slot.bytes());
        let old = inserted.old.map(|old| self.take_slot(pool, old, false));
        drop(shard);
        if inserted.new_block && pool.shared.is_none() {
            count(&pool.stored.blocks, 1);
        } else {
            charge.give_back(BLOCK_BYTES);
        }
        charge.keep();
        if let Some(old) = old {
            self.release(&old, false);
        }
        PutStatus::Stored
    }

    /// Fetch a page. On a hit its payload is appended to `out`: same-filled pages as their word, LZ4 blocks as they
    /// are if `accept_lz4`, everything else as the page. The last value is the page's checksum, which the receiver of
    /// an LZ4 block has to verify; other payloads have been verified.
    pub fn get(
        &self,
        pool: &PoolRef,
        key: &Key,
        accept_lz4: bool,
        out: &mut Vec<u8>,
    ) -> (GetStatus, Encoding, u32) {
        let pool = &pool.0;
        let start = out.len();
        let hash = self.key_hash(key);
        let pages = pool.vm.ephemeral_pages.used();
        if pool.is_inclusive() && tuner::sampled(hash, pages) {
            pool.vm.ephemeral.lock().asked(hash, pages);
        }
        let mut shard = pool.index.lock(key);
        let Some(at) = shard.get(key) else {
            drop(shard);
            count(&pool.counters.gets_missed, 1);
            return (GetStatus::Miss, Encoding::None, 0);
        };
        let slot = self.slabs.slot(at);
        let state = slot.state();
        let encoding = state.encoding();
        let sum = slot.bound_checksum() ^ hash as u32;
        let exclusive = pool.kind == (tmem_wire::PoolKind::Ephemeral { exclusive: true });
        let answer = if exclusive {
            // The slot is ours alone once the page has left the index: no need to copy under the lock.
            let Some(taken) = self.take(&mut shard, pool, key) else {
                return (GetStatus::Miss, Encoding::None, 0);
            };
            drop(shard);
            // SAFETY: removed from the index, not yet freed.
            let payload = unsafe { slot.payload(state.length()) };
            let answer = deliver(encoding, payload, accept_lz4, sum, out);
            self.release(&taken, false);
            answer
        } else {
            if !pool.is_persistent() {
                slot.visit();
            }
            // SAFETY: the shard's lock is held.
            let payload = unsafe { slot.payload(state.length()) };
            if encoding == Encoding::Lz4 && !accept_lz4 {
                // Copy the block, not the page: the lock is held for a fraction of what decompression takes.
                SCRATCH.with(|scratch| {
                    let mut scratch = scratch.borrow_mut();
                    let block = &mut scratch.block[..payload.len()];
                    block.copy_from_slice(payload);
                    drop(shard);
                    deliver(encoding, block, false, sum, out)
                })
            } else {
                let answer = append(encoding, payload, out);
                drop(shard);
                answer.and_then(|encoding| verify(encoding, sum, &out[start..]))
            }
        };
        if let Some(encoding) = answer {
            count(&pool.counters.gets_hit, 1);
            return (GetStatus::Hit, encoding, sum);
        }
        out.truncate(start);
        self.lose(pool, key, at, exclusive);
        (GetStatus::Lost, Encoding::None, 0)
    }

    /// A page that fails its checksum is dropped, and counted.
    fn lose(&self, pool: &Arc<Pool>, key: &Key, at: SlotRef, taken: bool) {
        count(&self.pages_lost, 1);
        count(&pool.counters.pages_lost, 1);
        if taken {
            return;
        }
        let mut shard = pool.index.lock(key);
        if shard.get(key) == Some(at) {
            let taken = self.take(&mut shard, pool, key);
            drop(shard);
            if let Some(taken) = taken {
                self.release(&taken, true);
            }
        }
    }

    /// Forget a page.
    pub fn flush_page(&self, pool: &PoolRef, key: &Key) -> FlushStatus {
        if self.drop_page(&pool.0, key) {
            count(&pool.0.counters.pages_flushed, 1);
            FlushStatus::Flushed
        } else {
            FlushStatus::Absent
        }
    }

    /// Forget every page of an object. Answers how many there were.
    pub fn flush_object(&self, pool: &PoolRef, object: &ObjectId) -> u64 {
        let pages = self.drop_pages(&pool.0, Some(object), None, false);
        count(&pool.0.counters.pages_flushed, pages);
        pages
    }

    /// Forget every page of a pool. Answers how many there were.
    pub fn flush_pool(&self, pool: &PoolRef) -> u64 {
        let pages = self.drop_pages(&pool.0, None, None, false);
        count(&pool.0.counters.pages_flushed, pages);
        pages
    }

    /// Forget every ephemeral page of a VM. Answers how many there were.
    pub fn flush_ephemeral(&self, vm: VmId) -> u64 {
        let pools: Vec<Arc<Pool>> =
            self.directory.read().pools_of(vm).filter(|pool| !pool.is_persistent()).cloned().collect();
        pools.iter().map(|pool| self.drop_pages(pool, None, Some(pool.number), false)).sum()
    }

    fn drop_page(&self, pool: &Arc<Pool>, key: &Key) -> bool {
        let taken = self.take(&mut pool.index.lock(key), pool, key);
        taken.map(|taken| self.release(&taken, false)).is_some()
    }

    /// Drop the pages of an object, or all; of one member, or all.
    pub(crate) fn drop_pages(
        &self,
        pool: &Arc<Pool>,
        object: Option<&ObjectId>,
        member: Option<u16>,
        scrub: bool,
    ) -> u64 {
        let (mut pages, mut keys, mut gone) = (0, Vec::new(), Vec::new());
        for shard in pool.index.shards() {
            let mut from = Cursor::default();
            loop {
                // The lock is held for one block's pages at a time.
                let mut shard = shard.lock();
                if !shard.next_keys(object, &mut from, &mut keys) {
                    break;
                }
                for key in keys.drain(..) {
                    let mine = |at| member.is_none_or(|member| self.slabs.slot(at).state().pool() == member);
                    if shard.get(&key).is_some_and(mine) {
                        gone.extend(self.take(&mut shard, pool, &key));
                    }
                }
                drop(shard);
                pages += gone.len() as u64;
                for taken in gone.drain(..) {
                    self.release(&taken, scrub);
                }
            }
        }
        pages
    }

    /// Take a page out of the index. From the moment it is retired it does not come back, whatever happens.
    pub(crate) fn take(&self, shard: &mut Shard, pool: &Arc<Pool>, key: &Key) -> Option<Taken> {
        let removed = shard.remove(key)?;
        Some(self.take_slot(pool, removed.slot, removed.block_gone))
    }

    fn take_slot(&self, pool: &Arc<Pool>, at: SlotRef, block_gone: bool) -> Taken {
        let slot = self.slabs.slot(at);
        let state = slot.state();
        let owner = self.owner(pool, state.pool()).into_owned();
        if !owner.is_persistent() {
            owner.vm.ephemeral.lock().list.remove(&self.slabs, at);
        }
        slot.retire();
        Taken { at, state, owner, block_gone }
    }

    fn owner<'a>(&self, pool: &'a Arc<Pool>, number: u16) -> Cow<'a, Arc<Pool>> {
        if number == pool.number {
            return Cow::Borrowed(pool);
        }
        // A member's record goes only after its pages.
        Cow::Owned(self.directory.read_recursive().pool(number).cloned().unwrap_or_else(|| pool.clone()))
    }

    /// Free the slot of a page that was taken, and give back what was charged.
    pub(crate) fn release(&self, taken: &Taken, scrub: bool) {
        let slot = self.slabs.slot(taken.at);
        let bytes = slot.bytes();
        if scrub {
            slot.scrub();
        }
        self.slabs.free(taken.at);
        charge::uncharge(&taken.owner, taken.state, bytes, taken.block_gone);
    }

    /// The low half binds a checksum to its page's key and to this arena, the high half chooses samples.
    fn key_hash(&self, key: &Key) -> u64 {
        hash(!self.seed, &key.object, key.index)
    }
}

/// Append the payload of a hit, decompressed unless the receiver does that; `None` if it is damaged.
fn deliver(
    encoding: Encoding,
    payload: &[u8],
    accept_lz4: bool,
    sum: u32,
    out: &mut Vec<u8>,
) -> Option<Encoding> {
    if encoding != Encoding::Lz4 || accept_lz4 {
        let start = out.len();
        return append(encoding, payload, out).and_then(|encoding| verify(encoding, sum, &out[start..]));
    }
    let start = out.len();
    out.resize(start + PAGE_BYTES, 0);
    let page: &mut Page = (&mut out[start..]).try_into().ok()?;
    (codec::decompress(payload, page) && codec::checksum(page) == sum).then_some(Encoding::Raw)
}

fn append(encoding: Encoding, payload: &[u8], out: &mut Vec<u8>) -> Option<Encoding> {
    out.extend_from_slice(payload);
    (encoding != Encoding::None).then_some(encoding)
}

fn verify(encoding: Encoding, sum: u32, payload: &[u8]) -> Option<Encoding> {
    let intact = match encoding {
        Encoding::Raw => codec::checksum(payload.try_into().ok()?) == sum,
        Encoding::SameFilled => codec::word_checksum(u64::from_le_bytes(payload.try_into().ok()?)) == sum,
        Encoding::Lz4 => !payload.is_empty(),
        Encoding::None => false,
    };
    intact.then_some(encoding)
}
