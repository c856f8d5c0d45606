//! One client for three stores on a unix socket: tmem, Redis, memcached. Same threads, keys, values and batches.
//!
//! `load tmem|redis|memcached SOCKET VALUES CLIENTS BATCH PAGES raw|lz4`; VALUES is a file of pages. Prints a JSON
//! object with puts and gets a second. In `lz4` mode the client compresses beforehand, as a guest would.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a benchmark that cannot go on has failed

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Barrier;
use std::time::Instant;

use tmem_store::codec;
use tmem_wire::pages::{decode_got, decode_statuses, write_keys, GotPage, PutWriter};
use tmem_wire::{
    Encoding, Features, GetStatus, Header, HelloRequest, Key, Op, PoolCreate, PoolKind, Role, HEADER_BYTES,
    PAGE_BYTES,
};

/// A value, ready to be sent.
struct Value {
    encoding: Encoding,
    bytes: Vec<u8>,
}

trait Client {
    fn put(&mut self, first: u32, values: &[&Value]);
    /// Fetch as many values, from `first` on, as are in `expected`, and compare their lengths.
    fn get(&mut self, first: u32, expected: &[&Value]);
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, kind, socket, file, clients, batch, pages, mode] = &args[..] else {
        panic!("usage: load tmem|redis|memcached SOCKET VALUES CLIENTS BATCH PAGES raw|lz4");
    };
    let [clients, batch, pages]: [usize; 3] = [clients, batch, pages].map(|number| number.parse().unwrap());
    let values = values(&std::fs::read(file).expect("VALUES"), mode == "lz4");
    let per_client = pages / clients / batch * batch;
    let barrier = Barrier::new(clients + 1);
    let mut seconds = [0.0; 2];
    std::thread::scope(|scope| {
        for number in 0..clients {
            let (barrier, values) = (&barrier, &values);
            scope.spawn(move || {
                let mut client: Box<dyn Client> = match kind.as_str() {
                    "tmem" => Box::new(Tmem::connect(socket, number, mode == "lz4")),
                    "redis" => Box::new(Redis::connect(socket, number)),
                    "memcached" => Box::new(Memcached::connect(socket, number)),
                    other => panic!("no such store: {other}"),
                };
                for put in [true, false] {
                    barrier.wait();
                    for first in (0..per_client).step_by(batch) {
                        let batch: Vec<&Value> = (first..first + batch)
                            .map(|i| &values[(number * 7919 + i) % values.len()])
                            .collect();
                        if put {
                            client.put(first as u32, &batch);
                        } else {
                            client.get(first as u32, &batch);
                        }
                    }
                    barrier.wait();
                }
            });
        }
        for phase in &mut seconds {
            barrier.wait();
            let start = Instant::now();
            barrier.wait();
            *phase = start.elapsed().as_secs_f64();
        }
    });
    let done = (per_client * clients) as f64;
    println!("{}", serde_json::json!({"put_per_s": done / seconds[0], "get_per_s": done / seconds[1]}));
}

fn values(bytes: &[u8], lz4: bool) -> Vec<Value> {
    let mut block = [0; PAGE_BYTES - 1];
    bytes
        .chunks_exact(PAGE_BYTES)
        .map(|page| {
            let page: &codec::Page = page.try_into().unwrap();
            match codec::compress(page, &mut block) {
                Some(bytes) if lz4 => Value { encoding: Encoding::Lz4, bytes: block[..bytes].to_vec() },
                _ => Value { encoding: Encoding::Raw, bytes: page.to_vec() },
            }
        })
        .collect()
}

struct Tmem {
    stream: UnixStream,
    pool: u32,
    number: usize,
    lz4: bool,
    out: Vec<u8>,
    body: Vec<u8>,
}

impl Tmem {
    fn connect(socket: &str, number: usize, lz4: bool) -> Tmem {
        let stream = UnixStream::connect(socket).expect("connect");
        let mut client = Tmem { stream, pool: 0, number, lz4, out: vec![], body: vec![] };
        let hello =
            HelloRequest { features: Features(Features::LZ4), ..HelloRequest::new(Role::Swap, [1; 16]) };
        Header::request(Op::Hello, 0).write_frame(&hello.encode(), &mut client.out);
        client.exchange();
        let pool = PoolCreate::private(PoolKind::Persistent, "load");
        client.out.clear();
        Header::request(Op::PoolCreate, 1).write_frame(&pool.encode(), &mut client.out);
        client.pool = client.exchange().pool;
        client
    }

    /// Send what is in `out` and read the answer into `body`.
    fn exchange(&mut self) -> Header {
        self.stream.write_all(&self.out).unwrap();
        let mut header = [0; HEADER_BYTES];
        self.stream.read_exact(&mut header).unwrap();
        let header = Header::decode(&header).unwrap();
        self.body.resize(header.length as usize, 0);
        self.stream.read_exact(&mut self.body).unwrap();
        assert_eq!(header.status, 0, "{}", String::from_utf8_lossy(&self.body));
        header
    }

