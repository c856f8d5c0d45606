"""A real `tmem-guest fs` over a real directory, and lower file systems to put under it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from framework.process import Program
from tmem_host.vm import payload

ROOT = Path(__file__).resolve().parents[2]
PAGE_BYTES = 4096
SETTLE_S = 0.06
"""After this, pages of a changed file may be cached."""


def program() -> Path:
    """The `tmem-guest` under test: the one that VMs get, too."""
    return payload.binary()


class FileCache(Program):
    """A mounted file cache; a context manager that leaves nothing behind."""

    def __init__(
        self,
        directory: Path,
        lower: Path,
        *options: str,
        endpoint: str | None = None,
        mount: Path | None = None,
    ) -> None:
        super().__init__(directory, "fs")
        self.lower = lower
        self.mount = mount or directory / "mount"
        self.mount.mkdir(exist_ok=True, parents=True)
        self._status = directory / "status.sock"
        tmem = ["--endpoint", endpoint] if endpoint else ["--no-tmem"]
        self._options = [*tmem, *options]

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        while subprocess.run(["umount", "-l", self.mount], capture_output=True, check=False).returncode == 0:
            pass

    def command(self) -> list[str]:
        """What to run."""
        return [
            *(str(program()), "fs", "--lower", str(self.lower), "--mount", str(self.mount)),
            *("--status-socket", str(self._status), *self._options),
        ]

    def status(self) -> dict[str, int]:
        """Its counters."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.settimeout(5)
            stream.connect(str(self._status))
            line = b""
            while part := stream.recv(4096):
                line += part
        told: dict[str, int] = json.loads(line)
        return told

    def wait_for(self, name: str, least: int, timeout_s: float = 10.0) -> int:
        """Wait until a counter (or `connected`) is at least this."""
        deadline = time.monotonic() + timeout_s
        while (value := self.status()[name]) < least:
            assert time.monotonic() < deadline, f"{name} is {value} after {timeout_s} s, expected {least}"
            time.sleep(0.02)
        return value

    def forget(self, *names: str) -> None:
        """Make the guest kernel drop the clean pages it has of files."""
        for name in names:
            forget(self.mount / name)


def forget(path: Path) -> None:
    """Make the kernel drop the clean pages it has of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def open_at_random(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file so that the kernel reads nothing ahead."""
    fd = os.open(path, flags)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def lower_directory(kind: str, directory: Path) -> Iterator[Path]:
    """An empty directory on a fresh file system: ext4, xfs or overlay on a loop device, or tmpfs."""
    base = directory / "base"
    base.mkdir()
    image = directory / "image"
    mounted = []
    try:
        if kind == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", base)
            mounted.append(base)
        else:
            with image.open("wb") as file:
                file.truncate(400 << 20)
            run(*(["mkfs.xfs", "-q"] if kind == "xfs" else ["mkfs.ext4", "-q", "-F", "-b", "4096"]), image)
            run("mount", "-o", "loop", image, base)
            mounted.append(base)
        lower = base / "lower"
        lower.mkdir()
        if kind == "overlay":
            for name in ("bottom", "upper", "work", "merged"):
                (base / name).mkdir()
            merged = base / "merged"
            layers = f"lowerdir={base}/bottom,upperdir={base}/upper,workdir={base}/work"
            run("mount", "-t", "overlay", "overlay", "-o", layers, merged)
            mounted.append(merged)
            lower = merged
        lower.chmod(0o755)
        yield lower
    finally:
        for path in reversed(mounted):
            # A test that failed may have left something open.
            if subprocess.run(["umount", path], capture_output=True, check=False).returncode != 0:
                run("umount", "-l", path)
        image.unlink(missing_ok=True)


@contextmanager
def fresh_lower_directory(kind: str) -> Iterator[Path]:
    """The same, with everything that belongs to it in a place of its own."""
    with tempfile.TemporaryDirectory(prefix="tmem-fs-") as name, lower_directory(kind, Path(name)) as lower:
        yield lower


def has(program_name: str) -> bool:
    return shutil.which(program_name) is not None
