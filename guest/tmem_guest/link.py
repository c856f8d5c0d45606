"""The control connection to tmemd: reports out, notices in, made anew for ever.

A thread of its own does all of it. It sends a REPORT each interval, which also keeps the connection alive,
and hands every notice to a callback. A host that is not there is nothing unusual: the guest runs on.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tmem_guest import log, wire
from tmem_guest.config import parse_endpoint
from tmem_guest.memory import LockedBuffer
from tmem_guest.units import format_size

CLIENT = "tmem-agent 0.1"
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 15.0
FIRST_DELAY_S = 0.2
MAX_DELAY_S = 5.0
_BUFFER_BYTES = 4096
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LinkError(Exception):
    """The connection is of no further use; the message says why."""


def boot_id() -> bytes:
    """The running kernel's boot id, 16 bytes. Raises OSError."""
    return bytes.fromhex(_BOOT_ID.read_text(encoding="ascii").strip().replace("-", ""))


class HostLink(threading.Thread):
    """Keeps one control connection to `endpoint`. Its attributes are a snapshot for status displays."""

    def __init__(
        self,
        endpoint: str,
        *,
        interval_s: float,
        make_report: Callable[[], wire.Report],
        on_notice: Callable[[wire.Notice], None],
    ) -> None:
        super().__init__(name="host link", daemon=True)
        self.endpoint = endpoint
        self.connected = threading.Event()
        self.settled = threading.Event()  # connected, or tried once and failed
        self.hello: wire.HelloAnswer | None = None
        self.stats: wire.Stats | None = None
        self.quota_bytes = 0
        self.frozen = False
        self.reports = 0
        self.round_trip_s = 0.0
        self.connections = 0
        self.last_error = ""
        self._interval_s = interval_s
        self._make_report = make_report
        self._on_notice = on_notice
        self._buffer = LockedBuffer(_BUFFER_BYTES)
        if self._buffer.error:
            log.warning(
                f"cannot lock {_BUFFER_BYTES} bytes of memory: {self._buffer.error};"
                " with swap on tmem the guest may hang"
            )
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False

    def stop(self) -> None:
        """Close the connection and end the thread. Call once."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self.is_alive():
            self.join()
        os.close(self._wake)

    def run(self) -> None:
        """The thread's body."""
        delay_s = FIRST_DELAY_S
        while not self._stopping:
            try:
                with self._open() as connection:
                    delay_s = FIRST_DELAY_S
                    self._serve(connection)
            except (OSError, LinkError, wire.WireError) as error:
                self._lost(error)
            self.connected.clear()
            self.settled.set()
            if self._stopping:
                return
            # Up to a quarter more, so that the guests of a restarted host do not come all at once.
            jitter = 1 + os.urandom(1)[0] / 1024
            select.select([self._wake], [], [], delay_s * jitter)
            delay_s = min(delay_s * 2, MAX_DELAY_S)

    def _lost(self, error: Exception) -> None:
        reason = str(error)
        if self.connected.is_set():
            log.warning(f"lost the host at {self.endpoint}: {reason}; reconnecting")
        elif reason != self.last_error:
            log.warning(f"no host at {self.endpoint}: {reason}; trying again until there is one")
        self.last_error = reason

    def _open(self) -> socket.socket:
        address = parse_endpoint(self.endpoint)
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_VSOCK
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(CONNECT_TIMEOUT_S)
            connection.connect(address)
            started = time.monotonic()
            self._send(connection, wire.hello(0, boot_id(), CLIENT))
            header, body = self._receive(connection, "the answer to HELLO")
            self.hello = self._settle(header, body)
        except BaseException:
            connection.close()
            raise
        self.round_trip_s = time.monotonic() - started
        self.quota_bytes = self.hello.quota_bytes
        self.frozen = False
        self.last_error = ""
        self.connections += 1
        self.connected.set()
        self.settled.set()
        log.info(f"connected to the host at {self.endpoint}, quota {format_size(self.quota_bytes)}")
        return connection

    @staticmethod
    def _settle(header: wire.Header, body: bytes) -> wire.HelloAnswer:
        if header.status:
            raise LinkError(f"the host refused HELLO: {body.decode(errors='replace')}")
        if header.op is not wire.Op.HELLO or not header.is_answer:
            raise LinkError(f"the host answered HELLO with {header.op.name}")
        return wire.decode_hello(body)

    def _receive(self, connection: socket.socket, awaited: str) -> tuple[wire.Header, bytes]:
        try:
            header = wire.decode_header(self._exactly(connection, wire.HEADER_BYTES, awaited))
            return header, self._exactly(connection, header.length, awaited)
        except TimeoutError:
            timeout_s = connection.gettimeout() or 0
            raise LinkError(f"no answer within {timeout_s:g} s while waiting for {awaited}") from None

    def _exactly(self, connection: socket.socket, size: int, awaited: str) -> bytes:
        data = bytearray()
        while len(data) < size:
            room = self._buffer.bytes[: size - len(data)]
            received = connection.recv_into(room)
            if not received:
                raise LinkError(f"the host closed the connection while this end was waiting for {awaited}")
            data += room[:received]
        return bytes(data)

    def _send(self, connection: socket.socket, frame: bytes) -> None:
        for start in range(0, len(frame), _BUFFER_BYTES):
            part = frame[start : start + _BUFFER_BYTES]
            self._buffer.bytes[: len(part)] = part
            connection.sendall(self._buffer.bytes[: len(part)])

    def _serve(self, connection: socket.socket) -> None:
        """Report each interval and take what comes, until the connection ends or the agent stops."""
        connection.settimeout(ANSWER_TIMEOUT_S)
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        unanswered: dict[int, float] = {}
        tag = 0
        next_report = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            if now >= next_report:
                if unanswered and now - min(unanswered.values()) > ANSWER_TIMEOUT_S:
                    raise LinkError(
                        f"no answer within {ANSWER_TIMEOUT_S:g} s while waiting for one to a report"
                    )
                if len(unanswered) < 4:  # a slow host gets fewer reports, not a queue of them
                    tag = tag % 0xFFFF_FFF0 + 2
                    self._send(connection, wire.report(tag, self._make_report()))
                    self._send(connection, wire.frame(wire.Op.STATS, tag + 1))
                    unanswered[tag] = now
                next_report = max(next_report + self._interval_s, now)
            wait_s = max(0.0, next_report - time.monotonic())
            for fd, _events in poll.poll(wait_s * 1000):
                if fd == connection.fileno():
                    self._take(connection, unanswered)

    def _take(self, connection: socket.socket, unanswered: dict[int, float]) -> None:
        header, body = self._receive(connection, "the rest of a frame")
        if not header.is_answer:
            if header.op not in wire.NOTICES:
                raise LinkError(f"the host sent a request, {header.op.name}")
            self._notice(wire.decode_notice(header.op, body))
        elif header.status:
            raise LinkError(f"the host refused {header.op.name}: {body.decode(errors='replace')}")
        elif header.op is wire.Op.REPORT:
            sent = unanswered.pop(header.tag, None)
            if sent is not None:
                self.round_trip_s = time.monotonic() - sent
                self.reports += 1
        elif header.op is wire.Op.STATS:
            self.stats = wire.decode_stats(body)
            self.quota_bytes = self.stats.quota_bytes
            self.frozen = bool(self.stats.frozen)

    def _notice(self, notice: wire.Notice) -> None:
        if notice.op is wire.Op.QUOTA:
            self.quota_bytes = notice.first
        elif notice.op is wire.Op.FROZEN:
            self.frozen = bool(notice.first)
        self._on_notice(notice)
        if notice.op is wire.Op.SHUTDOWN:
            raise LinkError("the host is shutting down")
