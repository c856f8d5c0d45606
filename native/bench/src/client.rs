//! A tmem client: fills a pool, then times gets or puts in batches, with some frames in flight.

use std::io::{Read, Write};
use std::ops::Range;
use std::time::{Duration, Instant};

use tmem_store::{Store, StoreConfig, VmLimits};
use tmem_wire::pages::{decode_got, write_keys, PutWriter, GET_ENTRY_BYTES, KEY_BYTES, PUT_ENTRY_BYTES};
use tmem_wire::{
    Encoding, GetStatus, Header, HelloRequest, Key, Op, PoolCreate, PoolKind, PutStatus, Role, HEADER_BYTES,
    MAX_BODY_BYTES, PAGE_BYTES,
};

use crate::endpoint::{Endpoint, Stream};
use crate::report::{Report, Times};
use crate::Failure;

/// What the pages hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Content {
    /// Bytes that do not compress: each page travels and is stored whole.
    Raw,
    /// Pages that compress to about half.
    Half,
}

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Work {
    Get,
    Put,
}

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The server.
    endpoint: Endpoint,
    /// What to time.
    #[arg(long, default_value = "get")]
    work: Work,
    /// Pages in a frame.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Frames unanswered at a time.
    #[arg(long, default_value_t = 1)]
    in_flight: usize,
    /// Frames timed.
    #[arg(long, default_value_t = 20_000)]
    count: usize,
    /// Stop after this many seconds, if the frames are not done by then.
    #[arg(long)]
    seconds: Option<f64>,
    /// Pages in the pool.
    #[arg(long, default_value_t = 4096)]
    pages: u32,
    /// What they hold.
    #[arg(long, default_value = "raw")]
    content: Content,
    /// Pause between frames, for a client that is not alone in the world.
    #[arg(long, default_value_t = 0)]
    pause_us: u64,
    /// Look whether every page that comes back is the one that was put; not for measuring.
    #[arg(long)]
    verify: bool,
    /// Most bytes in one write; 0 for no limit. Needed with vhost-device-vsock.
    #[arg(long, default_value_t = 0)]
    write_bytes: usize,
}

/// A connection with a pool.
pub(crate) struct Client {
    pub(crate) stream: Box<dyn Stream>,
    pub(crate) pool: u32,
    write_bytes: usize,
    /// What has arrived: the answers before `next` are dealt with.
    input: Vec<u8>,
    arrived: usize,
    next: usize,
    /// Where the body of the latest answer is.
    body: Range<usize>,
}

/// Room for the largest answer and the start of the next.
const INPUT_BYTES: usize = HEADER_BYTES + MAX_BODY_BYTES + 64 * 1024;

/// The page of `index`.
pub(crate) fn page(content: Content, index: u32) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    let mut random = u64::from(index) + 1;
    let random_bytes = if content == Content::Raw { PAGE_BYTES } else { PAGE_BYTES / 2 };
    for chunk in page[..random_bytes].chunks_exact_mut(8) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        chunk.copy_from_slice(&random.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    page
}

pub(crate) fn key(index: u32) -> Key {
    Key { object: [7; 16], index }
}

impl Client {
    /// Connect and make an inclusive pool.
    pub(crate) fn connect(endpoint: &Endpoint, write_bytes: usize, name: &str) -> Result<Client, Failure> {
        let spec = PoolCreate::private(PoolKind::Ephemeral { exclusive: false }, name);
        Client::connect_as(endpoint, write_bytes, boot_id(), &spec)
    }

    /// Connect as this boot of the guest, and make this pool or find it again.
    pub(crate) fn connect_as(
        endpoint: &Endpoint,
        write_bytes: usize,
        boot_id: [u8; 16],
        pool: &PoolCreate,
    ) -> Result<Client, Failure> {
        let stream = endpoint.connect()?;
        let input = vec![0; INPUT_BYTES];
        let mut client = Client { stream, pool: 0, write_bytes, input, arrived: 0, next: 0, body: 0..0 };
        let hello = HelloRequest::new(Role::FileCache, boot_id).named("tmem-bench");
        let mut out = Vec::new();
        Header::request(Op::Hello, 1).write_frame(&hello.encode(), &mut out);
        client.send(&out)?;
        client.answer()?;
        out.clear();
        Header::request(Op::PoolCreate, 2).write_frame(&pool.encode(), &mut out);
        client.send(&out)?;
        client.pool = client.answer()?.pool;
        Ok(client)
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let most = if self.write_bytes == 0 { bytes.len() } else { self.write_bytes };
        for part in bytes.chunks(most.max(1)) {
            self.stream.write_all(part)?;
        }
        Ok(())
    }

