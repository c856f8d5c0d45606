//! What is written is read back; what is damaged is refused, and never panics.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use proptest::collection::vec;
use proptest::prelude::*;
use tmem_wire::header::{FLAG_CHECKSUMS, HEADER_BYTES};
use tmem_wire::pages::{self, GotWriter, PutWriter};
use tmem_wire::{
    Encoding, Features, GetStatus, Header, HelloAnswer, HelloRequest, Key, Notice, Op, PoolCreate, PoolKind,
    Role, WireError, MAX_BATCH, MAX_BODY_BYTES, PAGE_BYTES,
};

fn key() -> impl Strategy<Value = Key> {
    (any::<[u8; 16]>(), any::<u32>()).prop_map(|(object, index)| Key { object, index })
}

fn payload() -> impl Strategy<Value = (Encoding, Vec<u8>)> {
    prop_oneof![
        vec(any::<u8>(), PAGE_BYTES).prop_map(|p| (Encoding::Raw, p)),
        vec(any::<u8>(), 8).prop_map(|p| (Encoding::SameFilled, p)),
        vec(any::<u8>(), 1..PAGE_BYTES).prop_map(|p| (Encoding::Lz4, p)),
    ]
}

fn split(frame: &[u8]) -> (Header, &[u8]) {
    let (header, body) = frame.split_at(HEADER_BYTES);
    (Header::decode(header.try_into().unwrap()).unwrap(), body)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_put_is_read_back(pages in vec((key(), payload(), any::<u32>()), 1..20), checksums: bool, tag: u32, pool: u32) {
        let mut frame = Vec::new();
        let mut writer = PutWriter::begin(&mut frame, tag, pool, pages.len() as u16, checksums);
        for (key, (encoding, payload), checksum) in &pages {
            writer.page(key, *encoding, payload, *checksum);
        }
        writer.end();
        let (header, body) = split(&frame);
        prop_assert_eq!((header.op, header.tag, header.pool), (Op::Put, tag, pool));
        prop_assert_eq!(header.length as usize, body.len());
        let read: Vec<_> = pages::decode_put(&header, body).unwrap().collect();
        prop_assert_eq!(read.len(), pages.len());
        for (got, (key, (encoding, payload), checksum)) in read.iter().zip(&pages) {
            prop_assert_eq!(got.key, *key);
            prop_assert_eq!(got.encoding, *encoding);
            prop_assert_eq!(got.payload, payload.as_slice());
            prop_assert_eq!(got.checksum, checksums.then_some(*checksum));
        }
    }

    #[test]
    fn a_get_answer_is_read_back(pages in vec(proptest::option::of((payload(), any::<u32>())), 1..20)) {
        let request = Header { count: pages.len() as u16, ..Header::request(Op::Get, 7) };
        let mut frame = Vec::new();
        let mut writer = GotWriter::begin(&mut frame, &request, true);
        for page in &pages {
            writer.page_with(|out| match page {
                Some(((encoding, payload), checksum)) => {
                    out.extend_from_slice(payload);
                    (GetStatus::Hit, *encoding, *checksum)
                }
                None => (GetStatus::Miss, Encoding::None, 0),
            });
        }
        writer.end();
        let (header, body) = split(&frame);
        prop_assert!(header.is_answer() && header.flags & FLAG_CHECKSUMS != 0);
        for (got, page) in pages::decode_got(&header, body).unwrap().zip(&pages) {
            if let Some(((encoding, payload), checksum)) = page {
                prop_assert_eq!(got.status, GetStatus::Hit);
                prop_assert_eq!(got.encoding, *encoding);
                prop_assert_eq!(got.payload, payload.as_slice());
                prop_assert_eq!(got.checksum, Some(*checksum));
            } else {
                prop_assert_eq!(got.status, GetStatus::Miss);
            }
        }
    }

    #[test]
    fn keys_and_objects_are_read_back(keys in vec(key(), 1..=MAX_BATCH)) {
        let mut frame = Vec::new();
        pages::write_keys(Op::Get, 1, 2, true, &keys, &mut frame);
        let (header, body) = split(&frame);
        prop_assert!(pages::decode_keys(&header, body).unwrap().eq(keys.iter().copied()));

        let objects: Vec<_> = keys.iter().map(|k| k.object).collect();
        let mut frame = Vec::new();
        pages::write_objects(1, 2, &objects, &mut frame);
        let (header, body) = split(&frame);
        prop_assert!(pages::decode_objects(&header, body).unwrap().eq(objects));
    }

    /// Any bytes, as any body of any operation: an answer or an error, never a panic or a read out of bounds.
    #[test]
    fn decoders_survive_any_bytes(raw in any::<[u8; HEADER_BYTES]>(), body in vec(any::<u8>(), 0..600), count in 0u16..20) {
        let _ = Header::decode(&raw);
        for &op in Op::ALL {
            let header = Header { count, length: body.len() as u32, ..Header::request(op, 0) };
            let _ = pages::decode_put(&header, &body).map(Iterator::count);
            let _ = pages::decode_got(&header, &body).map(Iterator::count);
            let _ = pages::decode_keys(&header, &body).map(Iterator::count);
            let _ = pages::decode_objects(&header, &body).map(Iterator::count);
            let _ = pages::decode_statuses(&header, &body);
            let _ = Notice::decode(op, &body);
        }
        let _ = HelloRequest::decode(&body);
        let _ = HelloAnswer::decode(&body);
        let _ = PoolCreate::decode(&body);
    }

    /// A batch cut short or padded is refused: no entry of it is given out.
    #[test]
    fn a_put_of_the_wrong_length_is_refused(pages in vec((key(), payload()), 1..5), cut in 1usize..4000, longer: bool) {
        let mut frame = Vec::new();
        let mut writer = PutWriter::begin(&mut frame, 0, 0, pages.len() as u16, false);
        for (key, (encoding, payload)) in &pages {
            writer.page(key, *encoding, payload, 0);
        }
        writer.end();
        let (header, body) = split(&frame);
        let mut damaged = body.to_vec();
        if longer {
            damaged.resize(body.len() + cut, 0);
        } else {
            damaged.truncate(body.len().saturating_sub(cut));
        }
        prop_assert!(pages::decode_put(&header, &damaged).is_err());
    }
}

