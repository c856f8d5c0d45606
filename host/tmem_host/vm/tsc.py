"""How fast this host's time stamp counter runs, which is what an emulated guest reads as its own.

A guest measures it at boot against emulated timers. On a busy host the emulator is scheduled away meanwhile,
the result is wrong by up to ten times, and so is every clock and timeout of that guest. It is told instead.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import time
from collections.abc import Callable

# rdtsc; shl rdx, 32; or rax, rdx; ret
_READ_COUNTER = bytes.fromhex("0f3148c1e2204809d0c3")
_MEASURE_S = 0.05
_TRIES = 20


@functools.cache
def frequency_khz() -> int | None:
    """Counts per millisecond; None if this process may not execute the instruction."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    page.write(_READ_COUNTER)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    first_ns, first = _sample(read)
    time.sleep(_MEASURE_S)  # the length of the measurement
    last_ns, last = _sample(read)
    return round((last - first) * 1_000_000 / (last_ns - first_ns))


def _sample(read: Callable[[], int]) -> tuple[int, int]:
    """Time and counter of one moment: of several tries, the one that took least."""
    best: tuple[int, int, int] | None = None
    for _ in range(_TRIES):
        before_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        count = read()
        after_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        if best is None or after_ns - before_ns < best[0]:
            best = (after_ns - before_ns, (before_ns + after_ns) // 2, count)
    assert best is not None  # noqa: S101  # there was at least one try
    return best[1], best[2]