    /// Read an answer, in one go if it is there, as the guest's programs do.
    pub(crate) fn answer(&mut self) -> Result<Header, Failure> {
        self.receive(HEADER_BYTES)?;
        let head = self.input[self.next..].first_chunk().ok_or("no header")?;
        let header = Header::decode(head)?;
        let whole = HEADER_BYTES + header.length as usize;
        self.receive(whole)?;
        self.body = self.next + HEADER_BYTES..self.next + whole;
        self.next += whole;
        if header.status != 0 {
            let reason = String::from_utf8_lossy(self.body());
            return Err(format!("the server answered {:?} with {reason}", header.op).into());
        }
        Ok(header)
    }

    /// The body of the latest answer.
    pub(crate) fn body(&self) -> &[u8] {
        &self.input[self.body.clone()]
    }

    /// Read until so many bytes are there that are not dealt with.
    fn receive(&mut self, wanted: usize) -> Result<(), Failure> {
        if self.next == self.arrived {
            (self.next, self.arrived) = (0, 0);
        } else if self.next + wanted > self.input.len() {
            self.input.copy_within(self.next..self.arrived, 0);
            (self.next, self.arrived) = (0, self.arrived - self.next);
        }
        while self.arrived - self.next < wanted {
            match self.stream.read(&mut self.input[self.arrived..])? {
                0 => return Err("the server closed the connection".into()),
                bytes => self.arrived += bytes,
            }
        }
        Ok(())
    }

    /// Put all pages.
    pub(crate) fn fill(&mut self, content: Content, pages: u32) -> Result<(), Failure> {
        let mut out = Vec::new();
        let indices: Vec<u32> = (0..pages).collect();
        for part in indices.chunks(32) {
            out.clear();
            put_frame(&mut out, 3, self.pool, content, part);
            self.send(&out)?;
            self.answer()?;
            if self.body().iter().any(|status| *status != PutStatus::Stored as u8) {
                return Err(format!("a put was refused: {:?}", self.body()).into());
            }
        }
        Ok(())
    }
}

/// Every run is a boot of its own, but connections of one process belong together.
fn boot_id() -> [u8; 16] {
    let mut id = [0xbe; 16];
    id[..4].copy_from_slice(&std::process::id().to_le_bytes());
    id
}

pub(crate) fn put_frame(out: &mut Vec<u8>, tag: u32, pool: u32, content: Content, indices: &[u32]) {
    let mut writer = PutWriter::begin(out, tag, pool, indices.len() as u16, false);
    for index in indices {
        writer.page(&key(*index), Encoding::Raw, &page(content, *index), 0);
    }
    writer.end();
}

/// Time it.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mut client = Client::connect(&arguments.endpoint, arguments.write_bytes, "bench")?;
    client.fill(arguments.content, arguments.pages)?;
    // Frames are made beforehand: it is the transport and the server that are measured.
    let frames: Vec<Vec<u8>> = (0..64u32)
        .map(|frame| {
            let indices: Vec<u32> =
                (0..arguments.batch as u32).map(|at| index(arguments, frame, at)).collect();
            let mut out = Vec::new();
            match arguments.work {
                Work::Get => {
                    let keys: Vec<Key> = indices.iter().map(|index| key(*index)).collect();
                    write_keys(Op::Get, frame, client.pool, false, &keys, &mut out);
                }
                Work::Put => put_frame(&mut out, frame, client.pool, arguments.content, &indices),
            }
            out
        })
        .collect();
    let warm_up = (arguments.count / 10).min(200);
    let total = warm_up + arguments.count;
    let mut times = Times::with_capacity(arguments.count);
    let mut sent_at = vec![Instant::now(); total];
    let mut began = Instant::now();
    let limit = arguments.seconds.map(Duration::from_secs_f64);
    let (mut sent, mut answered, mut bytes) = (0, 0, 0u64);
    while answered < total {
        while sent < total && sent - answered < arguments.in_flight {
            sent_at[sent] = Instant::now();
            client.send(&frames[sent % frames.len()])?;
            sent += 1;
        }
        let header = client.answer()?;
        if usize::from(header.count) != arguments.batch {
            return Err("an answer is incomplete".into());
        }
        if arguments.verify && arguments.work == Work::Get {
            let frame = (answered % frames.len()) as u32;
            verify(&header, client.body(), arguments, frame)?;
        }
        if answered >= warm_up {
            times.push(sent_at[answered].elapsed());
            bytes += (HEADER_BYTES + client.body.len()) as u64;
        }
        answered += 1;
        if answered == warm_up {
            began = Instant::now();
        }
        if arguments.pause_us > 0 {
            std::thread::sleep(Duration::from_micros(arguments.pause_us));
        }
        if limit.is_some_and(|limit| answered > warm_up && began.elapsed() > limit) {
            break;
        }
    }
    let elapsed = began.elapsed().as_secs_f64();
    let frames_timed = answered.saturating_sub(warm_up) as f64;
    let (there, back) = wire_bytes(arguments.work, arguments.batch);
    Report::default()
        .text("what", if arguments.work == Work::Get { "get" } else { "put" })
        .number("batch", arguments.batch as f64)
        .number("pages_per_s", frames_timed * arguments.batch as f64 / elapsed)
        .number("there_bytes", there as f64)
        .number("back_bytes", back as f64)
        .number("mean_answer_bytes", bytes as f64 / frames_timed)
        .times(times)
        .print();
    Ok(())
}

