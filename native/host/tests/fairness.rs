//! One VM floods the engine in every way it can; another one asks for single pages. What does it notice, and how much
//! memory does the daemon need? `make bench-fairness` measures how long exactly; here it must stay within bounds that
//! hold on a busy machine too.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test fails by panicking

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tmem_host::listener::SocketOptions;
use tmem_host::{Engine, Limits, VmSpec};
use tmem_store::{Store, StoreConfig, VmLimits};
use tmem_wire::pages::{write_keys, PutWriter};
use tmem_wire::{
    Encoding, Header, HelloRequest, Key, Op, PoolCreate, PoolKind, Role, HEADER_BYTES, PAGE_BYTES,
};

const CAPACITY_BYTES: u64 = 64 << 20;
/// Connections of the flooder that try at a time; more than a VM may have.
const FLOODERS: usize = 24;
/// How long the victim is watched for each way of flooding.
const WATCHED: Duration = Duration::from_millis(700);
/// The longest a get of the victim may take, but for one in a hundred. A VM's turn is not over before its largest batch,
/// some 0.4 ms, and 24 flooding threads and this test share the machine's CPUs; starved, it would take seconds.
const BOUND: Duration = Duration::from_millis(50);
/// What connections may hold beside their buffers: stacks, small buffers.
const CONNECTION_BYTES: u64 = 1 << 20;

struct Client {
    stream: UnixStream,
    pool: u32,
}

impl Client {
    fn connect(socket: &Path) -> std::io::Result<Client> {
        let mut client = Client { stream: UnixStream::connect(socket)?, pool: 0 };
        client.stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let hello = HelloRequest::new(Role::FileCache, [7; 16]);
        let mut out = Vec::new();
        Header::request(Op::Hello, 0).write_frame(&hello.encode(), &mut out);
        let kind = PoolKind::Ephemeral { exclusive: false };
        Header::request(Op::PoolCreate, 1).write_frame(&PoolCreate::private(kind, "p").encode(), &mut out);
        client.stream.write_all(&out)?;
        client.answer()?;
        client.pool = client.answer()?.0.pool;
        Ok(client)
    }

    fn answer(&mut self) -> std::io::Result<(Header, Vec<u8>)> {
        let mut head = [0; HEADER_BYTES];
        self.stream.read_exact(&mut head)?;
        let header = Header::decode(&head).map_err(std::io::Error::other)?;
        let mut body = vec![0; header.length as usize];
        self.stream.read_exact(&mut body)?;
        Ok((header, body))
    }

    fn put(&mut self, pages: u32) -> std::io::Result<()> {
        let mut out = Vec::new();
        let mut writer = PutWriter::begin(&mut out, 2, self.pool, pages as u16, false);
        for index in 0..pages {
            writer.page(&key(index), Encoding::Raw, &page(index), 0);
        }
        writer.end();
        self.stream.write_all(&out)?;
        self.answer().map(|_| ())
    }

    fn gets(&self, pages: u32) -> Vec<u8> {
        let keys: Vec<Key> = (0..pages).map(key).collect();
        let mut out = Vec::new();
        write_keys(Op::Get, 3, self.pool, false, &keys, &mut out);
        out
    }
}

fn key(index: u32) -> Key {
    Key { object: [5; 16], index }
}

/// Bytes that do not compress, so that every page has its full size everywhere.
fn page(index: u32) -> [u8; PAGE_BYTES] {
    let mut random = u64::from(index) + 1;
    std::array::from_fn(|_| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 56) as u8
    })
}

/// Misbehave once on a new connection, until told to end or cut off.
type Way = fn(&Path, &AtomicBool) -> std::io::Result<()>;

fn max_batches(socket: &Path, end: &AtomicBool) -> std::io::Result<()> {
    let mut client = Client::connect(socket)?;
    client.put(256)?;
    let frame = client.gets(256);
    while !end.load(Ordering::Relaxed) {
        client.stream.write_all(&frame)?;
        client.answer()?;
    }
    Ok(())
}

fn max_puts(socket: &Path, end: &AtomicBool) -> std::io::Result<()> {
    let mut client = Client::connect(socket)?;
    while !end.load(Ordering::Relaxed) {
        client.put(256)?;
    }
    Ok(())
}

fn tiny_batches(socket: &Path, end: &AtomicBool) -> std::io::Result<()> {
    let mut client = Client::connect(socket)?;
    client.put(1)?;
    let frames = client.gets(1).repeat(32);
    while !end.load(Ordering::Relaxed) {
        client.stream.write_all(&frames)?;
        for _ in 0..32 {
            client.answer()?;
        }
    }
    Ok(())
}

fn connect_storm(socket: &Path, end: &AtomicBool) -> std::io::Result<()> {
    while !end.load(Ordering::Relaxed) {
        drop(UnixStream::connect(socket)?);
    }
    Ok(())
}

fn never_read(socket: &Path, end: &AtomicBool) -> std::io::Result<()> {
    let mut client = Client::connect(socket)?;
    client.put(256)?;
    client.stream.set_write_timeout(Some(Duration::from_millis(100)))?;
    let frame = client.gets(256);
    while !end.load(Ordering::Relaxed) {
        // Fails at the time-out once every buffer between here and there is full, and is tried again.
        let _ = client.stream.write(&frame);
    }
    Ok(())
}

