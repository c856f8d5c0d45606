"""What the daemon serves, for the one that comes after it; a reboot clears it with the runtime directory."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tmem_guest.config import MountConfig, SwapConfig


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One service and its process (0: none at that moment)."""

    pid: int
    began: int
    mount: MountConfig | None = None
    swap: SwapConfig | None = None


def save(path: Path, served: list[Served]) -> None:
    """Replace the file at `path` as a whole. Raises OSError."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(served))
    fresh.replace(path)


def load(path: Path) -> list[Served]:
    """What was saved; nothing if there is no file, or one of another version."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Served])
    except (FileNotFoundError, msgspec.MsgspecError):
        return []
