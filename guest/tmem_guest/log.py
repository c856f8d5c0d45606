"""One line to stderr for each event, never waiting for its reader.

The reader is usually journald, which may itself wait for a page from a swap shim that this process must first
restart. A line that cannot be written at once is therefore dropped. (The `logging` module would wait, and its
import alone takes a tenth of a second under emulation.)
"""

from __future__ import annotations

import os
import select

_ERROR, _WARNING, _INFO, _DEBUG = 3, 4, 6, 7
_NAMES = {_ERROR: "error", _WARNING: "warning", _INFO: "info", _DEBUG: "debug"}
_STDERR = 2


def _write(priority: int, message: str) -> None:
    text = message.replace("\n", " ")
    # systemd reads a syslog priority in angle brackets at the start of a line.
    line = (
        f"<{priority}>{text}\n"
        if "JOURNAL_STREAM" in os.environ
        else f"tmem-agent: {_NAMES[priority]}: {text}\n"
    )
    poll = select.poll()
    poll.register(_STDERR, select.POLLOUT)
    try:
        if poll.poll(0):
            os.write(_STDERR, line.encode(errors="replace")[:4096])
    except OSError:
        pass  # nobody to tell


def error(message: str) -> None:
    """Something an operator must look at."""
    _write(_ERROR, message)


def warning(message: str) -> None:
    """Something that is being dealt with, but should not happen often."""
    _write(_WARNING, message)


def info(message: str) -> None:
    """Something an operator may want to know afterwards."""
    _write(_INFO, message)


def relay(source: str, line: str) -> None:
    """Pass on a line that the child `source` (`tmem-guest`) wrote, with the level it gave it."""
    text = line.removeprefix("tmem-guest: ")
    for priority, name in ((_ERROR, "error: "), (_WARNING, "warn: "), (_INFO, "info: "), (_DEBUG, "debug: ")):
        if text.startswith(name):
            _write(priority, f"{source}: {text.removeprefix(name)}")
            return
    _write(_INFO, f"{source}: {text}")
