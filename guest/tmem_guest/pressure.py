"""What the guest's kernel says about its memory: PSI, meminfo, vmstat, swaps."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Memory(NamedTuple):
    """The guest's memory at one moment. PSI is in hundredths of a percent, 0 where the kernel has none."""

    psi_some_avg10: int
    psi_full_avg10: int
    mem_total_bytes: int
    mem_available_bytes: int
    swap_total_bytes: int
    swap_free_bytes: int
    swap_in_pages: int
    swap_out_pages: int


class SwapArea(NamedTuple):
    """One line of `/proc/swaps`."""

    path: str
    size_bytes: int
    used_bytes: int
    priority: int


def _fields(path: Path, wanted: tuple[str, ...]) -> dict[str, int]:
    found = dict.fromkeys(wanted, 0)
    with path.open(encoding="ascii") as lines:
        for line in lines:
            name, value, *_unit = line.split()
            name = name.rstrip(":")
            if name in found:
                found[name] = int(value)
    return found


def _psi(path: Path) -> tuple[int, int]:
    some = full = 0
    try:
        text = path.read_text(encoding="ascii")
    except OSError:  # a kernel without PSI, or with psi=0: the file is absent or cannot be read
        return 0, 0
    for line in text.splitlines():
        kind, avg10, *_rest = line.split()
        hundredths = round(float(avg10.removeprefix("avg10=")) * 100)
        if kind == "some":
            some = hundredths
        elif kind == "full":
            full = hundredths
    return some, full


def read_memory(proc: Path = PROC) -> Memory:
    """Read the figures a report carries. Raises OSError if `/proc` cannot be read."""
    some, full = _psi(proc / "pressure/memory")
    info = _fields(proc / "meminfo", ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree"))
    events = _fields(proc / "vmstat", ("pswpin", "pswpout"))
    return Memory(
        some,
        full,
        info["MemTotal"] << 10,
        info["MemAvailable"] << 10,
        info["SwapTotal"] << 10,
        info["SwapFree"] << 10,
        events["pswpin"],
        events["pswpout"],
    )


def read_swaps(proc: Path = PROC) -> list[SwapArea]:
    """The swap areas that are on. Raises OSError if `/proc` cannot be read."""
    areas = []
    for line in (proc / "swaps").read_text(encoding="utf-8").splitlines()[1:]:
        path, _kind, size_kib, used_kib, priority = line.rsplit(maxsplit=4)
        # The kernel writes blanks in paths as octal escapes and marks removed files.
        name = path.removesuffix("\\040(deleted)").replace("\\040", " ")
        areas.append(SwapArea(name, int(size_kib) << 10, int(used_kib) << 10, int(priority)))
    return areas
