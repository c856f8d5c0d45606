//! Hit ratio of the store's eviction against LRU and against Belady's optimum, on traces made here.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tmem_store::{Store, StoreConfig, VmLimits};
use tmem_wire::{Encoding, GetStatus, Key, PoolCreate, PoolKind};

use crate::Samples;

const CACHE_PAGES: usize = 5_000;
const REQUESTS: usize = 400_000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Popularity falls with rank to the power 0.9 over 100 000 pages.
fn zipf() -> Vec<u32> {
    let mut cumulative: Vec<f64> = Vec::new();
    let mut sum = 0.0;
    for rank in 1..=100_000 {
        sum += f64::from(rank).powf(-0.9);
        cumulative.push(sum);
    }
    let mut random = Random(1);
    (0..REQUESTS).map(|_| cumulative.partition_point(|&to| to < random.unit() * sum) as u32).collect()
}

/// Reading a file a quarter larger than the cache from end to end, again and again.
fn repeated() -> Vec<u32> {
    (0..REQUESTS).map(|i| (i % (CACHE_PAGES * 5 / 4)) as u32).collect()
}

/// A hot set of 80 % of the cache in half of the requests, and scans of pages never seen again in the other half.
fn scan_and_hot() -> Vec<u32> {
    let mut random = Random(7);
    let hot = CACHE_PAGES as u64 * 8 / 10;
    let (mut fresh, mut left) = (1_000_000, 0);
    let mut trace = Vec::with_capacity(REQUESTS);
    while trace.len() < REQUESTS {
        if left == 0 {
            left = CACHE_PAGES;
            trace.extend((0..CACHE_PAGES).map(|_| (random.next() % hot) as u32));
        }
        for _ in 0..left {
            fresh += 1;
            trace.push(fresh);
        }
        left = 0;
    }
    trace
}

/// A working set that moves: zipf over 20 000 pages, starting elsewhere every 40 000 requests.
fn drifting() -> Vec<u32> {
    let mut random = Random(11);
    (0..REQUESTS)
        .map(|i| {
            let rank = (20_000_f64.powf(random.unit()) - 1.0) as u32;
            (i / 40_000) as u32 * 7_000 + rank
        })
        .collect()
}

pub(crate) fn run(samples: &mut Samples) {
    let traces: [(&str, Vec<u32>); 4] =
        [("zipf", zipf()), ("loop", repeated()), ("scan_hot", scan_and_hot()), ("drift", drifting())];
    for (name, trace) in traces {
        let (ours, capacity) = store(&trace);
        samples.insert(format!("hit_ratio_{name}"), vec![ours]);
        samples.insert(format!("hit_ratio_lru_{name}"), vec![lru(&trace, capacity)]);
        samples.insert(format!("hit_ratio_optimal_{name}"), vec![optimal(&trace, capacity)]);
    }
}

/// The store itself, in an inclusive pool with a quota: a miss is followed by a put, as a file cache does.
fn store(trace: &[u32]) -> (f64, usize) {
    let (store, _) = Store::open(&StoreConfig::memfd(64 << 20)).unwrap();
    let limits = VmLimits { quota_bytes: 0, ..VmLimits::default() };
    let vm = store.add_vm("trace", &limits).unwrap();
    let pool = PoolCreate::private(PoolKind::Ephemeral { exclusive: false }, "cache");
    let pool = store.pool(vm, store.create_pool(vm, &pool).unwrap()).unwrap();
    let mut page = [0; 4096];
    // Pages are alike, so the quota is a number of pages.
    store.set_limits(vm, &VmLimits::default()).unwrap();
    let key = |page: u32| Key { object: [0; 16], index: page };
    for index in 0..CACHE_PAGES as u32 {
        page[..8].copy_from_slice(&u64::from(index + 1).to_le_bytes());
        store.put(&pool, &key(index * 64), Encoding::Raw, &page, None);
    }
    let quota_bytes = store.vm_stats(vm).unwrap().used_bytes;
    store.flush_pool(&pool);
    store.set_limits(vm, &VmLimits { quota_bytes, ..limits }).unwrap();
    let (mut hits, mut most, mut out) = (0, 0, Vec::new());
    for &number in trace {
        out.clear();
        // Every page in a block of its own: all cost the same.
        let key = Key { object: u128::from(number).to_le_bytes(), index: 0 };
        if store.get(&pool, &key, true, &mut out).0 == GetStatus::Hit {
            hits += 1;
        } else {
            page[..8].copy_from_slice(&(u64::from(number) + 1).to_le_bytes());
            store.put(&pool, &key, Encoding::Raw, &page, None);
            most = most.max(store.vm_stats(vm).unwrap().ephemeral_pages as usize);
        }
    }
    (f64::from(hits) / trace.len() as f64, most)
}

fn lru(trace: &[u32], capacity: usize) -> f64 {
    let (mut last, mut order, mut hits) = (HashMap::new(), BTreeMap::new(), 0);
    for (now, &page) in trace.iter().enumerate() {
        if let Some(then) = last.insert(page, now) {
            hits += 1;
            order.remove(&then);
        } else if order.len() == capacity {
            let (_, oldest) = order.pop_first().unwrap();
            last.remove(&oldest);
        }
        order.insert(now, page);
    }
    f64::from(hits) / trace.len() as f64
}

/// Belady: of the pages there and the page asked for, the one that is not needed for longest is left out.
fn optimal(trace: &[u32], capacity: usize) -> f64 {
    let mut next_use = vec![usize::MAX; trace.len()];
    let mut seen: HashMap<u32, usize> = HashMap::new();
    for (at, page) in trace.iter().enumerate().rev() {
        next_use[at] = seen.insert(*page, at).unwrap_or(usize::MAX);
    }
    let (mut cached, mut order, mut hits) = (HashMap::new(), BTreeSet::new(), 0);
    for (&page, &next) in trace.iter().zip(&next_use) {
        if let Some(then) = cached.insert(page, next) {
            hits += 1;
            order.remove(&(then, page));
        }
        order.insert((next, page));
        if order.len() > capacity {
            let (_, furthest) = order.pop_last().unwrap();
            cached.remove(&furthest);
        }
    }
    f64::from(hits) / trace.len() as f64
}
