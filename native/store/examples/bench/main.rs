//! Measures the store against the codec alone, and what it does with its memory. `bench/store.py` drives it and
//! compares with other stores.
//!
//! `bench CORPUS [SECTION…]`, sections being `micro`, `threads`, `churn`, `recovery`, `scale`, `traces`, `zram` (needs the
//! device's path in `TMEM_BENCH_ZRAM`, and overwrites it); prints one JSON object with the samples of every figure.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a benchmark that cannot go on has failed

mod scale;
mod traces;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use tmem_store::codec::{self, Page};
use tmem_store::{PoolRef, Store, StoreConfig, VmLimits};
use tmem_wire::{Encoding, GetStatus, Key, PoolCreate, PoolKind, PutStatus};

/// Counts the heap in use, for the true size of the index.
struct Counting;

static HEAP: AtomicUsize = AtomicUsize::new(0);

/// What glibc's allocator takes for a request.
fn chunk(bytes: usize) -> usize {
    (bytes + 8).next_multiple_of(16).max(32)
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HEAP.fetch_add(chunk(layout.size()), Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HEAP.fetch_sub(chunk(layout.size()), Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

type Section = fn(&[Page], &mut Samples);
type Samples = BTreeMap<String, Vec<f64>>;

fn main() {
    let mut args = std::env::args().skip(1);
    let corpus = std::fs::read(args.next().expect("usage: bench CORPUS [SECTION…]")).expect("corpus");
    let sections: Vec<String> = args.collect();
    let pages: Vec<Page> = corpus
        .chunks_exact(4096)
        .map(|page| page.try_into().unwrap())
        .filter(|page| codec::same_filled(page).is_none())
        .collect();
    let mut samples = Samples::new();
    let all: [(&str, Section); 7] = [
        ("micro", micro),
        ("threads", threads),
        ("churn", churn),
        ("recovery", recovery),
        ("scale", scale::run),
        ("zram", zram),
        ("traces", |_, samples| traces::run(samples)),
    ];
    for (name, section) in all {
        if sections.is_empty() || sections.iter().any(|wanted| wanted == name) {
            section(&pages, &mut samples);
        }
    }
    println!("{}", serde_json::to_string(&samples).unwrap());
}

fn key(index: usize) -> Key {
    Key { object: *b"benchmark object", index: index as u32 }
}

fn open(capacity: u64, kind: PoolKind) -> (Store, PoolRef) {
    let (store, _) = Store::open(&StoreConfig::memfd(capacity)).unwrap();
    let vm = store.add_vm("bench", &VmLimits::default()).unwrap();
    let pool = store.create_pool(vm, &PoolCreate::private(kind, "bench")).unwrap();
    let pool = store.pool(vm, pool).unwrap();
    (store, pool)
}

/// CPU time of this thread, nanoseconds: other programs on the machine do not count.
fn cpu_ns() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}

/// Put and get against compression and decompression alone, in rounds of a few hundred pages each that are
/// interleaved, so that whatever else the machine does meets all alike.
fn micro(pages: &[Page], samples: &mut Samples) {
    const ROUND: usize = 256;
    let (store, pool) = open(1 << 30, PoolKind::Persistent);
    let mut block = vec![0; codec::STORE_RAW_ABOVE];
    let blocks: Vec<Option<Vec<u8>>> = pages
        .iter()
        .map(|page| codec::compress(page, &mut block).map(|bytes| block[..bytes].to_vec()))
        .collect();
    let (mut page, mut out) = ([0; 4096], Vec::with_capacity(8192));
    let zero = [0; 4096];
    let rounds: Vec<usize> = (0..pages.len() - ROUND).step_by(ROUND).collect();
    for pass in 0..4 {
        for &first in &rounds {
            let mut add = |name: &str, each: &mut dyn FnMut(usize)| {
                let start = cpu_ns();
                for index in first..first + ROUND {
                    each(index);
                }
                let each = (cpu_ns() - start) / ROUND as f64;
                // The first pass takes memory from the host; all others find it there, as a store in use does.
                if pass > 0 {
                    samples.entry(name.into()).or_default().push(each);
                }
            };
            add("codec_compress_ns", &mut |i| {
                black_box(codec::compress(&pages[i], &mut block));
            });
            add("put_ns", &mut |i| {
                assert_eq!(store.put(&pool, &key(i), Encoding::Raw, &pages[i], None), PutStatus::Stored);
            });
            add("codec_decompress_ns", &mut |i| {
                match &blocks[i] {
                    Some(block) => assert!(codec::decompress(block, &mut page)),
                    None => page.copy_from_slice(&pages[i]),
                }
                black_box(&page);
            });
            add("get_ns", &mut |i| {
                out.clear();
                assert_eq!(store.get(&pool, &key(i), false, &mut out).0, GetStatus::Hit);
                black_box(&out);
            });
            add("get_lz4_ns", &mut |i| {
                out.clear();
                assert_eq!(store.get(&pool, &key(i), true, &mut out).0, GetStatus::Hit);
                black_box(&out);
            });
            add("checksum_ns", &mut |i| {
                black_box(codec::checksum(&pages[i]));
            });
            add("replace_ns", &mut |i| {
                store.put(&pool, &key(i), Encoding::Raw, &pages[pages.len() - 1 - i], None);
            });
            add("flush_ns", &mut |i| {
                black_box(store.flush_page(&pool, &key(i)));
            });
            add("put_same_filled_ns", &mut |i| {
                assert_eq!(store.put(&pool, &key(i), Encoding::Raw, &zero, None), PutStatus::Stored);
            });
            add("get_same_filled_ns", &mut |i| {
                out.clear();
                assert_eq!(store.get(&pool, &key(i), false, &mut out).0, GetStatus::Hit);
            });
        }
        // In between, everything is stored at once, so that gets find cold slots too.
        for (i, page) in pages.iter().enumerate() {
            store.put(&pool, &key(i), Encoding::Raw, page, None);
        }
        if pass > 0 {
            for &first in &rounds {
                for (name, plain) in [("cold_codec_decompress_ns", true), ("cold_get_ns", false)] {
                    let start = cpu_ns();
                    for i in first..first + ROUND {
                        out.clear();
                        if !plain {
                            assert_eq!(store.get(&pool, &key(i), false, &mut out).0, GetStatus::Hit);
                        } else if let Some(block) = &blocks[i] {
                            assert!(codec::decompress(block, &mut page));
                        } else {
                            page.copy_from_slice(&pages[i]);
                        }
                        black_box((&out, &page));
                    }
                    samples.entry(name.into()).or_default().push((cpu_ns() - start) / ROUND as f64);
                }
            }
        }
        store.flush_pool(&pool);
    }
    let stored = |block: &Option<Vec<u8>>| block.as_ref().map_or(4096, Vec::len);
    let total: usize = blocks.iter().map(stored).sum();
    samples.insert("corpus_pages".into(), vec![pages.len() as f64]);
    samples.insert("corpus_ratio".into(), vec![total as f64 / (pages.len() * 4096) as f64]);
}

/// CPU time that everything but this process has used, or that the hypervisor withheld, seconds.
fn elsewhere_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").expect("/proc/stat");
    let ticks: Vec<f64> =
        stat.lines().next().unwrap().split_whitespace().skip(1).map(|tick| tick.parse().unwrap()).collect();
    // user, nice, system, irq, softirq, steal, in hundredths of a second.
    let busy = [0, 1, 2, 5, 6, 7].iter().map(|&at| ticks[at]).sum::<f64>() / 100.0;
    let own = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    busy - own.tv_sec as f64 - own.tv_nsec as f64 / 1e9
}

/// Every page put and fetched, on one thread, two, and all cores; and compressed and decompressed by as many threads
/// that share nothing, which is what the machine itself gains by a second thread. Pages a second by the wall clock.
///
/// Two threads are faster than one only while there are two processors: rounds during which others took more than 3 %
/// of them do not count, unless hardly a round is left. (A thread that waits for a lock leaves its processor idle: such
/// rounds count.)
fn threads(pages: &[Page], samples: &mut Samples) {
    const PASSES: usize = 3;
    const WANTED: usize = 15;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (store, pool) = open(2 << 30, PoolKind::Persistent);
    let with_store = |thread: usize| {
        let mut out = Vec::with_capacity(8192);
        for (i, page) in pages.iter().enumerate() {
            let key = key(thread << 20 | i);
            assert_eq!(store.put(&pool, &key, Encoding::Raw, page, None), PutStatus::Stored);
            out.clear();
            assert_eq!(store.get(&pool, &key, false, &mut out).0, GetStatus::Hit);
        }
    };
    let with_codec = |_: usize| {
        let (mut block, mut decoded) = ([0; codec::STORE_RAW_ABOVE], [0; 4096]);
        for page in pages {
            match codec::compress(page, &mut block) {
                Some(bytes) => assert!(codec::decompress(&block[..bytes], &mut decoded)),
                None => decoded.copy_from_slice(page),
            }
            black_box(&decoded);
        }
    };
    let rate = |threads: usize, work: &(dyn Fn(usize) + Sync)| {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                scope.spawn(move || (0..PASSES).for_each(|_| work(thread)));
            }
        });
        (PASSES * threads * pages.len()) as f64 / start.elapsed().as_secs_f64()
    };
    let mut counts = vec![1, 2, cores];
    counts.sort_unstable();
    counts.dedup();
    rate(cores.max(2), &with_store);
    let mut rounds: Vec<(bool, Vec<(String, f64)>)> = Vec::new();
    let began = Instant::now();
    let quiet = |rounds: &[(bool, _)]| rounds.iter().filter(|(quiet, _)| *quiet).count();
    while quiet(&rounds) < WANTED && began.elapsed().as_secs() < 60 {
        let (start, elsewhere) = (Instant::now(), elsewhere_s());
        let mut round = Vec::new();
        for &threads in &counts {
            round.push((format!("threads{threads}_pages_per_s"), rate(threads, &with_store)));
            round.push((format!("codec_threads{threads}_pages_per_s"), rate(threads, &with_codec)));
        }
        let taken = (elsewhere_s() - elsewhere) / (start.elapsed().as_secs_f64() * cores as f64);
        rounds.push((taken < 0.03, round));
    }
    let all = quiet(&rounds) < WANTED / 3;
    samples.insert("threads_rounds_disturbed".into(), vec![(rounds.len() - quiet(&rounds)) as f64]);
    for (name, rate) in rounds.into_iter().filter(|(quiet, _)| *quiet || all).flat_map(|(_, round)| round) {
        samples.entry(name).or_default().push(rate);
    }
}

