"""A real `tmem-guest swap` as an NBD server, and an NBD client to use it with."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from integration.fs_mount import program

PAGE_BYTES = 4096
Status = dict[str, object]
_READY_S = 20.0
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_READ, _WRITE, _DISCONNECT, _TRIM = 0, 1, 2, 4


class NbdError(Exception):
    """The server answered with an error number."""


class Nbd:
    """One connection; one request at a time."""

    def __init__(self, path: Path, timeout_s: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        self._socket.connect(str(path))
        greeting = self._receive(18)
        assert greeting[:16] == b"NBDMAGICIHAVEOPT", greeting
        self._socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
        self.size_bytes, _flags = struct.unpack(">QH", self._receive(10))
        self._cookie = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.sendall(_REQUEST.pack(0x25609513, 0, _DISCONNECT, 0, 0, 0))
        self._socket.close()

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise ConnectionError("the NBD server closed")
            data += part
        return bytes(data)

    def _ask(self, command: int, page: int, pages: int, data: bytes = b"") -> bytes:
        self._cookie += 1
        header = _REQUEST.pack(0x25609513, 0, command, self._cookie, page * PAGE_BYTES, pages * PAGE_BYTES)
        self._socket.sendall(header + data)
        magic, error, cookie = _REPLY.unpack(self._receive(_REPLY.size))
        assert (magic, cookie) == (0x67446698, self._cookie)
        if error:
            raise NbdError(os.strerror(error))
        return self._receive(pages * PAGE_BYTES) if command == _READ else b""

    def read(self, page: int, pages: int = 1) -> bytes:
        """Pages from `page` on."""
        return self._ask(_READ, page, pages)

    def write(self, page: int, data: bytes) -> None:
        """Whole pages from `page` on."""
        self._ask(_WRITE, page, len(data) // PAGE_BYTES, data)

    def discard(self, page: int, pages: int) -> None:
        """Forget pages."""
        self._ask(_TRIM, page, pages)


class Shim:
    """A running shim; a context manager that leaves nothing behind. `disk` can do direct I/O.

    `wrapper` is a command that runs the command behind it, with less than it has itself.
    """

    def __init__(
        self,
        directory: Path,
        disk: Path,
        endpoint: str,
        *options: str,
        size: str = "16M",
        wrapper: Sequence[str] = (),
    ) -> None:
        self.nbd_socket = directory / "nbd.sock"
        self.file = disk / "swap.tmem"
        self._control = directory / "swap.sock"
        self._log = directory / "swap.log"
        self.command = [
            *(*wrapper, str(program()), "swap"),
            *("--file", str(self.file), "--size", size, "--endpoint", endpoint),
            *("--device", f"serve:{self.nbd_socket}", "--control", str(self._control), *options),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.wait_for("control socket", lambda _: self.nbd_socket.exists())
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)

    @property
    def pid(self) -> int:
        """The serving process."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What it said."""
        return self._log.read_text()

    def ask(self, **request: object) -> Status:
        """One request to the control socket."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(10)
            control.connect(str(self._control))
            control.sendall(json.dumps(request).encode() + b"\n")
            with control.makefile() as answers:
                status = json.loads(answers.readline())
        assert isinstance(status, dict)
        return status

    def status(self) -> Status:
        """Its counters."""
        return self.ask(op="status")

    def wait_for(self, what: str, done: Callable[[Status], bool], timeout_s: float = _READY_S) -> Status:
        """Poll the status until it is as wanted."""
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        status: Status = {}
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.log
            try:
                status = self.status()
            except (FileNotFoundError, ConnectionRefusedError):
                status = {}
            if status and done(status):
                return status
            time.sleep(0.02)
        raise AssertionError(f"no {what} within {timeout_s} s: {status}\n{self.log}")
