//! The fuzzers' guests with seeded randomness, for a bounded time, on the stable compiler.

#![allow(missing_docs, clippy::unwrap_used)]

use std::time::{Duration, Instant};

use tmem_host::vhost_user::front::{FrontState, MessageHeader, MESSAGE_HEADER_BYTES, RINGS};
use tmem_host::vhost_user::hostile::{run, Arena};

/// How long each of them runs; hours on demand.
fn patience() -> Duration {
    let seconds = std::env::var("TMEM_HOSTILE_S").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(4))
}

/// xorshift64*: reproducible from the seed a failure prints.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| (self.next() >> 32) as u8).collect()
    }
}

fn for_a_while(mut once: impl FnMut(&mut Random)) {
    let until = Instant::now() + patience();
    let mut seed = 1u64;
    while Instant::now() < until {
        let mut random = Random(seed);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| once(&mut random)));
        assert!(outcome.is_ok(), "seed {seed}");
        seed += 1;
    }
}

#[test]
fn arbitrary_guests() {
    let arena = Arena::new().unwrap();
    for_a_while(|random| {
        let length = random.next() as usize % 2000;
        let program = random.bytes(length);
        run(&arena, &program);
    });
}

#[test]
fn arbitrary_messages() {
    for_a_while(|random| {
        let mut state = FrontState::default();
        for _ in 0..random.next() % 64 {
            let size = random.next() as usize % 64;
            let mut head = Vec::new();
            for word in [random.next() as u32 % 40, 1 | (random.next() as u32 & 8), size as u32] {
                head.extend(word.to_ne_bytes());
            }
            let header = MessageHeader::decode(head.first_chunk::<MESSAGE_HEADER_BYTES>().unwrap()).unwrap();
            let mut body = random.bytes(size);
            if random.next() % 2 == 0 {
                // Small numbers get further.
                body.iter_mut().enumerate().filter(|(at, _)| at % 4 != 0).for_each(|(_, byte)| *byte = 0);
            }
            let eventfd = || rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
            let descriptors = (0..random.next() % 3).map(|_| eventfd()).collect();
            if state.handle(header, &body, descriptors, &[3, 0, 0, 0, 0, 0, 0, 0]).is_err() {
                break;
            }
            for ring in 0..RINGS {
                let _ = state.layout(ring);
            }
        }
    });
}
