"""Keeping the agent's own memory out of swap."""

from __future__ import annotations

import ctypes
import os

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4


def lock() -> None:
    """Keep every page this process has or will touch in memory (mlockall(2)). Raises OSError.

    vsock's receiving worker waits for whoever holds a socket, also while that one waits, in the middle of a
    call, for a page of its own that was swapped out: to tmem, behind the same worker. The guest would hang.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def unlock() -> None:
    """Undo `lock`."""
    ctypes.CDLL(None).munlockall()
