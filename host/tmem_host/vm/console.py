"""What a guest wrote to its serial console, which libvirt keeps in the VM's directory."""

from __future__ import annotations

import re
from pathlib import Path

_FILE = "console.log"
_PANIC = "Kernel panic - not syncing"
_TAIL_BYTES = 64 << 10
_CONTROL = re.compile(
    r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07\x1b]*(\x07|\x1b\\)|[!()][0-9A-Za-z]|c)|[\x00-\x08\x0b-\x1f]"
)


def path(directory: Path) -> Path:
    """The console's file of the VM whose files are in this directory."""
    return directory / _FILE


def last_lines(directory: Path, count: int = 15) -> list[str]:
    """The last lines, without terminal control sequences; none if nothing was written yet."""
    try:
        with path(directory).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = (_CONTROL.sub("", line).rstrip() for line in text.replace("\r", "").split("\n"))
    return [line for line in lines if line][-count:]


def panicked(directory: Path) -> bool:
    """Whether the guest's kernel has panicked."""
    return any(_PANIC in line for line in last_lines(directory, 200))
