//! vhost-user messages, one after the other, with as many descriptors as the first byte of each says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tmem_host::vhost_user::front::{FrontState, MessageHeader, MESSAGE_HEADER_BYTES, RINGS};

fuzz_target!(|bytes: &[u8]| {
    let mut state = FrontState::default();
    let mut rest = bytes;
    while let Some((count, tail)) = rest.split_first() {
        let Some((head, tail)) = tail.split_first_chunk::<MESSAGE_HEADER_BYTES>() else { break };
        let Ok(header) = MessageHeader::decode(head) else { break };
        let Some((body, tail)) = tail.split_at_checked(header.size) else { break };
        rest = tail;
        let eventfd = || rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).ok();
        let descriptors = (0..count % 4).filter_map(|_| eventfd()).collect();
        if state.handle(header, body, descriptors, &[3, 0, 0, 0, 0, 0, 0, 0]).is_err() {
            break;
        }
        for ring in 0..RINGS {
            let _ = state.layout(ring);
        }
    }
});
