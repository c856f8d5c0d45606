"""However a benchmark is ended, what it started ends with it: VMs, mounts, processes.

Whoever ends a run (a deadline, a closed terminal) has everything unwound as after Ctrl-C, and only once: what
comes later does not disturb it. A shell's background jobs ignore SIGINT; what a benchmark starts would, too.
"""

from __future__ import annotations

import signal
from types import FrameType

_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def unwind_on_signals() -> None:
    """Have the signals that end programs raise KeyboardInterrupt, the first of them. For main programs."""
    for number in _ENDS:
        signal.signal(number, _interrupt)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    for each in _ENDS:
        signal.signal(each, _heed_no_more)
    raise KeyboardInterrupt(signal.Signals(number).name)


def _heed_no_more(_number: int, _frame: FrameType | None) -> None:
    """Unwinding has begun. Not SIG_IGN, which programs that it starts would inherit."""
