"""Guests that break the protocol, flood, or do not read: they are cut off and named in the log; nobody else
notices."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from framework.client import (
    HEADER,
    MAX_BATCH,
    PAGE_BYTES,
    Client,
    ClosedError,
    Op,
    Put,
    RefusedError,
    Role,
    Status,
    frame,
    hello_body,
    key,
    pool_body,
)
from framework.daemon import MIB, Tmemd

MAX_BODY = 256 * (4096 + 28)
HELLO = frame(Op.HELLO, hello_body(boot_id=(1).to_bytes(16, "little")))


@contextmanager
def raw(tmemd: Tmemd, vm: str = "a", *, timeout_s: float = 10.0) -> Iterator[socket.socket]:
    """A connection that has said nothing yet."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(tmemd.vm_socket(vm)))
        yield connection


def read_to_end(connection: socket.socket) -> bytes:
    """All that comes until the host closes."""
    got = b""
    while True:
        try:
            received = connection.recv(1 << 16)
        except ConnectionResetError:
            return got
        if not received:
            return got
        got += received


def last_status(answers: bytes) -> Status | None:
    """Status of the last whole frame."""
    status = None
    while len(answers) >= HEADER.size:
        fields = HEADER.unpack(answers[: HEADER.size])
        status, answers = Status(fields[8]), answers[HEADER.size + fields[6] :]
    return status


BEFORE_HELLO = {
    "an empty line": b"\n" * 24,
    "HTTP": b"GET / HTTP/1.1\r\nHost: tmemd\r\n\r\n",
    "zeros": bytes(64),
    "another magic": frame(Op.HELLO, hello_body(), magic=b"XMEM"),
    "another version": frame(Op.HELLO, hello_body(), version=9),
    "PING first": frame(Op.PING),
    "PUT first": frame(Op.PUT, b"x" * 29, count=1),
    "an unknown operation": frame(0x7F),
    "a body that is too long": frame(Op.HELLO, length=MAX_BODY + 1),
    "a huge body": frame(Op.HELLO, length=0xFFFF_FFFF),
    "a short HELLO": frame(Op.HELLO, hello_body()[:-1]),
    "a long HELLO": frame(Op.HELLO, hello_body() + b"x"),
    "an unknown role": frame(Op.HELLO, hello_body(role=9)),
    "control characters in its name": frame(Op.HELLO, hello_body(client=b"a\nb")),
    "a HELLO that claims to be an answer": frame(Op.HELLO, hello_body(), flags=1),
    "a batch that is too long": frame(Op.HELLO, hello_body(), count=MAX_BATCH + 1),
}
AFTER_HELLO = {
    "a second HELLO": HELLO,
    "a notice": frame(Op.RECLAIM, bytes(16)),
    "SHUTDOWN": frame(Op.SHUTDOWN, bytes(16)),
    "an answer": frame(Op.PING, flags=1),
    "a status": frame(Op.PING, status=1),
    "PING with a body": frame(Op.PING, b"x"),
    "a REPORT on a swap connection": frame(Op.REPORT, bytes(96)),
    "GET of nothing": frame(Op.GET),
    "GET with half a key": frame(Op.GET, bytes(19), count=1),
    "GET with a key too many": frame(Op.GET, bytes(40), count=1),
    "PUT of nothing": frame(Op.PUT),
    "PUT without payload": frame(Op.PUT, bytes(28), count=1),
    "PUT of an unknown encoding": frame(Op.PUT, struct.pack("<20xBxHI", 9, 8, 0) + bytes(8), count=1),
    "PUT of a short raw page": frame(Op.PUT, struct.pack("<20xBxHI", 1, 8, 0) + bytes(8), count=1),
    "PUT whose lengths lie": frame(Op.PUT, struct.pack("<20xBxHI", 3, 4000, 0) + bytes(8), count=1),
    "PUT with bytes behind it": frame(Op.PUT, struct.pack("<20xBxHI", 2, 8, 0) + bytes(9), count=1),
    "POOL_CREATE of an unknown kind": frame(Op.POOL_CREATE, b"\x07" + pool_body("p")[1:]),
    "POOL_CREATE without a name": frame(Op.POOL_CREATE, pool_body("")),
    "POOL_CREATE with unknown flags": frame(Op.POOL_CREATE, b"\x00\x80" + pool_body("p")[2:]),
    "noise": random.Random(4).randbytes(5000),
}


@pytest.mark.parametrize("bytes_sent", BEFORE_HELLO.values(), ids=BEFORE_HELLO)
def test_garbage_instead_of_hello(tmemd: Tmemd, bytes_sent: bytes) -> None:
    _assert_protocol_error(tmemd, bytes_sent)


@pytest.mark.parametrize("bytes_sent", AFTER_HELLO.values(), ids=AFTER_HELLO)
def test_garbage_after_hello(tmemd: Tmemd, bytes_sent: bytes) -> None:
    _assert_protocol_error(tmemd, HELLO + bytes_sent)


