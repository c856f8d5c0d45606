"""The store's peers: zram through the block layer, Redis and memcached over their sockets."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tmem_native

_START_S = 10.0
_PORT = 29805
_MIB = 1 << 20


class SkippedError(Exception):
    """A peer is not there; the message says why."""


@contextmanager
def zram_device(size_bytes: int) -> Iterator[Path]:
    """A zram device that compresses with lz4, reset afterwards.

    Raises:
        SkippedError: there is none that is free, or it needs root.
    """
    control, device = Path("/sys/block/zram0"), Path("/dev/zram0")
    if os.geteuid() != 0 or not control.exists():
        raise SkippedError("zram needs root and a kernel that has it")
    if (control / "disksize").read_text().strip() != "0":
        raise SkippedError("/dev/zram0 is in use")
    algorithm = (control / "comp_algorithm").read_text()
    before = algorithm.split("[")[1].split("]")[0]
    try:
        (control / "comp_algorithm").write_text("lz4")
        (control / "disksize").write_text(str(size_bytes))
        yield device
    finally:
        (control / "reset").write_text("1")
        (control / "comp_algorithm").write_text(before)


@dataclass(frozen=True)
class Server:
    """A store that serves on a socket."""

    name: str
    socket: Path
    memory_bytes: Callable[[], int]


def _resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def _grown_bytes(pid: int, before: int) -> int:
    return _resident_bytes(pid) - before


@contextmanager
def _process(arguments: list[str], socket: Path) -> Iterator[int]:
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_S
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SkippedError(f"{arguments[0]} did not open {socket} within {_START_S:g} s")
            time.sleep(0.01)
        yield process.pid
    finally:
        process.kill()
        process.wait()


@contextmanager
def servers(directory: Path, *, compression: bool) -> Iterator[list[Server]]:
    """The native engine, Redis and memcached, with persistence off, each on a unix socket."""
    with ExitStack() as stack:
        engine = tmem_native.Engine(capacity_bytes=2048 * _MIB)
        engine.set_compression(compression)
        engine.add_vm("load", quota_bytes=2048 * _MIB, hybrid_socket=str(directory / "tmem"))
        found = [
            Server("tmem", directory / f"tmem_{_PORT}", lambda: engine.usage()["used_bytes"]),
        ]
        commands = {
            "redis": ["redis-server", "--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"],
            "memcached": ["memcached", "-u", "root", "-m", "4096", "-s"],
        }
        for name, command in commands.items():
            socket = directory / name
            try:
                pid = stack.enter_context(_process([*command, str(socket)], socket))
            except FileNotFoundError as error:
                raise SkippedError(f"{command[0]} is not installed") from error
            found.append(Server(name, socket, partial(_grown_bytes, pid, _resident_bytes(pid))))
        yield found


@dataclass(frozen=True)
class Load:
    """What every server is asked for."""

    values: Path
    mode: str
    clients: int = 8
    batch: int = 16
    pages: int = 40_000

    def run(self, program: Path, server: Server) -> dict[str, float]:
        """Put all pages, get all pages; pages a second of each."""
        numbers = [str(self.clients), str(self.batch), str(self.pages)]
        command = [str(program), server.name, str(server.socket), str(self.values), *numbers, self.mode]
        answer: dict[str, float] = json.loads(subprocess.check_output(command, timeout=120))
        return answer
