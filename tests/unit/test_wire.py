"""The golden vectors, the reference client's codec and the native codec's Python functions agree."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tmem_native
from framework import client
from framework.client import HEADER, Op

GOLDEN = Path(__file__).parents[1] / "golden"
VECTORS: list[dict[str, Any]] = json.loads((GOLDEN / "frames.json").read_text())
IDS = [f"{number}-{vector['kind']}" for number, vector in enumerate(VECTORS)]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [vector for vector in VECTORS if vector["kind"] == kind]


def body_of(vector: dict[str, Any]) -> bytes:
    return bytes.fromhex(vector["bytes"])[HEADER.size :]


def test_the_reference_client_writes_the_golden_vectors() -> None:
    spec = importlib.util.spec_from_file_location("golden_write", GOLDEN / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.vectors() == VECTORS


def test_every_operation_has_a_vector() -> None:
    assert {vector["header"]["op"] for vector in VECTORS} == {int(op) for op in Op}


@pytest.mark.parametrize("vector", VECTORS, ids=IDS)
def test_headers(vector: dict[str, Any]) -> None:
    raw = bytes.fromhex(vector["bytes"])[: HEADER.size]
    fields = vector["header"]
    names = ("op", "flags", "tag", "pool", "length", "count", "status")
    assert tmem_native.decode_header(raw) == tuple(fields[name] for name in names)
    given = {name: fields[name] for name in names[1:]}
    assert tmem_native.encode_header(fields["op"], **given) == raw


def test_hello() -> None:
    [request], [answer] = of_kind("hello_request"), of_kind("hello_answer")
    fields = request["fields"] | {"boot_id": bytes.fromhex(request["fields"]["boot_id"])}
    assert tmem_native.decode_hello_request(body_of(request)) == fields
    assert tmem_native.encode_hello_request(**fields) == body_of(request)
    assert tmem_native.decode_hello_answer(body_of(answer)) == answer["fields"]
    assert tmem_native.encode_hello_answer(**answer["fields"]) == body_of(answer)


def test_notices() -> None:
    names = {Op.RECLAIM: "reclaim", Op.QUOTA: "quota", Op.FROZEN: "frozen", Op.SHUTDOWN: "shutdown"}
    for vector in of_kind("notice"):
        op, (first, second) = Op(vector["header"]["op"]), vector["fields"]
        assert tmem_native.decode_notice(op, body_of(vector)) == (names[op], first, second)
        frame = tmem_native.encode_notice(names[op], first, second)  # type: ignore[arg-type]
        assert frame.hex() == vector["bytes"]


def test_report_and_statistics() -> None:
    [report], [stats] = of_kind("report"), of_kind("stats")
    names = [
        "psi_some_avg10",
        "psi_full_avg10",
        "mem_total_bytes",
        "mem_available_bytes",
        "swap_total_bytes",
        "swap_free_bytes",
        "swap_in_pages",
        "swap_out_pages",
        "shim_host_pages",
        "shim_file_pages",
        "cache_hit_pages",
        "cache_miss_pages",
    ]
    given = dict(zip(names, report["fields"], strict=True))
    assert tmem_native.encode_report(**given) == body_of(report)
    assert list(tmem_native.decode_stats(body_of(stats)).values()) == stats["fields"]


def test_constants() -> None:
    assert tmem_native.PORT == 29805
    assert client.PAGE_BYTES == tmem_native.PAGE_BYTES
    assert client.MAX_BATCH == tmem_native.MAX_BATCH
    assert client.HEADER.size == tmem_native.HEADER_BYTES
    assert tmem_native.MAX_BODY_BYTES == 1_055_744


@pytest.mark.parametrize(
    "header",
    [
        bytes(24),
        client.frame(Op.PING, magic=b"TMEX"),
        client.frame(Op.PING, version=2),
        client.frame(0x99),
        client.frame(Op.PUT, length=1_055_745),
        client.frame(Op.PUT, count=257),
    ],
)
def test_headers_that_are_none(header: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        tmem_native.decode_header(header)