def _assert_protocol_error(tmemd: Tmemd, bytes_sent: bytes) -> None:
    """Told, closed, counted, logged with the VM's name; a connection of the same VM goes on."""
    with tmemd.guest("a") as other:
        with raw(tmemd) as connection:
            connection.sendall(bytes_sent)
            assert last_status(read_to_end(connection)) is Status.PROTOCOL
        other.ping()
    with tmemd.admin() as admin:
        assert admin.vm("a").protocol_errors == 1
    line = next(line for line in tmemd.log.splitlines() if "protocol error" in line)
    assert "vm=a" in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version_min": 2, "version_max": 3}, "version"),
        ({"page_bytes": 65536}, "4096"),
        ({"max_frame_bytes": 4127}, "4128"),
    ],
)
def test_a_guest_that_cannot_be_served_is_told_why(
    tmemd: Tmemd, fields: dict[str, int], message: str
) -> None:
    with raw(tmemd) as connection:
        connection.sendall(frame(Op.HELLO, hello_body(**fields)))  # type: ignore[arg-type]
        answer = read_to_end(connection)
    assert last_status(answer) is Status.UNSUPPORTED
    assert message in answer.decode(errors="replace")
    with tmemd.admin() as admin:
        assert admin.vm("a").protocol_errors == 0


def test_random_frames_never_disturb_another_vm(tmemd: Tmemd) -> None:
    """Headers that are right at first sight, with everything else at random."""
    tmemd.add_vm("b")
    chance = random.Random(5)
    with tmemd.guest("b") as victim:
        pool = victim.create_pool("p", persistent=True)
        victim.put(pool, [(key(1), bytes(PAGE_BYTES))])
        for _ in range(150):
            with raw(tmemd) as connection:
                hostile = HELLO
                for _ in range(chance.randrange(1, 6)):
                    body = chance.randbytes(chance.choice([0, 16, 20, 28, 56, 64, 96, 4124]))
                    hostile += frame(
                        chance.choice([*Op, chance.randrange(256)]),
                        body,
                        flags=chance.choice([0, 2, 4, 0xFFFE, chance.randrange(1 << 16)]),
                        tag=chance.randrange(1 << 32),
                        pool=chance.choice([0, pool, pool + 1, chance.randrange(1 << 32)]),
                        count=chance.choice([0, 1, 2, 256, chance.randrange(1 << 16)]),
                    )
                try:
                    connection.sendall(hostile)
                    connection.shutdown(socket.SHUT_WR)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                read_to_end(connection)
        assert victim.get(pool, [key(1)]) == [bytes(PAGE_BYTES)]


QUICK = """
[limits]
connections = 8
hello_timeout_s = 0.4
frame_timeout_s = 0.4
stall_timeout_s = 0.5
keep_alive_s = 0.3
"""


def test_silence_instead_of_hello(start_tmemd: Callable[..., Tmemd]) -> None:
    tmemd = start_tmemd(config=QUICK)
    tmemd.add_vm("a")
    with raw(tmemd) as silent, raw(tmemd) as half:
        half.sendall(HELLO[:30])
        assert read_to_end(silent) == b""
        assert read_to_end(half) == b""
    assert "no HELLO in time" in tmemd.log


def test_half_a_frame(start_tmemd: Callable[..., Tmemd]) -> None:
    tmemd = start_tmemd(config=QUICK.replace("keep_alive_s = 0.3", ""))
    tmemd.add_vm("a")
    with raw(tmemd) as connection:
        connection.sendall(HELLO)
        # A frame that comes byte by byte gets no more time than one that does not come at all.
        put = frame(Op.PUT, bytes(28 + 8), count=1)
        start = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for byte in put * 10:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - start < 5
    assert "a frame did not arrive whole in time" in tmemd.log


def test_keep_alive(start_tmemd: Callable[..., Tmemd]) -> None:
    tmemd = start_tmemd(config=QUICK)
    tmemd.add_vm("a")
    with tmemd.guest("a") as alive, tmemd.guest("a", role=Role.CONTROL) as dead:
        assert alive.hello.keep_alive_ms == 300
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            alive.ping()
            time.sleep(0.2)
        with pytest.raises(ClosedError):
            dead.receive()


