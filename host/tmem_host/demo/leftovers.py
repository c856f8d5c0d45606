"""What stayed behind of a demonstration, and proof that nothing did.

Everything the demonstration starts names its private directory: in the command line (QEMU, vsock devices,
tmemd), as a mount or a loop device's file, or has the directory in its environment.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT_KEY = "TMEM_DEMO_DIRECTORY"
"""Set in the environment of every process the demonstration starts."""


@contextmanager
def alive(directory: Path) -> Iterator[None]:
    """While this lasts, and as long as this process lives, `directory` is not among the `dead`."""
    locked = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(locked)


def dead(parent: Path, prefix: str) -> list[Path]:
    """Directories whose demonstration was killed before it could remove them."""
    found = []
    for directory in sorted(parent.glob(f"{prefix}*")):
        try:
            with alive(directory):
                found.append(directory)
        except (BlockingIOError, FileNotFoundError):
            continue  # it is being looked after, or was removed just now
    return found


def find(directory: Path) -> list[str]:
    """What still refers to `directory`, one line each; empty if nothing does."""
    running = [f"process {pid} ({name}) still runs" for pid, name in processes(directory).items()]
    return [*running, *_mounts(directory), *_loops(directory), *_files(directory)]


def wait_until_none(directory: Path, deadline_s: float) -> list[str]:
    """Give processes that were told to end the time to do so; returns what is left after it."""
    until_s = time.monotonic() + deadline_s
    while (left := find(directory)) and time.monotonic() < until_s:
        time.sleep(0.1)  # a poll with a deadline: an exiting process of somebody else's cannot be waited for
    return left


def processes(directory: Path) -> dict[int, str]:
    """The processes that name `directory`, by id; the value is the program."""
    marks = (os.fsencode(f"{directory}/"), os.fsencode(f"{ENVIRONMENT_KEY}={directory}\0"))
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue  # it ended while we looked, or is not ours to look at
        # A zombie has neither; whoever started it has yet to collect it.
        if marks[0] in command or marks[1] in environment:
            found[int(entry.name)] = command.split(b"\0")[0].decode(errors="replace")
    return found


def _mounts(directory: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4] for line in lines]
    return [f"{point} is still mounted" for point in points if point.startswith(f"{directory}/")]


def _loops(directory: Path) -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            path = backing.read_text().strip()
        except OSError:
            continue  # detached while we looked
        if path.startswith(f"{directory}/"):
            found.append(f"loop device {backing.parts[3]} still holds {path}")
    return found


def _files(directory: Path) -> list[str]:
    return [f"{directory} still exists"] if directory.exists() else []
