"""`tmem-bench`, the program that both parts of the transport's benchmark run, and what it answers."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = int(os.environ.get("TMEM_BENCH_ROUNDS", "5"))
BATCHES = (1, 8, 32, 256)
_START_S = 10.0
_RUN_S = 120.0

Run: TypeAlias = list[str]
"""Arguments of `tmem-bench`."""
Report: TypeAlias = "dict[str, float | str | list[list[float]] | None]"
Samples: TypeAlias = "dict[str, list[dict[str, float]]]"
"""By name of the run, one report a round. Histograms are under `histograms`, merged by `histogram`."""


def build() -> None:
    """Build the program."""
    command = ["cargo", "build", "--quiet", "--release", "-j2", "-p", "tmem-bench"]
    subprocess.run(command, cwd=ROOT, check=True)


def program() -> Path:
    """Where it is."""
    return ROOT / "target" / "release" / "tmem-bench"


def waiting_for(socket: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server has opened its socket."""
    deadline = time.monotonic() + _START_S
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{process.args!r} did not open {socket} within {_START_S:g} s")
        time.sleep(0.01)


@contextmanager
def serving(
    directory: Path, *vms: str, options: tuple[str, ...] = (), own_session: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """`tmem-bench serve` with these VMs, their sockets in `directory`/VM.

    With `own_session`, the kernel shares the CPUs between it and other sessions, not between all threads.
    """
    command = [str(program()), "serve", "--dir", str(directory), *options]
    for vm in vms:
        command += ["--vm", vm]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=own_session) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            line = process.stdout.readline()
            if b"ready" not in line:
                raise SystemExit("the server did not start")
            yield process
        finally:
            process.stdin.close()
            try:
                process.wait(_START_S)
            except subprocess.TimeoutExpired:
                process.kill()


def parse(output: str) -> dict[str, float]:
    """The figures of the last line of output; the histogram stays under its name."""
    report: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return report


def pinned(cpu: int | None, command: list[str]) -> list[str]:
    """The command, kept to one CPU; `None` for all."""
    return command if cpu is None else ["taskset", "--cpu-list", str(cpu), *command]


def collect(
    samples: Samples, name: str, run: Run, *, own_session: bool = False, cpu: int | None = None
) -> None:
    """Run it on this machine, on this CPU or on all, and keep its figures."""
    command = pinned(cpu, [str(program()), *run])
    output = subprocess.check_output(command, timeout=_RUN_S, text=True, start_new_session=own_session)
    samples.setdefault(name, []).append(parse(output))


def median(reports: list[dict[str, float]], key: str) -> float:
    """Median of a figure over the rounds."""
    return statistics.median(report[key] for report in reports)
