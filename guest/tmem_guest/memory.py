"""Memory that is never swapped out."""

from __future__ import annotations

import ctypes
import mmap
import os

_libc = ctypes.CDLL(None, use_errno=True)


class LockedBuffer:
    """A few bytes that stay in memory (mlock(2)), for what is sent to and received from the host.

    vsock's receiving worker waits for whoever holds a socket, also while that one waits, in the middle of
    `recv()` or `send()`, for a page of its own that was swapped out. If that page is at the host it has to
    come through the same worker, and nothing on vsock moves any more. With a buffer that is always there, the
    agent can do without the rest of its memory where the guest has better use for it.
    """

    def __init__(self, size: int) -> None:
        """`size` in bytes. A failure to lock is in `error`; the buffer can be used all the same."""
        self._memory = mmap.mmap(-1, size)
        self.bytes = memoryview(self._memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        code = ctypes.get_errno() if _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) else 0
        self.error = os.strerror(code) if code else ""
