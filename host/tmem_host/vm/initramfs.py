"""Initramfs archives in the kernel's own format (newc cpio), and the kernel modules that go into them.

The kernel unpacks several archives one after the other into the same tree. That is used for layers: the boot
stage is built with the image, tmem's own programs come as a second archive that is rebuilt in a moment when
they change.
"""

from __future__ import annotations

import lzma
import stat
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tmem_host.errors import OperatorError

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True)
class _Entry:
    mode: int
    """With the type's bits."""
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


@dataclass
class Archive:
    """A tree in memory, written as one cpio archive. Paths are absolute in the guest; parents are made."""

    _entries: dict[str, _Entry] = field(default_factory=dict)

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory and its parents; nothing happens if it is there."""
        name = _name(path)
        if name and name not in self._entries:
            self.directory(str(PurePosixPath("/", name).parent))
            self._entries[name] = _Entry(stat.S_IFDIR | mode)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file owned by root; replaces one of the same path."""
        self._add(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node."""
        self._add(path, stat.S_IFCHR | mode, b"", (major, minor))

    def tree(self, source: Path, path: str = "/") -> None:
        """Add all files, links and directories below a directory of this machine, as root's."""
        for entry in sorted(source.rglob("*")):
            target = str(PurePosixPath(path) / entry.relative_to(source).as_posix())
            if entry.is_symlink():
                self.symlink(target, str(entry.readlink()))
            elif entry.is_dir():
                self.directory(target)
            else:
                self.file(target, entry.read_bytes(), stat.S_IMODE(entry.stat().st_mode))

    def write(self, out: BinaryIO) -> None:
        """Write the archive, padded so that another one may follow. OSError if the disk is full."""
        for inode, (name, entry) in enumerate(self._entries.items(), start=1):
            _write_entry(out, inode, name, entry)
        _write_entry(out, 0, _TRAILER, _Entry(0))
        out.write(b"\0" * (-out.tell() % 512))

    def _add(self, path: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        name = _name(path)
        self.directory(str(PurePosixPath("/", name).parent))
        self._entries[name] = _Entry(mode, data, device)


def _name(path: str) -> str:
    return str(PurePosixPath("/", path)).lstrip("/")


def _write_entry(out: BinaryIO, inode: int, name: str, entry: _Entry) -> None:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(encoded), 0)
    header = _MAGIC + b"".join(b"%08X" % value for value in fields)
    out.write(header + encoded + b"\0" * (-(len(header) + len(encoded)) % 4))
    out.write(entry.data + b"\0" * (-len(entry.data) % 4))


def kernel_version(root: Path) -> str:
    """The version of the one kernel installed below a root directory."""
    versions = sorted(path.name for path in (root / "usr/lib/modules").iterdir())
    if len(versions) != 1:
        raise OperatorError(
            f"expected one kernel in the image's root file system, found {versions or 'none'}"
        )
    return versions[0]


def add_modules(archive: Archive, root: Path, boot: Iterable[str], more: Iterable[str] = ()) -> None:
    """Add kernel modules, uncompressed, with what they depend on and with what `modprobe` needs to find them.

    `/modules.order` lists the paths of the `boot` modules in the order in which `insmod` must load them.
    Names that are built into the kernel are skipped; a name that is neither raises OperatorError.
    """
    version = kernel_version(root)
    base = root / "usr/lib/modules" / version
    target = f"/lib/modules/{version}"
    paths, dependencies = _read_dependencies(base)
    built_in = {_module_name(line) for line in (base / "modules.builtin").read_text().splitlines()}

    def closure(names: Iterable[str]) -> list[str]:
        order: list[str] = []
        for name in names:
            key = name.replace("-", "_")
            if key in built_in:
                continue
            if key not in paths:
                raise OperatorError(f"the image's kernel {version} has no module {name!r}")
            order += [path for path in _load_order(paths[key], dependencies) if path not in order]
        return order

    boot_order = closure(boot)
    everything = list(dict.fromkeys(boot_order + closure(more)))
    for path in everything:
        archive.file(f"{target}/{_plain(path)}", _decompress(base / path))
    archive.file("/modules.order", "".join(f"{target}/{_plain(path)}\n" for path in boot_order).encode())
    lines = [f"{_plain(path)}: {' '.join(map(_plain, dependencies[path]))}\n" for path in everything]
    archive.file(f"{target}/modules.dep", "".join(lines).encode())


def _read_dependencies(base: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    paths: dict[str, str] = {}
    dependencies: dict[str, list[str]] = {}
    for line in (base / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        paths[_module_name(path)] = path
        dependencies[path] = needs.split()
    return paths, dependencies


def _load_order(path: str, dependencies: dict[str, list[str]]) -> Iterator[str]:
    # modules.dep lists the whole closure, the deepest last.
    yield from reversed(dependencies[path])
    yield path


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].split(".ko")[0].replace("-", "_")


def _plain(path: str) -> str:
    return path.rpartition("/")[2].split(".ko")[0] + ".ko"


def _decompress(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq"], input=data, stdout=subprocess.PIPE, check=True).stdout
    return data
