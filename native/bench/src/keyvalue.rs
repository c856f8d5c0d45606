//! The same pages in Redis and memcached, over the same kind of socket, with the same number of values a request.

use std::time::{Duration, Instant};

use tmem_wire::PAGE_BYTES;

use crate::client::{page, Content, Work};
use crate::endpoint::{Endpoint, Stream};
use crate::report::{Report, Times};
use crate::Failure;

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Server {
    Redis,
    Memcached,
}

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The server.
    endpoint: Endpoint,
    /// What it speaks.
    #[arg(long)]
    server: Server,
    /// What to time.
    #[arg(long, default_value = "get")]
    work: Work,
    /// Values in a request: MGET and MSET; one `get` of many keys, many `set`s at once.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Requests timed.
    #[arg(long, default_value_t = 20_000)]
    count: usize,
    /// Stop after this many seconds, if the requests are not done by then.
    #[arg(long)]
    seconds: Option<f64>,
    /// Keys.
    #[arg(long, default_value_t = 4096)]
    pages: u32,
}

fn name(index: u32) -> String {
    // As long as tmem's own key.
    format!("{index:028}")
}

fn request(server: Server, work: Work, indices: &[u32]) -> Vec<u8> {
    let mut out = Vec::new();
    let bulk = |out: &mut Vec<u8>, bytes: &[u8]| {
        out.extend(format!("${}\r\n", bytes.len()).bytes());
        out.extend(bytes);
        out.extend(b"\r\n");
    };
    match (server, work) {
        (Server::Redis, Work::Get) => {
            out.extend(format!("*{}\r\n", indices.len() + 1).bytes());
            bulk(&mut out, b"MGET");
            for index in indices {
                bulk(&mut out, name(*index).as_bytes());
            }
        }
        (Server::Redis, Work::Put) => {
            out.extend(format!("*{}\r\n", 2 * indices.len() + 1).bytes());
            bulk(&mut out, b"MSET");
            for index in indices {
                bulk(&mut out, name(*index).as_bytes());
                bulk(&mut out, &page(Content::Raw, *index));
            }
        }
        (Server::Memcached, Work::Get) => {
            out.extend(b"get");
            for index in indices {
                out.extend(format!(" {}", name(*index)).bytes());
            }
            out.extend(b"\r\n");
        }
        (Server::Memcached, Work::Put) => {
            for index in indices {
                out.extend(format!("set {} 0 0 {PAGE_BYTES}\r\n", name(*index)).bytes());
                out.extend(page(Content::Raw, *index));
                out.extend(b"\r\n");
            }
        }
    }
    out
}

/// Bytes of a whole answer. Every value is there and has the same size, so it is known beforehand.
fn answer_bytes(server: Server, work: Work, batch: usize) -> usize {
    match (server, work) {
        (Server::Redis, Work::Get) => {
            format!("*{batch}\r\n").len() + batch * (format!("${PAGE_BYTES}\r\n").len() + PAGE_BYTES + 2)
        }
        (Server::Redis, Work::Put) => "+OK\r\n".len(),
        (Server::Memcached, Work::Get) => {
            let head = format!("VALUE {} 0 {PAGE_BYTES}\r\n", name(0)).len();
            batch * (head + PAGE_BYTES + 2) + "END\r\n".len()
        }
        (Server::Memcached, Work::Put) => batch * "STORED\r\n".len(),
    }
}

fn exchange(stream: &mut dyn Stream, request: &[u8], answer: &mut [u8]) -> Result<(), Failure> {
    stream.write_all(request)?;
    stream.read_exact(answer)?;
    if !answer.ends_with(b"\r\n") {
        return Err("an answer has not the expected length".into());
    }
    Ok(())
}

/// Time it.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let Arguments { server, work, batch, pages, .. } = *arguments;
    let mut stream = arguments.endpoint.connect()?;
    for index in 0..pages {
        let mut answer = vec![0; answer_bytes(server, Work::Put, 1)];
        exchange(&mut *stream, &request(server, Work::Put, &[index]), &mut answer)?;
    }
    let requests: Vec<Vec<u8>> = (0..64u32)
        .map(|frame| {
            let indices: Vec<u32> =
                (0..batch as u32).map(|at| (frame * 97 + at * 31 + frame * at) % pages).collect();
            request(server, work, &indices)
        })
        .collect();
    let mut answer = vec![0; answer_bytes(server, work, batch)];
    let mut times = Times::with_capacity(arguments.count);
    let warm_up = (arguments.count / 10).min(200);
    let limit = arguments.seconds.map(Duration::from_secs_f64);
    let mut began = Instant::now();
    let mut timed = 0;
    for round in 0..warm_up + arguments.count {
        if round == warm_up {
            began = Instant::now();
        }
        let sent = Instant::now();
        exchange(&mut *stream, &requests[round % requests.len()], &mut answer)?;
        if round >= warm_up {
            times.push(sent.elapsed());
            timed += 1;
            if limit.is_some_and(|limit| began.elapsed() > limit) {
                break;
            }
        }
    }
    let rate = f64::from(timed) * batch as f64 / began.elapsed().as_secs_f64();
    Report::default()
        .text("what", if server == Server::Redis { "redis" } else { "memcached" })
        .number("batch", batch as f64)
        .number("pages_per_s", rate)
        .times(times)
        .print();
    Ok(())
}