/// The page at place `at` of a frame.
fn index(arguments: &Arguments, frame: u32, at: u32) -> u32 {
    (frame * 97 + at * 31 + frame * at) % arguments.pages
}

/// Hold an answer against what was put.
fn verify(header: &Header, body: &[u8], arguments: &Arguments, frame: u32) -> Result<(), Failure> {
    for (at, got) in (0..).zip(decode_got(header, body)?) {
        let index = index(arguments, frame, at);
        if got.status != GetStatus::Hit || got.payload != page(arguments.content, index) {
            return Err(format!("page {index} did not come back as it was put").into());
        }
    }
    Ok(())
}

/// Bytes of a request and an answer of raw pages.
fn wire_bytes(work: Work, batch: usize) -> (usize, usize) {
    match work {
        Work::Get => {
            (HEADER_BYTES + batch * KEY_BYTES, HEADER_BYTES + batch * (GET_ENTRY_BYTES + PAGE_BYTES))
        }
        Work::Put => (HEADER_BYTES + batch * (PUT_ENTRY_BYTES + PAGE_BYTES), HEADER_BYTES + batch),
    }
}

#[derive(clap::Args)]
pub(crate) struct StoreArguments {
    /// What to time.
    #[arg(long, default_value = "get")]
    work: Work,
    /// Pages in the pool.
    #[arg(long, default_value_t = 4096)]
    pages: u32,
    /// What they hold.
    #[arg(long, default_value = "raw")]
    content: Content,
    /// For how long.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
}

/// The store's own rate, with one thread and no transport.
pub(crate) fn run_store(arguments: &StoreArguments) -> Result<(), Failure> {
    let capacity_bytes = 512 << 20;
    let (store, _) = Store::open(&StoreConfig::memfd(capacity_bytes))?;
    let limits = VmLimits {
        quota_bytes: capacity_bytes,
        min_bytes: 0,
        weight: 100,
        persistent_max_bytes: capacity_bytes,
    };
    let vm = store.add_vm("bench", &limits)?;
    let pool =
        store.create_pool(vm, &PoolCreate::private(PoolKind::Ephemeral { exclusive: false }, "bench"))?;
    let pool = store.pool(vm, pool).ok_or("the pool is gone")?;
    let pages: Vec<[u8; PAGE_BYTES]> = (0..arguments.pages).map(|at| page(arguments.content, at)).collect();
    let put = |at: u32| store.put(&pool, &key(at), Encoding::Raw, &pages[at as usize], None);
    (0..arguments.pages).for_each(|at| {
        put(at);
    });
    let began = Instant::now();
    let mut out = Vec::with_capacity(32 * PAGE_BYTES);
    let mut done = 0u32;
    while began.elapsed().as_secs_f64() < arguments.seconds {
        out.clear();
        for at in 0..32u32 {
            let index = (done + at * 31) % arguments.pages;
            match arguments.work {
                Work::Get => {
                    store.get(&pool, &key(index), false, &mut out);
                }
                Work::Put => {
                    put(index);
                }
            }
        }
        done += 32;
    }
    Report::default()
        .text("what", "store")
        .number("pages_per_s", f64::from(done) / began.elapsed().as_secs_f64())
        .number("samples", f64::from(done))
        .print();
    Ok(())
}
