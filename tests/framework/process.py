"""A program under test that says when it is ready, as systemd has it said (`NOTIFY_SOCKET`)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

_READY_S = 20.0
_STOP_S = 20.0


class Program:
    """A process that can be started again and again; a context manager that leaves it running nowhere.

    The directory, for its log and the socket, must be short: socket paths have at most 107 bytes.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self._name = name
        self._log = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def command(self) -> Sequence[str]:
        """What to run."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """Settings beside those of this process."""
        return {}

    @property
    def pid(self) -> int:
        """Its process ID."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What it wrote to standard output and error since the first start."""
        return self._log.read_text()

    def start(self) -> None:
        """Start it and wait until it says that it is ready."""
        address = self.directory / "notify.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self._log.open("ab") as log:
            ready.bind(str(address))
            try:
                self._process = subprocess.Popen(
                    self.command(),
                    env=os.environ | dict(self.environment()) | {"NOTIFY_SOCKET": str(address)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
                self._await_ready(ready)
            finally:
                address.unlink()

    def _await_ready(self, ready: socket.socket) -> None:
        assert self._process is not None
        ready.settimeout(0.1)
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            try:
                if ready.recv(4096) == b"READY=1":
                    return
            except TimeoutError:
                if (code := self._process.poll()) is not None:
                    raise AssertionError(f"{self._name} ended with {code}:\n{self.log}") from None
        self.kill()
        raise AssertionError(f"{self._name} was not ready after {_READY_S} s:\n{self.log}")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        assert self._process is not None
        return self._process.wait(_STOP_S)

    def stop(self) -> int:
        """Stop it as systemd would; returns its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """kill -9, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(_STOP_S)

    def restart(self, *, kill: bool = False) -> None:
        """Stop or kill it, and start it again."""
        if kill:
            self.kill()
        else:
            assert self.stop() == 0, self.log
        self.start()
