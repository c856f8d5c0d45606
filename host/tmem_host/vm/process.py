"""Processes that outlive the command that started them, recorded by pid and start time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from msgspec import Struct

_END_TIMEOUT_S = 10.0
_POLL_S = 0.02


class Recorded(Struct, frozen=True, forbid_unknown_fields=True):
    """A process by pid and start time, so that a pid used again is never mistaken for it."""

    pid: int
    started: float


def start(command: Sequence[str], log: Path, *, path: str | None = None) -> Recorded:
    """Start a process in its own session, its output appended to `log`; `path` is its PATH.

    FileNotFoundError if the program is missing.
    """
    environment = None if path is None else {**os.environ, "PATH": path}
    with log.open("ab") as output:
        # Its parent is gone long before it, so nobody waits for the Popen object.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    return Recorded(process.pid, psutil.Process(process.pid).create_time())


def find(recorded: Recorded) -> psutil.Process | None:
    """The process if it still runs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(recorded.pid)
        if process.create_time() == recorded.started and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def end(recorded: Recorded, timeout_s: float = _END_TIMEOUT_S) -> None:
    """Ask a process to end and wait for it; kill it if it does not. Nothing happens if it is gone."""
    process = find(recorded)
    if process is None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
        if not _gone(recorded, timeout_s):
            process.kill()
            _gone(recorded, timeout_s)


def _gone(recorded: Recorded, timeout_s: float) -> bool:
    """Whether the process ends in time. A zombie has ended: whoever started it may live on and never look."""
    until_s = time.monotonic() + timeout_s
    while find(recorded) is not None:
        if time.monotonic() > until_s:
            return False
        time.sleep(_POLL_S)
    return True