    fn key(&self, index: u32) -> Key {
        Key { object: (self.number as u128).to_le_bytes(), index }
    }
}

impl Client for Tmem {
    fn put(&mut self, first: u32, values: &[&Value]) {
        let mut out = std::mem::take(&mut self.out);
        out.clear();
        let mut writer = PutWriter::begin(&mut out, 7, self.pool, values.len() as u16, false);
        for (index, value) in (first..).zip(values) {
            writer.page(&self.key(index), value.encoding, &value.bytes, 0);
        }
        writer.end();
        self.out = out;
        let header = self.exchange();
        assert!(decode_statuses(&header, &self.body).unwrap().iter().all(|&status| status == 0));
    }

    fn get(&mut self, first: u32, expected: &[&Value]) {
        let keys: Vec<Key> = (first..).take(expected.len()).map(|index| self.key(index)).collect();
        self.out.clear();
        write_keys(Op::Get, 7, self.pool, self.lz4, &keys, &mut self.out);
        let header = self.exchange();
        let got: Vec<GotPage> = decode_got(&header, &self.body).unwrap().collect();
        for (got, expected) in got.iter().zip(expected) {
            assert_eq!(got.status, GetStatus::Hit);
            assert!(got.encoding == Encoding::SameFilled || got.payload.len() <= PAGE_BYTES);
            assert!(expected.encoding != Encoding::Raw || self.lz4 || got.payload.len() >= 8);
        }
        assert_eq!(got.len(), expected.len());
    }
}

struct Redis {
    stream: BufReader<UnixStream>,
    number: usize,
    out: Vec<u8>,
    value: Vec<u8>,
}

impl Redis {
    fn connect(socket: &str, number: usize) -> Redis {
        let stream = BufReader::with_capacity(256 << 10, UnixStream::connect(socket).expect("connect"));
        Redis { stream, number, out: vec![], value: vec![] }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        line
    }
}

impl Client for Redis {
    fn put(&mut self, first: u32, values: &[&Value]) {
        self.out.clear();
        for (index, value) in (first..).zip(values) {
            let key = format!("{:08}:{index:08}", self.number);
            write!(self.out, "*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n", key.len(), value.bytes.len())
                .unwrap();
            self.out.extend_from_slice(&value.bytes);
            self.out.extend_from_slice(b"\r\n");
        }
        self.stream.get_mut().write_all(&self.out).unwrap();
        for _ in values {
            assert_eq!(self.line(), "+OK\r\n");
        }
    }

    fn get(&mut self, first: u32, expected: &[&Value]) {
        self.out.clear();
        for (index, _) in (first..).zip(expected) {
            let key = format!("{:08}:{index:08}", self.number);
            write!(self.out, "*2\r\n$3\r\nGET\r\n${}\r\n{key}\r\n", key.len()).unwrap();
        }
        self.stream.get_mut().write_all(&self.out).unwrap();
        for value in expected {
            assert_eq!(self.line(), format!("${}\r\n", value.bytes.len()));
            self.value.resize(value.bytes.len() + 2, 0);
            self.stream.read_exact(&mut self.value).unwrap();
        }
    }
}

/// The meta commands of memcached 1.6: shorter than the old ones, and puts are silent unless they fail.
struct Memcached(Redis);

impl Memcached {
    fn connect(socket: &str, number: usize) -> Memcached {
        Memcached(Redis::connect(socket, number))
    }
}

impl Client for Memcached {
    fn put(&mut self, first: u32, values: &[&Value]) {
        let client = &mut self.0;
        client.out.clear();
        for (index, value) in (first..).zip(values) {
            write!(client.out, "ms {:08}:{index:08} {} q\r\n", client.number, value.bytes.len()).unwrap();
            client.out.extend_from_slice(&value.bytes);
            client.out.extend_from_slice(b"\r\n");
        }
        client.out.extend_from_slice(b"mn\r\n");
        client.stream.get_mut().write_all(&client.out).unwrap();
        assert_eq!(client.line(), "MN\r\n");
    }

    fn get(&mut self, first: u32, expected: &[&Value]) {
        let client = &mut self.0;
        client.out.clear();
        for (index, _) in (first..).zip(expected) {
            write!(client.out, "mg {:08}:{index:08} v\r\n", client.number).unwrap();
        }
        client.stream.get_mut().write_all(&client.out).unwrap();
        for value in expected {
            assert_eq!(client.line(), format!("VA {}\r\n", value.bytes.len()));
            client.value.resize(value.bytes.len() + 2, 0);
            client.stream.read_exact(&mut client.value).unwrap();
        }
    }
}
