//! The golden vectors of `tests/golden/frames.json`, which the reference client in Python writes, read and written by
//! this codec.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test fails by panicking

use serde_json::Value;
use tmem_wire::header::FLAG_CHECKSUMS;
use tmem_wire::pages::{self, GotWriter, PutWriter};
use tmem_wire::{
    Encoding, Features, GetStatus, Header, HelloAnswer, HelloRequest, Key, Notice, Op, PoolCreate, PoolKind,
    Report, Role, Stats, HEADER_BYTES,
};
use zerocopy::IntoBytes;

fn vectors() -> Vec<Value> {
    let text = include_str!("../../../tests/golden/frames.json");
    serde_json::from_str(text).expect("the golden vectors are JSON")
}

fn hex(value: &Value) -> Vec<u8> {
    let text = value.as_str().expect("a string");
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

fn number<T: TryFrom<u64>>(value: &Value) -> T {
    T::try_from(value.as_u64().expect("a number")).ok().expect("in range")
}

fn array<const N: usize>(value: &Value) -> [u8; N] {
    hex(value).try_into().expect("the right length")
}

fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    bytes
}

fn key(fields: &Value) -> Key {
    Key { object: array(&fields["object"]), index: number(&fields["index"]) }
}

fn encoding(fields: &Value) -> Encoding {
    [Encoding::None, Encoding::Raw, Encoding::SameFilled, Encoding::Lz4][number::<usize>(&fields["encoding"])]
}

#[test]
fn headers_are_read_and_written() {
    for vector in vectors() {
        let bytes = hex(&vector["bytes"]);
        let fields = &vector["header"];
        let expected = Header {
            op: Op::from_code(number(&fields["op"])).unwrap(),
            flags: number(&fields["flags"]),
            tag: number(&fields["tag"]),
            pool: number(&fields["pool"]),
            length: number(&fields["length"]),
            count: number(&fields["count"]),
            status: number(&fields["status"]),
        };
        let raw: &[u8; HEADER_BYTES] = bytes.first_chunk().unwrap();
        assert_eq!(Header::decode(raw).unwrap(), expected);
        assert_eq!(expected.encode(), *raw);
        assert_eq!(bytes.len(), HEADER_BYTES + expected.length as usize);
    }
}

