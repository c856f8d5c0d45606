"""A program in the guest that fills memory with a pattern, so that the kernel swaps, and verifies it.

It is compiled in the guest from `memory.c`: the image has a compiler for the kernel build anyhow.
"""

from __future__ import annotations

import re
from importlib.resources import files

import msgspec

from tmem_host.errors import OperatorError
from tmem_host.workloads.shell import OnOutput, Shell, WorkloadError, checked, finish

PROGRAM = "/run/tmem-memory"
STOP_FILE = "/run/tmem-memory.stop"
_NOT_INTACT = 3


class MemoryResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was verified."""

    pages: int
    """Filled."""
    pages_verified: int
    """All passes together; every one of them was intact."""
    passes: int


def prepare(shell: Shell) -> None:
    """Compile the program in the guest."""
    source = (files("tmem_host.workloads") / "memory.c").read_bytes()
    argv = ["sh", "-c", f"rm -f {STOP_FILE} && exec gcc -O2 -x c -o {PROGRAM} -"]
    checked(shell, "compiling the memory program", argv, deadline_s=180, stdin=source)


def run(
    shell: Shell,
    *,
    size_bytes: int,
    seconds: int,
    pause_ms: int = 20,
    deadline_s: float,
    on_output: OnOutput | None = None,
) -> MemoryResult:
    """Fill `size_bytes` and verify them, pass after pass, for `seconds` or until `stop`.

    `pause_ms` after every 256 pages leaves other programs a chance. Raises WorkloadError if a page was not
    intact (exit code 3) or the program was killed, and OperatorError (TIMEOUT) when the deadline passes.
    """
    argv = [PROGRAM, str(size_bytes >> 20), str(seconds), STOP_FILE, str(pause_ms)]
    finished = finish(shell, argv, deadline_s=deadline_s, on_output=on_output)
    if finished.exit_code == _NOT_INTACT:
        raise WorkloadError(
            f"swapped memory did not come back intact: {finished.stderr.strip()}", exit_code=_NOT_INTACT
        )
    if finished.exit_code != 0:
        raise WorkloadError(
            f"the memory program ended with exit code {finished.exit_code}: "
            f"{finished.stderr.strip() or 'it was killed'}",
            exit_code=finished.exit_code,
            hint="a smaller size, or a larger swap file in the guest",
        )
    return parse(finished.stdout)


def stop(shell: Shell) -> None:
    """Make a running program verify everything once more and end."""
    checked(shell, "stopping the memory program", ["touch", STOP_FILE], deadline_s=120)


def parse(text: str) -> MemoryResult:
    """Read what the program printed. Raises OperatorError if it did not get to its end."""
    filled = re.search(r"filled (\d+) pages", text)
    verified = re.search(r"verified (\d+) pages, all intact", text)
    if filled is None or verified is None:
        raise OperatorError("the memory program's output cannot be read: it did not get to its end")
    return MemoryResult(
        pages=int(filled[1]),
        pages_verified=int(verified[1]),
        passes=len(re.findall(r"^pass \d+:", text, re.MULTILINE)),
    )