/// Ten times the capacity of pages of mixed compressibility, then: how much of the arena is payload, and how many
/// bytes go on metadata.
fn churn(pages: &[Page], samples: &mut Samples) {
    const CAPACITY: u64 = 512 << 20;
    let heap = HEAP.load(Relaxed);
    let (store, pool) = open(CAPACITY, PoolKind::Ephemeral { exclusive: false });
    let empty = HEAP.load(Relaxed) - heap;
    let mut state = 88_172_645_463_325_252_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let keys = 600_000;
    let (mut written, mut puts) = (0, 0_u32);
    let start = Instant::now();
    let mut mark = CAPACITY;
    while written < 10 * CAPACITY {
        let page = &pages[random() as usize % pages.len()];
        let status = store.put(&pool, &key(random() as usize % keys), Encoding::Raw, page, None);
        assert_eq!(status, PutStatus::Stored);
        puts += 1;
        if puts % 1024 == 0 {
            let usage = store.usage();
            written = u64::from(puts) * usage.payload_bytes / usage.pages;
            if written > mark && usage.backed_bytes == usage.capacity_bytes {
                mark = written + CAPACITY;
                samples
                    .entry("payload_utilisation_over_time".into())
                    .or_default()
                    .push(usage.payload_bytes as f64 / usage.capacity_bytes as f64);
            }
        }
    }
    let elapsed = start.elapsed().as_nanos() as f64;
    let usage = store.usage();
    let index = HEAP.load(Relaxed) - heap - empty;
    let mut add = |name: &str, value: f64| drop(samples.insert(name.into(), vec![value]));
    add("payload_utilisation", usage.payload_bytes as f64 / usage.capacity_bytes as f64);
    add("metadata_bytes_per_page", 36.0 + index as f64 / usage.pages as f64);
    add("metadata_reported_per_page", usage.metadata_bytes as f64 / usage.pages as f64);
    add("churn_put_ns", elapsed / f64::from(puts));
    add("churn_moved_per_put", usage.pages_moved as f64 / f64::from(puts));
    add("churn_evicted_per_put", usage.pages_evicted as f64 / f64::from(puts));
    add("memory_bytes_per_page", (usage.used_bytes as f64) / usage.pages as f64);
}

