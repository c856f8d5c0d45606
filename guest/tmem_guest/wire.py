"""The frames of a control connection (docs/protocol.md): HELLO, PING, REPORT, STATS and the host's notices.

The agent speaks no others: pages travel in `tmem-guest`. `tests/unit/test_agent_wire.py` holds this module to
the native codec.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

VERSION = 1
PAGE_BYTES = 4096
MAX_BODY_BYTES = 256 * (PAGE_BYTES + 28)
FLAG_ANSWER = 1
ROLE_CONTROL = 0

_MAGIC = int.from_bytes(b"TMEM", "little")
# magic, version, op, flags, tag, pool, length, count, status
_HEADER = struct.Struct("<IBBHIIIHH")
# version_min, version_max, role, page_bytes, features, boot_id, max_frame_bytes, client
_HELLO_REQUEST = struct.Struct("<BBBxIQ16sI4x24s")
# version, page_bytes, features, max_frame_bytes, max_batch, max_in_flight, keep_alive_ms, quota_bytes
_HELLO_ANSWER = struct.Struct("<B3xIQIIIIQ8x")
_REPORT = struct.Struct("<II10Q8x")
_STATS = struct.Struct("<11Q")
_NOTICE = struct.Struct("<QQ")

HEADER_BYTES = _HEADER.size


class Op(IntEnum):
    """The operations of a control connection."""

    HELLO = 0x01
    PING = 0x02
    STATS = 0x03
    REPORT = 0x04
    RECLAIM = 0x40
    QUOTA = 0x41
    FROZEN = 0x42
    SHUTDOWN = 0x43


NOTICES = frozenset({Op.RECLAIM, Op.QUOTA, Op.FROZEN, Op.SHUTDOWN})


class WireError(Exception):
    """The host's bytes are not a frame of the protocol; the connection is of no further use."""


class Header(NamedTuple):
    """What stands before every body."""

    op: Op
    flags: int
    tag: int
    length: int
    status: int

    @property
    def is_answer(self) -> bool:
        """Whether the frame answers a request of this end."""
        return bool(self.flags & FLAG_ANSWER)


class HelloAnswer(NamedTuple):
    """What the host settled in HELLO; `docs/protocol.md` has the units."""

    version: int
    page_bytes: int
    features: int
    max_frame_bytes: int
    max_batch: int
    max_in_flight: int
    keep_alive_ms: int
    quota_bytes: int


class Report(NamedTuple):
    """The guest's account of its memory. PSI is in hundredths of a percent."""

    psi_some_avg10: int = 0
    psi_full_avg10: int = 0
    mem_total_bytes: int = 0
    mem_available_bytes: int = 0
    swap_total_bytes: int = 0
    swap_free_bytes: int = 0
    swap_in_pages: int = 0
    swap_out_pages: int = 0
    shim_host_pages: int = 0
    shim_file_pages: int = 0
    cache_hit_pages: int = 0
    cache_miss_pages: int = 0


class Stats(NamedTuple):
    """The host's counters for this VM."""

    quota_bytes: int
    used_bytes: int
    ephemeral_pages: int
    persistent_pages: int
    puts_accepted: int
    puts_refused: int
    gets_hit: int
    gets_missed: int
    pages_flushed: int
    pages_evicted: int
    frozen: int


class Notice(NamedTuple):
    """What the host says unasked.

    `first` is pages (RECLAIM), the quota in bytes (QUOTA) or 0/1 (FROZEN); `second` the bytes in use (QUOTA).
    """

    op: Op
    first: int
    second: int


def frame(op: Op, tag: int, body: bytes = b"") -> bytes:
    """A request."""
    return _HEADER.pack(_MAGIC, VERSION, op, 0, tag, 0, len(body), 0, 0) + body


def hello(tag: int, boot_id: bytes, client: str) -> bytes:
    """A HELLO request for a control connection. `boot_id` is 16 bytes, `client` up to 24 ASCII characters."""
    body = _HELLO_REQUEST.pack(
        VERSION,
        VERSION,
        ROLE_CONTROL,
        PAGE_BYTES,
        0,
        boot_id,
        HEADER_BYTES + MAX_BODY_BYTES,
        client.encode("ascii")[:24],
    )
    return frame(Op.HELLO, tag, body)


def report(tag: int, values: Report) -> bytes:
    """A REPORT request."""
    return frame(Op.REPORT, tag, _REPORT.pack(*values))


def decode_header(data: bytes) -> Header:
    """Read `HEADER_BYTES` bytes. Raises WireError."""
    magic, version, code, flags, tag, _pool, length, _count, status = _HEADER.unpack(data)
    if magic != _MAGIC:
        raise WireError(f"bad magic {magic:#010x}, expected TMEM")
    if version != VERSION:
        raise WireError(f"protocol version {version} is not supported (this end speaks {VERSION})")
    if length > MAX_BODY_BYTES:
        raise WireError(f"body of {length} bytes is over the limit of {MAX_BODY_BYTES}")
    try:
        op = Op(code)
    except ValueError:
        raise WireError(f"operation {code:#04x} does not belong on a control connection") from None
    return Header(op, flags, tag, length, status)


def decode_hello(body: bytes) -> HelloAnswer:
    """Read the body of the answer to HELLO. Raises WireError."""
    return HelloAnswer(*_unpack(_HELLO_ANSWER, "HELLO answer", body))


def decode_stats(body: bytes) -> Stats:
    """Read the body of the answer to STATS. Raises WireError."""
    return Stats(*_unpack(_STATS, "STATS answer", body))


def decode_notice(op: Op, body: bytes) -> Notice:
    """Read the body of a notice. Raises WireError."""
    first, second = _unpack(_NOTICE, op.name, body)
    return Notice(op, first, second)


def _unpack(layout: struct.Struct, name: str, body: bytes) -> tuple[int, ...]:
    if len(body) != layout.size:
        raise WireError(f"{name} body has {len(body)} bytes, expected {layout.size}")
    return layout.unpack(body)