#[test]
fn a_header_is_refused_for_what_is_wrong_with_it() {
    let good = Header { count: 1, length: 20, ..Header::request(Op::Get, 9) }.encode();
    let decode = |at: usize, bytes: &[u8]| {
        let mut raw = good;
        raw[at..at + bytes.len()].copy_from_slice(bytes);
        Header::decode(&raw)
    };
    assert!(decode(0, b"T").is_ok());
    assert!(matches!(decode(0, b"X"), Err(WireError::BadMagic(_))));
    assert_eq!(decode(4, &[9]), Err(WireError::BadVersion(9)));
    assert_eq!(decode(5, &[0xee]), Err(WireError::UnknownOp(0xee)));
    let too_long = MAX_BODY_BYTES as u32 + 1;
    assert_eq!(decode(16, &too_long.to_le_bytes()), Err(WireError::BodyTooLong(too_long)));
    let too_many = MAX_BATCH as u16 + 1;
    assert_eq!(decode(20, &too_many.to_le_bytes()), Err(WireError::BadCount(too_many)));
}

#[test]
fn hello_and_pool_creation_are_read_back() {
    let mut client = [0; 24];
    client[..10].copy_from_slice(b"tmem-guest");
    let hello = HelloRequest {
        version_min: 1,
        version_max: 3,
        role: Role::Swap,
        page_bytes: 4096,
        features: Features::ALL,
        boot_id: [7; 16],
        max_frame_bytes: 1 << 20,
        client,
    };
    assert_eq!(HelloRequest::decode(&hello.encode()), Ok(hello));

    for kind in [
        PoolKind::Persistent,
        PoolKind::Ephemeral { exclusive: false },
        PoolKind::Ephemeral { exclusive: true },
    ] {
        let mut create = PoolCreate::private(kind, "swap0");
        assert_eq!(PoolCreate::decode(&create.encode()), Ok(create));
        create.shared = Some([3; 16]);
        assert_eq!(PoolCreate::decode(&create.encode()), Ok(create));
    }
    let mut exclusive_persistent = PoolCreate::private(PoolKind::Persistent, "swap0").encode();
    exclusive_persistent[1] = 1;
    assert!(PoolCreate::decode(&exclusive_persistent).is_err());
    assert!(PoolCreate::decode(&PoolCreate::private(PoolKind::Persistent, "").encode()).is_err());
}

#[test]
fn notices_are_read_back() {
    for notice in [
        Notice::Reclaim { pages: 77 },
        Notice::Quota { quota_bytes: 1 << 40, used_bytes: 5 },
        Notice::Frozen(true),
        Notice::Shutdown,
    ] {
        let mut frame = Vec::new();
        notice.write_frame(&mut frame);
        let (header, body) = split(&frame);
        assert_eq!(Notice::decode(header.op, body), Ok(notice));
    }
}