/// Seconds from opening an arena with 1 GiB of stored pages until it serves.
fn recovery(pages: &[Page], samples: &mut Samples) {
    let path = std::path::PathBuf::from(format!("/dev/shm/tmem-bench-{}", std::process::id()));
    let config = StoreConfig::file(&path, 1300 << 20);
    {
        let (store, _) = Store::open(&config).unwrap();
        let vm = store.add_vm("bench", &VmLimits::default()).unwrap();
        let pool = store.create_pool(vm, &PoolCreate::private(PoolKind::Persistent, "bench")).unwrap();
        let pool = store.pool(vm, pool).unwrap();
        let mut index = 0;
        while store.usage().payload_bytes < 1 << 30 {
            for _ in 0..4096 {
                let page = &pages[index % pages.len()];
                assert_eq!(store.put(&pool, &key(index), Encoding::Raw, page, None), PutStatus::Stored);
                index += 1;
            }
        }
        samples.insert("recovery_pages".into(), vec![index as f64]);
    }
    for _ in 0..5 {
        let start = Instant::now();
        let (store, _) = Store::open(&config).unwrap();
        let vm = store.find_vm("bench").unwrap();
        let pool = store.pool(vm, store.pool_stats(vm)[0].id).unwrap();
        let mut out = Vec::new();
        assert_eq!(store.get(&pool, &key(12345), false, &mut out).0, GetStatus::Hit);
        samples.entry("recovery_1gib_s".into()).or_default().push(start.elapsed().as_secs_f64());
    }
    let _ = std::fs::remove_file(&path);
}

