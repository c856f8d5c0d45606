//! The codec: whatever it accepts, it must be able to walk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tmem_wire::{pages, Header, HelloAnswer, HelloRequest, Notice, PoolCreate, Report, HEADER_BYTES};

fuzz_target!(|bytes: &[u8]| {
    let Some((head, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = Header::decode(head) else { return };
    if let Ok(found) = pages::decode_put(&header, body) {
        assert_eq!(found.count(), usize::from(header.count));
    }
    if let Ok(keys) = pages::decode_keys(&header, body) {
        assert_eq!(keys.count(), usize::from(header.count));
    }
    if let Ok(objects) = pages::decode_objects(&header, body) {
        assert_eq!(objects.count(), usize::from(header.count));
    }
    if let Ok(found) = pages::decode_got(&header, body) {
        assert_eq!(found.count(), usize::from(header.count));
    }
    let _ = pages::decode_statuses(&header, body);
    let _ = HelloRequest::decode(body);
    let _ = HelloAnswer::decode(body);
    let _ = PoolCreate::decode(body);
    let _ = Notice::decode(header.op, body);
    let _ = Report::decode(body);
});
