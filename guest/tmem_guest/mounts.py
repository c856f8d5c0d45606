"""The mount table (`/proc/self/mountinfo`, proc(5)) and unmounting."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import NamedTuple

_MNT_DETACH = 2


class Mount(NamedTuple):
    """One line of the table."""

    path: str
    filesystem: str
    source: str

    @property
    def is_tmem(self) -> bool:
        """Whether `tmem-guest fs` serves it."""
        return self.filesystem.startswith("fuse") and "tmem" in self.filesystem + self.source


def _unescape(field: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, char)
    return field


def parse(text: str) -> list[Mount]:
    """The mounts in `text`, in the table's order: of several at one path, the last is the one seen."""
    found = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        filesystem, source = after.split(" ", 2)[:2]
        found.append(Mount(_unescape(before.split(" ", 5)[4]), filesystem, _unescape(source)))
    return found


def table() -> list[Mount]:
    """The mounts of this process. Raises OSError."""
    return parse(Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape"))


def at(path: str) -> Mount | None:
    """What is mounted exactly at `path`, if anything."""
    here = [mount for mount in table() if mount.path == path]
    return here[-1] if here else None


def containing(path: str, mounts: list[Mount]) -> Mount | None:
    """The mount that an existing, resolved `path` lies in."""
    best: Mount | None = None
    for mount in mounts:
        inside = path == mount.path or path.startswith(mount.path.rstrip("/") + "/")
        if inside and (best is None or len(mount.path) >= len(best.path)):
            best = mount
    return best


def detach(path: str) -> bool:
    """Take what is mounted at `path` out of the tree at once; users of open files keep them (MNT_DETACH).

    Returns whether something was. Raises OSError.
    """
    return _unmount(path, _MNT_DETACH)


def unmount(path: str) -> bool:
    """Unmount `path`. Returns whether something was mounted. Raises OSError, EBUSY if it is in use."""
    return _unmount(path, 0)


def _unmount(path: str, flags: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EINVAL:
        return False
    raise OSError(code, os.strerror(code), path)