/// Writes and reads of single pages on a zram device, past the page cache, against puts and gets.
fn zram(pages: &[Page], samples: &mut Samples) {
    use rustix::fs::{Mode, OFlags};
    #[repr(align(4096))]
    struct Aligned(Page);
    const ROUND: usize = 256;
    let Ok(path) = std::env::var("TMEM_BENCH_ZRAM") else { return };
    let device = rustix::fs::open(path, OFlags::RDWR | OFlags::DIRECT, Mode::empty()).expect("zram device");
    let (store, pool) = open(1 << 30, PoolKind::Persistent);
    let mut buffer = Box::new(Aligned([0; 4096]));
    let mut out = Vec::with_capacity(8192);
    for pass in 0..4 {
        for first in (0..pages.len() - ROUND).step_by(ROUND) {
            let mut add = |name: &str, each: &mut dyn FnMut(usize)| {
                let start = cpu_ns();
                for index in first..first + ROUND {
                    each(index);
                }
                if pass > 0 {
                    samples.entry(name.into()).or_default().push((cpu_ns() - start) / ROUND as f64);
                }
            };
            add("zram_write_ns", &mut |i| {
                buffer.0 = pages[i];
                assert_eq!(rustix::io::pwrite(&device, &buffer.0, i as u64 * 4096), Ok(4096));
            });
            add("zram_put_ns", &mut |i| {
                buffer.0 = pages[i];
                assert_eq!(store.put(&pool, &key(i), Encoding::Raw, &buffer.0, None), PutStatus::Stored);
            });
            add("zram_read_ns", &mut |i| {
                assert_eq!(rustix::io::pread(&device, &mut buffer.0, i as u64 * 4096), Ok(4096));
                black_box(&buffer.0);
            });
            add("zram_get_ns", &mut |i| {
                out.clear();
                assert_eq!(store.get(&pool, &key(i), false, &mut out).0, GetStatus::Hit);
                black_box(&out);
            });
        }
    }
}
