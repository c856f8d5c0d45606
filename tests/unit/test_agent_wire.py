"""The agent's half of the protocol: layouts as docs/protocol.md gives them, and hostile bytes."""

from __future__ import annotations

import struct

import pytest
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
