"""Write `frames.json` with the reference client."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from framework.client import (  # noqa: E402
    GET_ENTRY,
    HELLO_ANSWER,
    KEY,
    NOTICE,
    PAGE_BYTES,
    REPORT,
    STATS,
    Encoding,
    Feature,
    Flag,
    Get,
    Key,
    Op,
    Put,
    Role,
    Status,
    checksum,
    encode,
    frame,
    hello_body,
    pool_body,
    put_body,
)

OBJECT = bytes(range(16))
BOOT = bytes(range(100, 116))
UUID = bytes(range(200, 216))
RAW_PAGE = bytes((7 * i + i // 256) % 256 for i in range(PAGE_BYTES))
WORD_PAGE = (0x0123_4567_89AB_CDEF).to_bytes(8, "little") * 512
TEXT_PAGE = (b"transcendent memory " * 205)[:PAGE_BYTES]
PAGES = [
    (Key(OBJECT, 0), RAW_PAGE, Encoding.RAW),
    (Key(OBJECT, 1), WORD_PAGE, Encoding.SAME_FILLED),
    (Key(UUID, 0xFFFF_FFFF), TEXT_PAGE, Encoding.LZ4),
]


def record(kind: str, op: Op, body: bytes, fields: object, **header: int) -> dict[str, Any]:
    """One vector: the frame and what it means."""
    given = {"flags": 0, "tag": 0, "pool": 0, "count": 0, "status": 0} | header
    data = frame(op, body, **given)  # type: ignore[arg-type]
    return {
        "kind": kind,
        "bytes": data.hex(),
        "header": {"op": int(op), "length": len(body)} | given,
        "fields": fields,
    }


def vectors() -> list[dict[str, Any]]:
    """All vectors."""
    payloads = [encode(page, encoding) for _, page, encoding in PAGES]
    entries = [
        {
            "object": page_key.object.hex(),
            "index": page_key.page_index,
            "encoding": int(encoding),
            "payload": payload.hex(),
            "checksum": checksum(page),
        }
        for (page_key, page, encoding), payload in zip(PAGES, payloads, strict=True)
    ]
    keys = [{"object": k.object.hex(), "index": k.page_index} for k, _, _ in PAGES]
    key_bytes = b"".join(KEY.pack(*k) for k, _, _ in PAGES)
    got: list[dict[str, Any]] = [
        {"status": Get.HIT, "encoding": e["encoding"], "payload": e["payload"], "checksum": e["checksum"]}
        for e in entries
    ] + [{"status": status, "encoding": 0, "payload": "", "checksum": 0} for status in (Get.MISS, Get.LOST)]
    got_body = b"".join(
        GET_ENTRY.pack(g["status"], g["encoding"], len(str(g["payload"])) // 2, g["checksum"]) for g in got
    ) + b"".join(payloads)
    report = list(range(1001, 1013))
    stats = list(range(2001, 2012))
    answer = {"flags": int(Flag.ANSWER)}
    return [
        record(
            "hello_request",
            Op.HELLO,
            hello_body(role=Role.FILE_CACHE, boot_id=BOOT, max_frame_bytes=123_456, client=b"golden 1.0"),
            {
                "version_min": 1,
                "version_max": 1,
                "role": int(Role.FILE_CACHE),
                "page_bytes": PAGE_BYTES,
                "features": int(Feature.LZ4 | Feature.CHECKSUMS),
                "boot_id": BOOT.hex(),
                "max_frame_bytes": 123_456,
                "client": "golden 1.0",
            },
            tag=1,
        ),
        record(
            "hello_answer",
            Op.HELLO,
            HELLO_ANSWER.pack(1, PAGE_BYTES, 3, 1_055_768, 256, 64, 30_000, 5 << 32),
            {
                "version": 1,
                "page_bytes": PAGE_BYTES,
                "features": 3,
                "max_frame_bytes": 1_055_768,
                "max_batch": 256,
                "max_in_flight": 64,
                "keep_alive_ms": 30_000,
                "quota_bytes": 5 << 32,
            },
            tag=1,
            **answer,
        ),
        record("empty", Op.PING, b"", None, tag=0xFFFF_FFFF),
        record("empty", Op.PING, b"", None, tag=0xFFFF_FFFF, **answer),
        record("stats", Op.STATS, STATS.pack(*stats), stats, tag=2, **answer),
        record("report", Op.REPORT, REPORT.pack(*report), report, tag=3),
        record(
            "pool_create",
            Op.POOL_CREATE,
            pool_body("swap", persistent=True),
            {"persistent": True, "exclusive": False, "shared": None, "name": "swap"},
            tag=4,
        ),
        record(
            "pool_create",
            Op.POOL_CREATE,
            # A name of all 32 bytes, and a shared pool: built by hand.
            b"\x00\x03" + bytes(6) + UUID + b"0123456789abcdef0123456789abcdef",
            {
                "persistent": False,
                "exclusive": True,
                "shared": UUID.hex(),
                "name": "0123456789abcdef0123456789abcdef",
            },
            tag=5,
        ),
        record("empty", Op.POOL_CREATE, b"", None, tag=4, pool=77, **answer),
        record("empty", Op.POOL_DESTROY, b"", None, tag=6, pool=77),
        record("put", Op.PUT, put_body(PAGES), entries, tag=7, pool=77, count=3, flags=int(Flag.CHECKSUMS)),
        record(
            "statuses", Op.PUT, bytes(Put), [int(status) for status in Put], tag=7, pool=77, count=6, **answer
        ),
        record("keys", Op.GET, key_bytes, keys, tag=8, pool=77, count=3, flags=int(Flag.ACCEPT_LZ4)),
        record(
            "got",
            Op.GET,
            got_body,
            [g | {"status": int(g["status"])} for g in got],
            tag=8,
            pool=77,
            count=5,
            flags=int(Flag.ANSWER | Flag.CHECKSUMS),
        ),
        record("keys", Op.FLUSH_PAGE, key_bytes, keys, tag=9, pool=77, count=3),
        record("statuses", Op.FLUSH_PAGE, b"\x00\x01\x01", [0, 1, 1], tag=9, pool=77, count=3, **answer),
        record(
            "objects", Op.FLUSH_OBJECT, OBJECT + UUID, [OBJECT.hex(), UUID.hex()], tag=10, pool=77, count=2
        ),
        record("empty", Op.FLUSH_POOL, b"", None, tag=11, pool=77),
        record("notice", Op.RECLAIM, NOTICE.pack(512, 0), [512, 0]),
        record("notice", Op.QUOTA, NOTICE.pack(3 << 33, 1 << 20), [3 << 33, 1 << 20]),
        record("notice", Op.FROZEN, NOTICE.pack(1, 0), [1, 0]),
        record("notice", Op.SHUTDOWN, NOTICE.pack(0, 0), [0, 0]),
        record(
            "error",
            Op.GET,
            b"no such pool",
            "no such pool",
            tag=12,
            pool=78,
            status=int(Status.NO_SUCH_POOL),
            **answer,
        ),
    ]


if __name__ == "__main__":
    text = json.dumps(vectors(), indent=1) + "\n"
    (HERE / "frames.json").write_text(text)
