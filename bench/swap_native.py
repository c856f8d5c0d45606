"""The part of the swap benchmark that needs no VM: what the shim's own work costs a processor.

The shim is an NBD server on a unix socket, with a tmemd behind another; fio is its client, with random reads
and writes of 4 KiB, 16 at a time. What fio writes before the host is connected, a few pages, goes to the
file. Counted is what the shim gets done in a second of processor time; beside it qemu-nbd, a file in memory,
which needs no host.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

_MIB = 1 << 20
SIZE_MIB = 64
SECONDS = 3
_JOB_S = 120.0
PATTERNS = ("randread", "randwrite")

Samples = dict[tuple[str, str], list[dict[str, float]]]
"""Figures by server and pattern."""


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fio(socket: Path, pattern: str, *options: str) -> float:
    """IOPS of a job on an NBD server."""
    argv = [
        *("fio", "--name=job", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}", f"--rw={pattern}"),
        *(f"--size={SIZE_MIB}M", "--refill_buffers", "--buffer_compress_percentage=50"),
        *("--output-format=json", *options),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_JOB_S, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    iops: float = job["read" if "read" in pattern else "write"]["iops"]
    return iops


@contextmanager
def _shim(directory: Path) -> Iterator[tuple[Path, int]]:
    # The path is set by the program.
    from framework.daemon import Tmemd  # noqa: PLC0415
    from integration.swap_shim import Shim  # noqa: PLC0415

    with ExitStack() as stack:
        disk = stack.enter_context(tempfile.TemporaryDirectory(prefix="tmem-bench-", dir="/var/tmp"))
        tmemd = stack.enter_context(Tmemd(directory, capacity="512M"))
        tmemd.add_vm("a", quota_bytes=256 * _MIB)
        endpoint = f"unix:{tmemd.vm_socket('a')}"
        shim = stack.enter_context(Shim(directory, Path(disk), endpoint, size=f"{2 * SIZE_MIB}M"))
        yield shim.nbd_socket, shim.pid


@contextmanager
def _qemu_nbd(directory: Path) -> Iterator[tuple[Path, int]]:
    file, socket = directory / "file", directory / "qemu.sock"
    with file.open("wb") as out:
        out.truncate(2 * SIZE_MIB * _MIB)
    argv = ["qemu-nbd", "--persistent", "--shared=4", "--format=raw", f"--socket={socket}", str(file)]
    with subprocess.Popen(argv) as process:
        try:
            deadline = time.monotonic() + 10
            while not socket.exists():
                assert process.poll() is None and time.monotonic() < deadline, "qemu-nbd did not start"
                time.sleep(0.01)
            yield socket, process.pid
        finally:
            process.kill()


def measure(rounds: int) -> Samples:
    """All servers by turns, `rounds` times."""
    samples: Samples = {}
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sn-", dir="/dev/shm")))
        servers = {
            "shim": stack.enter_context(_shim(place)),
            "qemu-nbd": stack.enter_context(_qemu_nbd(place)),
        }
        for socket, _ in servers.values():
            _fio(socket, "write", "--bs=64k")
        for _, pattern, (name, (socket, pid)) in product(range(rounds), PATTERNS, servers.items()):
            before = _cpu_s(pid)
            timed = ["--bs=4k", "--iodepth=16", "--time_based", f"--runtime={SECONDS}"]
            iops = _fio(socket, pattern, *timed)
            cpu_s = _cpu_s(pid) - before
            per_core = iops * SECONDS / cpu_s
            samples.setdefault((name, pattern), []).append({"iops": iops, "per_core": per_core})
            busy = f"{cpu_s / SECONDS:5.0%} of a core"
            print(f"  {name:10} {pattern:10} {iops:9.0f} IOPS, {busy}, {per_core:9.0f} per core", flush=True)
    return samples
