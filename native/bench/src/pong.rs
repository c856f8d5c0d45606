//! A bare ping-pong: so many bytes there, so many back, between two processes that do nothing else.

use std::io::{Read, Write};
use std::time::Instant;

use crate::endpoint::{Endpoint, Stream};
use crate::report::{Report, Times};
use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where `pong` listens.
    endpoint: Endpoint,
    /// Bytes there.
    #[arg(long)]
    there: u32,
    /// Bytes back.
    #[arg(long)]
    back: u32,
    /// Round trips timed.
    #[arg(long, default_value_t = 20_000)]
    count: usize,
}

/// Answer every connection. Its first eight bytes say how many bytes a ping and a pong have.
pub(crate) fn serve(endpoint: &Endpoint) -> Result<(), Failure> {
    Ok(endpoint.serve(|mut stream| {
        // Ends when the other end does.
        let _ = answer(&mut *stream);
    })?)
}

fn answer(stream: &mut dyn Stream) -> std::io::Result<()> {
    let mut sizes = [0; 8];
    stream.read_exact(&mut sizes)?;
    let size = |at: usize| u32::from_le_bytes([sizes[at], sizes[at + 1], sizes[at + 2], sizes[at + 3]]);
    let mut ping = vec![0; size(0).min(1 << 20) as usize];
    let pong = vec![7; size(4).min(1 << 20) as usize];
    loop {
        stream.read_exact(&mut ping)?;
        stream.write_all(&pong)?;
    }
}

/// Time round trips.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mut stream = arguments.endpoint.connect()?;
    stream.write_all(&arguments.there.to_le_bytes())?;
    stream.write_all(&arguments.back.to_le_bytes())?;
    let ping = vec![3; arguments.there as usize];
    let mut pong = vec![0; arguments.back as usize];
    let mut times = Times::with_capacity(arguments.count);
    let warm_up = arguments.count / 10;
    for round in 0..warm_up + arguments.count {
        let began = Instant::now();
        stream.write_all(&ping)?;
        stream.read_exact(&mut pong)?;
        if round >= warm_up {
            times.push(began.elapsed());
        }
    }
    Report::default()
        .text("what", "pingpong")
        .number("there_bytes", f64::from(arguments.there))
        .number("back_bytes", f64::from(arguments.back))
        .times(times)
        .print();
    Ok(())
}
