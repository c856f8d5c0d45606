"""Byte sizes as operators write them. (The host has its own: neither side imports the other.)"""

from __future__ import annotations

import re

_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as `512M`, `1.5G` or `4096`; units are powers of 1024.

    Raises ValueError, with a message fit for an operator, for anything else, negative sizes included.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for instance 512M or 1.5G")
    return int(float(match[1]) * _FACTORS[match[2].upper()])


def format_size(size_bytes: int) -> str:
    """A size for people: `0 B`, `512 MiB`, `1.5 GiB`."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.1f}".removesuffix(".0") + f" {unit}"
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + " TiB"