fn half_frames(socket: &Path, end: &AtomicBool) -> std::io::Result<()> {
    let mut client = Client::connect(socket)?;
    let header = Header { length: 1_000_000, count: 256, pool: client.pool, ..Header::request(Op::Put, 4) };
    client.stream.write_all(&header.encode())?;
    client.stream.write_all(&vec![0; 900_000])?;
    while !end.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn garbage(socket: &Path, _: &AtomicBool) -> std::io::Result<()> {
    let mut client = Client::connect(socket)?;
    client.stream.write_all(&[0x5a; 4096])?;
    client.answer().map(|_| ())
}

/// Tells the flooding threads to end, also when the test fails.
struct Until<'a>(&'a AtomicBool);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn engine(dir: &Path, limits: &Limits) -> Arc<Engine> {
    let (store, _) = Store::open(&StoreConfig::memfd(CAPACITY_BYTES)).unwrap();
    let options = SocketOptions { mode: 0o600, gid: None };
    let engine = Engine::new(Arc::new(store), limits.clone(), options).unwrap();
    for name in ["victim", "flooder"] {
        let spec = VmSpec { hybrid_socket: Some(dir.join(name)), ..VmSpec::default() };
        engine.add_vm(name, &spec, &VmLimits { quota_bytes: 16 << 20, ..VmLimits::default() }).unwrap();
    }
    engine
}

fn socket(dir: &Path, vm: &str) -> PathBuf {
    dir.join(format!("{vm}_{}", tmem_wire::PORT))
}

/// Anonymous memory of this process: the arena is shared memory and not counted.
fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// The 99th percentile of single gets with pauses in between, for a while.
fn watch(victim: &mut Client, seen: &mut u64) -> Duration {
    let frame = victim.gets(1);
    let mut times = Vec::new();
    let began = Instant::now();
    while began.elapsed() < WATCHED {
        let sent = Instant::now();
        victim.stream.write_all(&frame).unwrap();
        let (_, body) = victim.answer().unwrap();
        times.push(sent.elapsed());
        assert!(body.ends_with(&page(0)), "the victim got something else than its page");
        *seen = (*seen).max(anonymous_bytes());
        std::thread::sleep(Duration::from_micros(200));
    }
    assert!(times.len() > 20, "the victim got only {} pages in {WATCHED:?}", times.len());
    times.sort();
    times[times.len() * 99 / 100]
}

#[test]
fn no_way_of_flooding_starves_another_vm_or_the_daemon() {
    let dir = Dir(std::env::temp_dir().join(format!("tmem-fair-{}", std::process::id())));
    std::fs::create_dir_all(&dir.0).unwrap();
    let limits = Limits::default();
    let engine = engine(&dir.0, &limits);
    let mut victim = Client::connect(&socket(&dir.0, "victim")).unwrap();
    victim.put(1).unwrap();
    let before = anonymous_bytes();
    let bound = limits.in_flight_bytes + (limits.connections as u64 + 1) * CONNECTION_BYTES
        // What the flooding threads of this process hold themselves: a batch of requests and one of answers.
        + FLOODERS as u64 * (4 << 20);
    let ways: [(&str, Way); 7] = [
        ("the largest batches", max_batches),
        ("the largest batches of puts", max_puts),
        ("single pages", tiny_batches),
        ("connections", connect_storm),
        ("requests whose answers are not read", never_read),
        ("half-open frames", half_frames),
        ("garbage", garbage),
    ];
    for (what, way) in ways {
        let end = AtomicBool::new(false);
        let mut seen = 0;
        let p99 = std::thread::scope(|scope| {
            let until = Until(&end);
            for _ in 0..FLOODERS {
                let (end, path) = (&end, socket(&dir.0, "flooder"));
                scope.spawn(move || {
                    while !end.load(Ordering::Relaxed) {
                        // Refused, cut off, throttled: again.
                        let _ = way(&path, end);
                        std::thread::sleep(Duration::from_millis(1));
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(200));
            let interruptions = || engine.vm("flooder").unwrap().counters.gave_way.load(Ordering::Relaxed);
            let before_watching = interruptions();
            let p99 = watch(&mut victim, &mut seen);
            if what.contains("batches") {
                // 256 pages take a millisecond or so: unless their thread makes room, the victim waits that long.
                let made_room = interruptions() - before_watching;
                assert!(
                    made_room > 50,
                    "{what}: in {WATCHED:?} the flooder's threads made room {made_room} times"
                );
            }
            assert!(engine.vm("flooder").unwrap().connections() <= limits.connections, "{what}");
            assert!(engine.in_flight_bytes() <= limits.in_flight_bytes, "{what}");
            drop(until);
            // Whoever waits in a read or write is let go.
            engine.remove_vm("flooder").unwrap();
            p99
        });
        assert!(p99 < BOUND, "with a flood of {what}, a get took {p99:?}");
        assert!(seen < before + bound, "with a flood of {what}, {seen} bytes, before {before}");
        let spec = VmSpec { hybrid_socket: Some(dir.0.join("flooder")), ..VmSpec::default() };
        let share = VmLimits { quota_bytes: 16 << 20, ..VmLimits::default() };
        engine.add_vm("flooder", &spec, &share).unwrap();
    }
}
