"""What an image is made of: `images/NAME/image.toml` and the files beside it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from tmem_host.errors import ExitCode, OperatorError
from tmem_host.units import parse_size

_FILE = "image.toml"

Payload = Literal["agent", "binary"]
"""`agent`: all of tmem's guest part; `binary`: `tmem-guest` and the libraries it needs."""


class Definition(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image as its file describes it."""

    description: str
    same_as: str | None = None
    """Shares everything but the payload with this image."""
    suite: str = ""
    """Debian release."""
    variant: Literal["minbase", "extract"] = "minbase"
    """mmdebstrap's: `extract` unpacks packages without running their scripts."""
    packages: list[str] = []
    mask: list[str] = []
    """systemd units that never start."""
    mask_generators: list[str] = []
    """systemd generators that never run."""
    boot_modules: list[str] = []
    """Kernel modules that the first process loads."""
    more_modules: list[str] = []
    """Kernel modules that come along in the initramfs."""
    programs: list[str] = []
    """Programs that come along in the initramfs, with their libraries."""
    kernel_source: str | None = None
    """Debian package of the kernel sources that the data disk holds."""
    root_size: str | None = None
    """Size of the root disk; without, the file system is in memory."""
    data_size: str = "2G"
    """Size of the data disk, for tmem's lower file system and swap file."""
    payload: Payload | None = None


def definitions_directory() -> Path:
    """Where the image definitions are: in a checkout its `images/`, otherwise where tmem was installed."""
    for parent in (Path(__file__).parents[3] / "images", Path(sys.prefix) / "share/tmem/images"):
        if parent.is_dir():
            return parent
    raise OperatorError("the image definitions are missing", hint="reinstall tmem", code=ExitCode.NOT_FOUND)


def names() -> list[str]:
    """The images that can be built, by name."""
    return sorted(path.parent.name for path in definitions_directory().glob(f"*/{_FILE}"))


def load(name: str) -> Definition:
    """Read and check a definition. NOT_FOUND for an unknown image, USAGE for a file that is wrong."""
    if name not in names():
        raise OperatorError(
            f"there is no image {name!r}", hint=f"one of {', '.join(names())}", code=ExitCode.NOT_FOUND
        )
    path = definitions_directory() / name / _FILE
    try:
        definition = msgspec.toml.decode(path.read_bytes(), type=Definition)
        for size in (definition.root_size, definition.data_size):
            parse_size(size or "0")
    except (msgspec.DecodeError, ValueError) as error:
        raise OperatorError(f"{path}: {error}", code=ExitCode.USAGE) from error
    return definition


def digest(name: str) -> str:
    """Hash of all that determines a built image, its payload aside: 16 hexadecimal digits.

    The date of the mirror is not part of it: an image is rebuilt when its definition or builder changes, or
    when it is forced.
    """
    base = load(name).same_as or name
    top = definitions_directory()
    sources = [path for part in (base, "boot") for path in sorted((top / part).rglob("*")) if path.is_file()]
    builder = [Path(__file__).with_name(module) for module in ("rootfs.py", "initramfs.py")]
    hasher = hashlib.sha256()
    for path in sources + builder:
        hasher.update(f"{path.name}\0{path.stat().st_mode & 0o111}\0".encode())
        hasher.update(hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()[:16]
