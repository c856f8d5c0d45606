"""A guest's end of the wire protocol, written from docs/protocol.md with `struct` alone.

It shares no code with the native codec, so that the two check each other.
"""

from __future__ import annotations

import socket
import struct
import uuid
from collections.abc import Iterable, Sequence
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import NamedTuple, Self

import lz4.block
import xxhash

PAGE_BYTES = 4096
MAX_BATCH = 256
HEADER = struct.Struct("<4sBBHIIIHH")
HELLO_REQUEST = struct.Struct("<BBBxIQ16sI4x24s")
HELLO_ANSWER = struct.Struct("<B3xIQIIIIQ8x")
POOL = struct.Struct("<BB6x16s32s")
KEY = struct.Struct("<16sI")
PUT_ENTRY = struct.Struct("<16sIBxHI")
GET_ENTRY = struct.Struct("<BBHI")
STATS = struct.Struct("<11Q")
REPORT = struct.Struct("<II10Q8x")
NOTICE = struct.Struct("<QQ")


class Op(IntEnum):
    HELLO = 0x01
    PING = 0x02
    STATS = 0x03
    REPORT = 0x04
    POOL_CREATE = 0x10
    POOL_DESTROY = 0x11
    PUT = 0x20
    GET = 0x21
    FLUSH_PAGE = 0x22
    FLUSH_OBJECT = 0x23
    FLUSH_POOL = 0x24
    RECLAIM = 0x40
    QUOTA = 0x41
    FROZEN = 0x42
    SHUTDOWN = 0x43


class Flag(IntFlag):
    ANSWER = 1
    CHECKSUMS = 2
    ACCEPT_LZ4 = 4


class Role(IntEnum):
    CONTROL = 0
    SWAP = 1
    FILE_CACHE = 2


class Feature(IntFlag):
    LZ4 = 1
    CHECKSUMS = 2


class Status(IntEnum):
    OK = 0
    PROTOCOL = 1
    NO_SUCH_POOL = 2
    LIMIT = 3
    DENIED = 4
    UNSUPPORTED = 5
    CONFLICT = 6
    SHUTTING_DOWN = 7
    INTERNAL = 8


class Put(IntEnum):
    STORED = 0
    OVER_QUOTA = 1
    FROZEN = 2
    INCOMPRESSIBLE = 3
    NO_MEMORY = 4
    CORRUPT = 5


class Get(IntEnum):
    HIT = 0
    MISS = 1
    LOST = 2


class Encoding(IntEnum):
    NONE = 0
    RAW = 1
    SAME_FILLED = 2
    LZ4 = 3


class Key(NamedTuple):
    object: bytes
    page_index: int


class Frame(NamedTuple):
    op: Op
    flags: Flag
    tag: int
    pool: int
    entries: int
    status: Status
    body: bytes


class Hello(NamedTuple):
    version: int
    page_bytes: int
    features: Feature
    max_frame_bytes: int
    max_batch: int
    max_in_flight: int
    keep_alive_ms: int
    quota_bytes: int