def test_answers_that_are_never_read(start_tmemd: Callable[..., Tmemd]) -> None:
    """The guest is cut off, memory stays bounded, and another VM is served meanwhile."""
    tmemd = start_tmemd(config=QUICK.replace("keep_alive_s = 0.3", ""))
    tmemd.add_vm("a")
    tmemd.add_vm("b")
    with tmemd.guest("b") as victim, ExitStack() as stack:
        before = tmemd.rss_bytes()
        floods = []
        for _ in range(8):
            flood = stack.enter_context(tmemd.guest("a"))
            pool = flood.create_pool("p")
            flood.put(
                pool, [(key(1, index), random.Random(index).randbytes(PAGE_BYTES)) for index in range(64)]
            )
            floods.append((flood, pool))
        gets = frame(
            Op.GET, b"".join(key(1, i % 64).object + struct.pack("<I", i % 64) for i in range(256)), count=256
        )
        for flood, pool in floods:
            flood.socket.settimeout(0.2)
            request = gets[:12] + struct.pack("<I", pool) + gets[16:]
            with pytest.raises((TimeoutError, BrokenPipeError, ConnectionResetError)):
                for _ in range(1000):
                    flood.socket.sendall(request)
            victim.ping()
        grown = tmemd.rss_bytes() - before
        assert grown < 60 * MIB, f"{grown / MIB:.0f} MiB for eight connections"
        deadline = time.monotonic() + 10
        with tmemd.admin() as admin:
            while admin.vm("a").connections and time.monotonic() < deadline:
                time.sleep(0.1)
            assert admin.vm("a").connections == 0
        victim.ping()
    assert "answers were not read in time" in tmemd.log


def test_too_many_connections(start_tmemd: Callable[..., Tmemd]) -> None:
    tmemd = start_tmemd(config=QUICK.replace("keep_alive_s = 0.3", ""))
    tmemd.add_vm("a")
    tmemd.add_vm("b")
    with ExitStack() as stack:
        guests = [stack.enter_context(tmemd.guest("a")) for _ in range(8)]
        for _ in range(100):
            with pytest.raises((ClosedError, BrokenPipeError)):
                tmemd.guest("a")
        with tmemd.guest("b") as other:
            other.ping()
        guests[0].ping()
        with tmemd.admin() as admin:
            vm = admin.vm("a")
            assert (vm.connections, vm.connections_refused) == (8, 100)
        guests.pop().close()
        deadline = time.monotonic() + 5
        while True:
            try:
                stack.enter_context(tmemd.guest("a")).ping()
                break
            except (ClosedError, BrokenPipeError):
                assert time.monotonic() < deadline


def test_too_many_pools(tmemd: Tmemd) -> None:
    tmemd.add_vm("b")
    with tmemd.guest("a") as greedy, tmemd.guest("b") as other:
        with pytest.raises(RefusedError) as refused:
            for number in range(100_000):
                greedy.create_pool(f"pool {number}")
        assert refused.value.status is Status.LIMIT
        assert other.create_pool("p") > 0


def test_the_log_of_a_hostile_guest_is_bounded(tmemd: Tmemd) -> None:
    for _ in range(200):
        with raw(tmemd) as connection:
            connection.sendall(bytes(64))
            read_to_end(connection)
    with tmemd.admin() as admin:
        assert admin.vm("a").protocol_errors == 200
    assert tmemd.log.count("protocol error") < 60


def test_the_rate_limit_slows_and_follows_the_weight(start_tmemd: Callable[..., Tmemd]) -> None:
    tmemd = start_tmemd(config="[limits]\npages_per_s = 2000\n")
    tmemd.add_vm("a", weight=100)
    tmemd.add_vm("heavy", weight=300)

    def rate(vm: str) -> float:
        pages = [(key(1, index), bytes(PAGE_BYTES)) for index in range(100)]
        with tmemd.guest(vm) as guest:
            pool = guest.create_pool("p")
            done, start = 0, time.monotonic()
            while time.monotonic() - start < 1.5:
                assert set(guest.put(pool, pages)) == {Put.STORED}
                done += len(pages)
            return done / (time.monotonic() - start)

    assert 1500 < rate("a") < 2700
    assert 4500 < rate("heavy") < 8100


def test_a_flood_does_not_starve_another_vm(start_tmemd: Callable[..., Tmemd]) -> None:
    """Sixteen connections that send large batches as fast as they can, against one that gets single pages."""
    tmemd = start_tmemd()
    tmemd.add_vm("a")
    tmemd.add_vm("b")
    stop = time.monotonic() + 60

    def waits(guest: Client, pool: int, count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = time.monotonic()
            assert guest.get(pool, [key(1)]) == [bytes(PAGE_BYTES)]
            times.append(time.monotonic() - start)
        return sorted(times)

    with tmemd.guest("b") as victim, ExitStack() as stack:
        pool = victim.create_pool("p", persistent=True)
        victim.put(pool, [(key(1), bytes(PAGE_BYTES))])
        floods = []
        for _ in range(15):
            flood = stack.enter_context(tmemd.guest("a"))
            other = flood.create_pool("p")
            body = b"".join(struct.pack("<16sI", bytes(16), i) for i in range(256))
            flood.socket.setblocking(False)
            floods.append((flood, frame(Op.GET, body, pool=other, count=256)))
        times: list[float] = []
        while len(times) < 400:
            assert time.monotonic() < stop
            for flood, request in floods:
                try:
                    flood.socket.send(request)
                    flood.socket.recv(1 << 20)
                except BlockingIOError:
                    continue
            times += waits(victim, pool, 10)
        times.sort()
        assert times[len(times) // 2] < 0.02
        assert times[-1] < 1.0