#[test]
fn bodies_are_read_and_written() {
    for vector in vectors() {
        let bytes = hex(&vector["bytes"]);
        let header = Header::decode(bytes.first_chunk().unwrap()).unwrap();
        let body = &bytes[HEADER_BYTES..];
        let fields = &vector["fields"];
        let list = || fields.as_array().expect("a list");
        match vector["kind"].as_str().unwrap() {
            "empty" => assert!(body.is_empty()),
            "error" => assert_eq!(body, fields.as_str().unwrap().as_bytes()),
            "hello_request" => {
                let expected = HelloRequest {
                    version_min: number(&fields["version_min"]),
                    version_max: number(&fields["version_max"]),
                    role: Role::from_code(number(&fields["role"])).unwrap(),
                    page_bytes: number(&fields["page_bytes"]),
                    features: Features(number(&fields["features"])),
                    boot_id: array(&fields["boot_id"]),
                    max_frame_bytes: number(&fields["max_frame_bytes"]),
                    client: padded(fields["client"].as_str().unwrap()),
                };
                assert_eq!(HelloRequest::decode(body).unwrap(), expected);
                assert_eq!(expected.encode(), body);
            }
            "hello_answer" => {
                let expected = HelloAnswer {
                    version: number(&fields["version"]),
                    page_bytes: number(&fields["page_bytes"]),
                    features: Features(number(&fields["features"])),
                    max_frame_bytes: number(&fields["max_frame_bytes"]),
                    max_batch: number(&fields["max_batch"]),
                    max_in_flight: number(&fields["max_in_flight"]),
                    keep_alive_ms: number(&fields["keep_alive_ms"]),
                    quota_bytes: number(&fields["quota_bytes"]),
                };
                assert_eq!(HelloAnswer::decode(body).unwrap(), expected);
                assert_eq!(expected.encode(), body);
            }
            "pool_create" => {
                let kind = if fields["persistent"].as_bool().unwrap() {
                    PoolKind::Persistent
                } else {
                    PoolKind::Ephemeral { exclusive: fields["exclusive"].as_bool().unwrap() }
                };
                let shared = (!fields["shared"].is_null()).then(|| array(&fields["shared"]));
                let expected = PoolCreate { kind, shared, name: padded(fields["name"].as_str().unwrap()) };
                assert_eq!(PoolCreate::decode(body).unwrap(), expected);
                assert_eq!(expected.encode(), body);
            }
            "put" => {
                let pages: Vec<_> = pages::decode_put(&header, body).unwrap().collect();
                assert_eq!(pages.len(), list().len());
                let mut out = Vec::new();
                let mut writer = PutWriter::begin(&mut out, header.tag, header.pool, header.count, true);
                for (page, expected) in pages.iter().zip(list()) {
                    assert_eq!(page.key, key(expected));
                    assert_eq!(page.encoding, encoding(expected));
                    assert_eq!(page.payload, hex(&expected["payload"]));
                    assert_eq!(page.checksum, Some(number(&expected["checksum"])));
                    writer.page(&page.key, page.encoding, page.payload, number(&expected["checksum"]));
                }
                writer.end();
                assert_eq!(out, bytes);
            }
            "got" => {
                let pages: Vec<_> = pages::decode_got(&header, body).unwrap().collect();
                assert_eq!(pages.len(), list().len());
                let request = Header { flags: 0, length: 0, ..header };
                let mut out = Vec::new();
                let mut writer = GotWriter::begin(&mut out, &request, header.flags & FLAG_CHECKSUMS != 0);
                for (page, expected) in pages.iter().zip(list()) {
                    let status = GetStatus::from_code(number(&expected["status"])).unwrap();
                    let payload = hex(&expected["payload"]);
                    assert_eq!((page.status, page.encoding), (status, encoding(expected)));
                    assert_eq!(page.payload, payload);
                    writer.page_with(|out| {
                        out.extend_from_slice(&payload);
                        (status, encoding(expected), number(&expected["checksum"]))
                    });
                }
                writer.end();
                assert_eq!(out, bytes);
            }
            "keys" => {
                let keys: Vec<_> = pages::decode_keys(&header, body).unwrap().collect();
                assert_eq!(keys, list().iter().map(key).collect::<Vec<_>>());
                let mut out = Vec::new();
                pages::write_keys(header.op, header.tag, header.pool, header.op == Op::Get, &keys, &mut out);
                assert_eq!(out, bytes);
            }
            "objects" => {
                let objects: Vec<_> = pages::decode_objects(&header, body).unwrap().collect();
                assert_eq!(objects, list().iter().map(array).collect::<Vec<_>>());
                let mut out = Vec::new();
                pages::write_objects(header.tag, header.pool, &objects, &mut out);
                assert_eq!(out, bytes);
            }
            "statuses" => {
                let statuses = pages::decode_statuses(&header, body).unwrap();
                assert_eq!(statuses, list().iter().map(number).collect::<Vec<u8>>());
                let mut out = Vec::new();
                pages::write_statuses(&Header { flags: 0, ..header }, statuses, &mut out);
                assert_eq!(out, bytes);
            }
            "notice" => {
                let mut out = Vec::new();
                Notice::decode(header.op, body).unwrap().write_frame(&mut out);
                assert_eq!(out, bytes);
            }
            "report" => {
                let report = Report::decode(body).unwrap();
                assert_eq!(u64::from(report.psi_full_avg10.get()), list()[1].as_u64().unwrap());
                assert_eq!(report.cache_miss_pages.get(), list()[11].as_u64().unwrap());
                assert_eq!(report.as_bytes(), body);
            }
            "stats" => {
                let stats = Stats::decode(body).unwrap();
                assert_eq!(stats.quota_bytes.get(), list()[0].as_u64().unwrap());
                assert_eq!(stats.frozen.get(), list()[10].as_u64().unwrap());
                assert_eq!(stats.as_bytes(), body);
            }
            other => panic!("no reader for {other}"),
        }
    }
}
