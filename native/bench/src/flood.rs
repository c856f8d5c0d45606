//! A guest that misbehaves. Each way goes on until the time is up; what the server does about it is its business.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tmem_wire::pages::write_keys;
use tmem_wire::{Header, Key, Op};

use crate::client::{key, put_frame, Client, Content};
use crate::endpoint::Endpoint;
use crate::report::Report;
use crate::Failure;

/// How.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Way {
    /// The largest batches, as fast as they are answered.
    MaxBatches,
    /// The largest batches of puts, which take longest to serve.
    MaxPuts,
    /// Single pages, as many in flight as the stream holds.
    TinyBatches,
    /// Connections, opened and dropped.
    ConnectStorm,
    /// Requests whose answers are never read.
    NeverRead,
    /// Frames of which the second half never comes.
    HalfFrames,
    /// Bytes that are no frames.
    Garbage,
    /// No request at all, only computing: what busy CPUs alone do to a neighbour.
    Busy,
}

#[derive(Clone, clap::Args)]
pub(crate) struct Arguments {
    /// The server.
    endpoint: Endpoint,
    /// How to misbehave.
    #[arg(long)]
    way: Way,
    /// Connections at a time.
    #[arg(long, default_value_t = 8)]
    connections: usize,
    /// For how long.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

/// Flood.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let time = Duration::from_secs_f64(arguments.seconds);
    let until = Instant::now() + time;
    let done = Arc::new(AtomicU64::new(0));
    for number in 0..arguments.connections {
        let (arguments, done) = (arguments.clone(), done.clone());
        std::thread::Builder::new().name(format!("flood {number}")).spawn(move || {
            while Instant::now() < until {
                // The server may refuse, cut off or throttle: try again, at once.
                if once(&arguments, until, &done).is_err() {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        })?;
    }
    // Not joined: a thread whose answers are not read may be stuck until the server cuts it off.
    std::thread::sleep(time);
    Report::default()
        .text("what", "flood")
        .text("way", &format!("{:?}", arguments.way))
        .number("done", done.load(Ordering::Relaxed) as f64)
        .print();
    Ok(())
}

/// One connection's worth of it. Counts in `done` what was answered, or attempted where there are no answers.
fn once(arguments: &Arguments, until: Instant, done: &AtomicU64) -> Result<(), Failure> {
    if arguments.way == Way::Busy {
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        return Ok(());
    }
    if arguments.way == Way::ConnectStorm {
        drop(arguments.endpoint.connect()?);
        done.fetch_add(1, Ordering::Relaxed);
        return Ok(());
    }
    let mut client = Client::connect(&arguments.endpoint, 0, "flood")?;
    let batch = if arguments.way == Way::TinyBatches { 1 } else { 256 };
    client.fill(Content::Raw, 256)?;
    let keys: Vec<Key> = (0..batch).map(key).collect();
    let mut frame = Vec::new();
    if arguments.way == Way::MaxPuts {
        let indices: Vec<u32> = (0..batch).collect();
        put_frame(&mut frame, 9, client.pool, Content::Half, &indices);
    } else {
        write_keys(Op::Get, 9, client.pool, false, &keys, &mut frame);
    }
    while Instant::now() < until {
        match arguments.way {
            Way::MaxBatches | Way::MaxPuts => {
                client.send(&frame)?;
                client.answer()?;
            }
            Way::TinyBatches => {
                client.send(&frame.repeat(32))?;
                for _ in 0..32 {
                    client.answer()?;
                }
            }
            Way::NeverRead => client.send(&frame)?,
            Way::HalfFrames => {
                let head = Header {
                    length: 1_000_000,
                    count: 256,
                    pool: client.pool,
                    ..Header::request(Op::Put, 1)
                };
                client.send(&head.encode())?;
                client.send(&[0; 1000])?;
                std::thread::sleep(
                    until.saturating_duration_since(Instant::now()).min(Duration::from_secs(1)),
                );
            }
            Way::Garbage => {
                client.send(&[0x5a; 4096])?;
                client.answer()?;
            }
            Way::ConnectStorm | Way::Busy => {}
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
    client.stream.shut(std::net::Shutdown::Both)?;
    Ok(())
}