class RefusedError(Exception):
    """An answer with an error status."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(f"{status.name}: {message}")
        self.status = status
        self.message = message


class ClosedError(Exception):
    """The host has closed the connection."""


def key(number: int, index: int = 0) -> Key:
    """A key whose object is a number."""
    return Key(number.to_bytes(16, "little"), index)


def checksum(page: bytes) -> int:
    return xxhash.xxh3_64_intdigest(page) & 0xFFFF_FFFF


def encode(page: bytes, encoding: Encoding) -> bytes:
    """A page's payload. The encoding must be possible."""
    assert len(page) == PAGE_BYTES
    if encoding is Encoding.SAME_FILLED:
        assert page == page[:8] * (PAGE_BYTES // 8)
        return page[:8]
    if encoding is Encoding.LZ4:
        payload: bytes = lz4.block.compress(page, store_size=False)
        assert len(payload) < PAGE_BYTES
        return payload
    return page


def decode(payload: bytes, encoding: Encoding) -> bytes:
    """The page of a payload."""
    match encoding:
        case Encoding.RAW:
            page = payload
        case Encoding.SAME_FILLED:
            page = payload * (PAGE_BYTES // 8)
        case Encoding.LZ4:
            page = lz4.block.decompress(payload, uncompressed_size=PAGE_BYTES)
        case Encoding.NONE:
            raise AssertionError("a hit without a payload")
    assert len(page) == PAGE_BYTES
    return page


def frame(
    op: int,
    body: bytes = b"",
    *,
    flags: int = 0,
    tag: int = 0,
    pool: int = 0,
    count: int = 0,
    status: int = 0,
    magic: bytes = b"TMEM",
    version: int = 1,
    length: int | None = None,
) -> bytes:
    """A frame, valid or not."""
    length = len(body) if length is None else length
    return HEADER.pack(magic, version, op, flags, tag, pool, length, count, status) + body


def hello_body(
    *,
    role: int = Role.SWAP,
    boot_id: bytes = bytes(16),
    features: int = Feature.LZ4 | Feature.CHECKSUMS,
    version_min: int = 1,
    version_max: int = 1,
    page_bytes: int = PAGE_BYTES,
    max_frame_bytes: int = 2 << 20,
    client: bytes = b"reference client",
) -> bytes:
    return HELLO_REQUEST.pack(
        version_min, version_max, role, page_bytes, features, boot_id, max_frame_bytes, client
    )


def put_body(pages: Iterable[tuple[Key, bytes, Encoding]], *, checksums: bool = True) -> bytes:
    entries, payloads = b"", b""
    for page_key, page, encoding in pages:
        payload = encode(page, encoding)
        entries += PUT_ENTRY.pack(*page_key, encoding, len(payload), checksum(page) if checksums else 0)
        payloads += payload
    return entries + payloads


def pool_body(
    name: str, *, persistent: bool = False, exclusive: bool = False, shared: uuid.UUID | None = None
) -> bytes:
    flags = int(exclusive) | (2 if shared else 0)
    return POOL.pack(int(persistent), flags, shared.bytes if shared else bytes(16), name.encode())


class Client:
    """One connection. Notices that arrive are kept in `notices`."""

    def __init__(
        self,
        path: Path | str,
        *,
        role: Role = Role.SWAP,
        boot_id: bytes = bytes(16),
        features: Feature = Feature.LZ4 | Feature.CHECKSUMS,
        timeout_s: float = 10.0,
        max_frame_bytes: int = 2 << 20,
    ) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout_s)
        self.notices: list[tuple[Op, int, int]] = []
        self._next_tag = 0
        self._buffer = bytearray()
        try:
            self.socket.connect(str(path))
            body = hello_body(role=role, boot_id=boot_id, features=features, max_frame_bytes=max_frame_bytes)
            answer = self.call(Op.HELLO, body)
        except BaseException:
            self.socket.close()
            raise
        fields = HELLO_ANSWER.unpack(answer.body)
        self.hello = Hello(*fields)._replace(features=Feature(fields[2]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    # Frames

    def send(self, op: Op, body: bytes = b"", *, flags: int = 0, pool: int = 0, count: int = 0) -> int:
        """Send a request; returns its tag."""
        self._next_tag += 1
        self.socket.sendall(frame(op, body, flags=flags, tag=self._next_tag, pool=pool, count=count))
        return self._next_tag

    def receive(self) -> Frame:
        """The next frame, notices included. Raises ClosedError, TimeoutError."""
        fields = HEADER.unpack(self._exactly(HEADER.size))
        magic, version, op, flags, tag, pool, length, count, status = fields
        assert (magic, version) == (b"TMEM", 1)
        return Frame(Op(op), Flag(flags), tag, pool, count, Status(status), self._exactly(length))

    def answer(self, tag: int, op: Op) -> Frame:
        """The answer to a request; keeps the notices before it. Raises RefusedError, ClosedError."""
        while True:
            got = self.receive()
            if Flag.ANSWER in got.flags:
                break
            self._keep(got)
        if got.status is not Status.OK:
            raise RefusedError(got.status, got.body.decode())
        assert (got.op, got.tag) == (op, tag)
        return got

    def call(self, op: Op, body: bytes = b"", *, flags: int = 0, pool: int = 0, count: int = 0) -> Frame:
        """One request and its answer."""
        return self.answer(self.send(op, body, flags=flags, pool=pool, count=count), op)

    def next_notice(self) -> tuple[Op, int, int]:
        """The next notice, waiting for it if need be."""
        if not self.notices:
            got = self.receive()
            assert Flag.ANSWER not in got.flags
            self._keep(got)
        return self.notices.pop(0)

    def _keep(self, got: Frame) -> None:
        assert got.tag == 0
        self.notices.append((got.op, *NOTICE.unpack(got.body)))

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            try:
                received = self.socket.recv(1 << 20)
            except ConnectionResetError:
                received = b""
            if not received:
                raise ClosedError
            self._buffer += received
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    # Operations

    def ping(self) -> None:
        assert self.call(Op.PING).body == b""

    def create_pool(
        self,
        name: str,
        *,
        persistent: bool = False,
        exclusive: bool = False,
        shared: uuid.UUID | None = None,
    ) -> int:
        body = pool_body(name, persistent=persistent, exclusive=exclusive, shared=shared)
        return self.call(Op.POOL_CREATE, body).pool

    def destroy_pool(self, pool: int) -> None:
        self.call(Op.POOL_DESTROY, pool=pool)

    def put(
        self,
        pool: int,
        pages: Sequence[tuple[Key, bytes]],
        encoding: Encoding = Encoding.RAW,
    ) -> list[Put]:
        body = put_body((page_key, page, encoding) for page_key, page in pages)
        got = self.call(Op.PUT, body, flags=Flag.CHECKSUMS, pool=pool, count=len(pages))
        return [Put(status) for status in self._statuses(got, len(pages))]

    def get(self, pool: int, keys: Sequence[Key], *, accept_lz4: bool = False) -> list[bytes | None]:
        """Pages, None for misses. Checksums are verified; a lost page fails."""
        got = self.call(
            Op.GET,
            b"".join(KEY.pack(*page_key) for page_key in keys),
            flags=Flag.ACCEPT_LZ4 if accept_lz4 else 0,
            pool=pool,
            count=len(keys),
        )
        return self.pages(got, len(keys))

    def pages(self, got: Frame, count: int) -> list[bytes | None]:
        """The pages of a GET's answer."""
        assert got.entries == count
        entries = got.body[: count * GET_ENTRY.size]
        payloads = got.body[count * GET_ENTRY.size :]
        pages: list[bytes | None] = []
        for status, encoding, length, expected in GET_ENTRY.iter_unpack(entries):
            payload, payloads = payloads[:length], payloads[length:]
            assert Get(status) is not Get.LOST
            if status == Get.MISS:
                assert (encoding, length) == (Encoding.NONE, 0)
                pages.append(None)
                continue
            page = decode(payload, Encoding(encoding))
            if Feature.CHECKSUMS in self.hello.features:
                assert Flag.CHECKSUMS in got.flags
                assert checksum(page) == expected
            pages.append(page)
        assert payloads == b""
        return pages

    def flush_page(self, pool: int, keys: Sequence[Key]) -> list[bool]:
        """Whether each was there."""
        body = b"".join(KEY.pack(*page_key) for page_key in keys)
        got = self.call(Op.FLUSH_PAGE, body, pool=pool, count=len(keys))
        return [status == 0 for status in self._statuses(got, len(keys))]

    def flush_object(self, pool: int, objects: Sequence[bytes]) -> list[bool]:
        """Whether each had pages."""
        got = self.call(Op.FLUSH_OBJECT, b"".join(objects), pool=pool, count=len(objects))
        return [status == 0 for status in self._statuses(got, len(objects))]

    def flush_pool(self, pool: int) -> None:
        self.call(Op.FLUSH_POOL, pool=pool)

    def stats(self) -> dict[str, int]:
        names = (
            "quota_bytes used_bytes ephemeral_pages persistent_pages puts_accepted puts_refused gets_hit "
            "gets_missed pages_flushed pages_evicted frozen"
        )
        return dict(zip(names.split(), STATS.unpack(self.call(Op.STATS).body), strict=True))

    def report(self, *figures: int) -> None:
        """Send a report; missing figures are 0."""
        self.call(Op.REPORT, REPORT.pack(*figures, *[0] * (12 - len(figures))))

    @staticmethod
    def _statuses(got: Frame, count: int) -> bytes:
        assert (got.entries, len(got.body)) == (count, count)
        return got.body
