"""The agent's half of the protocol: layouts as docs/protocol.md gives them, and hostile bytes."""

from __future__ import annotations

import struct

import pytest
import tmem_native
from hypothesis import given
from hypothesis import strategies as st
from tmem_guest import wire


def test_header_layout() -> None:
    assert wire.frame(wire.Op.PING, 0x01020304) == bytes.fromhex(
        "544d454d0102000004030201000000000000000000000000"
    )
    assert wire.HEADER_BYTES == 24


def test_hello_layout() -> None:
    frame = wire.hello(7, bytes(range(16)), "tmem-agent")
    body = frame[wire.HEADER_BYTES :]
    assert len(body) == 64
    assert body[:4] == bytes([1, 1, 0, 0])
    assert struct.unpack_from("<I", body, 4) == (4096,)
    assert body[16:32] == bytes(range(16))
    assert struct.unpack_from("<I", body, 32) == (24 + 256 * (4096 + 28),)
    assert body[40:] == b"tmem-agent".ljust(24, b"\0")


def test_report_layout() -> None:
    frame = wire.report(1, wire.Report(*range(1, 13)))
    body = frame[wire.HEADER_BYTES :]
    assert len(body) == 96
    assert struct.unpack("<II10QQ", body) == (*range(1, 13), 0)


def test_hello_answer() -> None:
    body = struct.pack("<B3xIQIIIIQQ", 1, 4096, 3, 1000, 256, 64, 5000, 1 << 30, 0)
    answer = wire.decode_hello(body)
    assert answer == wire.HelloAnswer(1, 4096, 3, 1000, 256, 64, 5000, 1 << 30)


def test_stats_answer() -> None:
    assert wire.decode_stats(struct.pack("<11Q", *range(11))) == wire.Stats(*range(11))


def test_notice() -> None:
    notice = wire.decode_notice(wire.Op.QUOTA, struct.pack("<QQ", 5, 6))
    assert notice == wire.Notice(wire.Op.QUOTA, 5, 6)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (0, b"XXXX", "bad magic"),
        (4, b"\x02", "version 2"),
        (5, b"\x20", "does not belong"),
        (16, b"\xff\xff\xff\x7f", "over the limit"),
    ],
)
def test_headers_that_are_refused(at: int, value: bytes, said: str) -> None:
    data = bytearray(wire.frame(wire.Op.PING, 1))
    data[at : at + len(value)] = value
    with pytest.raises(wire.WireError, match=said):
        wire.decode_header(bytes(data))


@given(st.binary(min_size=24, max_size=24))
def test_any_header_is_read_or_refused(data: bytes) -> None:
    try:
        header = wire.decode_header(data)
    except wire.WireError:
        return
    assert header.length <= wire.MAX_BODY_BYTES


@given(st.binary(max_size=128))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    for decode in (
        wire.decode_hello,
        wire.decode_stats,
        lambda data: wire.decode_notice(wire.Op.QUOTA, data),
    ):
        try:
            decode(body)
        except wire.WireError:
            continue


# The native codec is the other half of the connection: both must agree on every byte.


@given(st.integers(0, 2**32 - 1), st.binary(min_size=16, max_size=16))
def test_hello_as_the_host_reads_it(tag: int, boot_id: bytes) -> None:
    frame = wire.hello(tag, boot_id, "tmem-agent 0.1")
    header, body = frame[: wire.HEADER_BYTES], frame[wire.HEADER_BYTES :]
    assert tmem_native.decode_header(header) == (wire.Op.HELLO, 0, tag, 0, len(body), 0, 0)
    read = tmem_native.decode_hello_request(body)
    assert read["boot_id"] == boot_id
    assert read["client"] == "tmem-agent 0.1"
    assert (read["role"], read["version_min"], read["page_bytes"]) == (
        0,
        wire.VERSION,
        tmem_native.PAGE_BYTES,
    )


@given(st.builds(wire.Report, *[st.integers(0, 2**32 - 1)] * 2, *[st.integers(0, 2**64 - 1)] * 10))
def test_report_as_the_host_writes_it(report: wire.Report) -> None:
    assert wire.report(1, report)[wire.HEADER_BYTES :] == tmem_native.encode_report(**report._asdict())


@given(st.tuples(*[st.integers(0, 2**32 - 1)] * 5), st.integers(0, 2**64 - 1))
def test_hello_answer_as_the_host_writes_it(limits: tuple[int, ...], quota: int) -> None:
    features, frame, batch, flight, keep_alive = limits
    body = tmem_native.encode_hello_answer(
        features=features,
        max_frame_bytes=frame,
        max_batch=batch,
        max_in_flight=flight,
        keep_alive_ms=keep_alive,
        quota_bytes=quota,
    )
    assert wire.decode_hello(body) == (wire.VERSION, wire.PAGE_BYTES, *limits, quota)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=11, max_size=11))
def test_stats_as_the_host_reads_them(figures: list[int]) -> None:
    body = struct.pack("<11Q", *figures)
    assert wire.decode_stats(body)._asdict() == dict(tmem_native.decode_stats(body))


def test_notices_as_the_host_writes_them() -> None:
    for frame, expected in [
        (tmem_native.encode_notice("reclaim", 7), wire.Notice(wire.Op.RECLAIM, 7, 0)),
        (tmem_native.encode_notice("quota", 7, 9), wire.Notice(wire.Op.QUOTA, 7, 9)),
        (tmem_native.encode_notice("frozen", 1), wire.Notice(wire.Op.FROZEN, 1, 0)),
        (tmem_native.encode_notice("shutdown"), wire.Notice(wire.Op.SHUTDOWN, 0, 0)),
    ]:
        header = wire.decode_header(frame[: wire.HEADER_BYTES])
        assert not header.is_answer
        assert wire.decode_notice(header.op, frame[wire.HEADER_BYTES :]) == expected


def test_the_limits_are_the_hosts() -> None:
    assert tmem_native.HEADER_BYTES == wire.HEADER_BYTES
    assert tmem_native.MAX_BODY_BYTES == wire.MAX_BODY_BYTES
    assert tmem_native.VERSION == wire.VERSION
