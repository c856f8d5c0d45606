"""The file systems that are compared: ours with a tmemd behind it, bindfs, and libfuse's passthrough_hp."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("host", "guest", "native/py", "tests")]

from framework.daemon import Tmemd  # noqa: E402
from integration.fs_mount import FileCache  # noqa: E402

FUSE_SOURCE = ROOT / "build" / "fuse3"
_DEB_SRC = "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian"


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def passthrough_hp() -> Path:
    """Libfuse's example, built from the source of the distribution's own libfuse; kept in build/fuse3."""
    program = FUSE_SOURCE / "passthrough_hp"
    if program.exists():
        return program
    (FUSE_SOURCE / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    sources = FUSE_SOURCE / "sources.list"
    sources.write_text(f"{_DEB_SRC} {release['VERSION_CODENAME']} main\n")
    # Its own package lists, so that the system's stay as they are.
    options = [
        *("-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=-"),
        *("-o", f"Dir::State::lists={FUSE_SOURCE}/lists"),
        *("-o", "Dir::Cache::srcpkgcache=", "-o", "Dir::Cache::pkgcache="),
    ]
    _run("apt-get", *options, "-q", "update", cwd=FUSE_SOURCE)
    _run("apt-get", *options, "-q", "source", "--download-only", "fuse3", cwd=FUSE_SOURCE)
    tarball = next(FUSE_SOURCE.glob("fuse3_*.orig.tar.?z"))
    _run("tar", "xf", tarball, cwd=FUSE_SOURCE)
    example = next(FUSE_SOURCE.glob("fuse-*/example"))
    # What libfuse's own build finds out about the system, as far as the example asks.
    features = (
        "SETXATTR",
        "UTIMENSAT",
        "POSIX_FALLOCATE",
        "FALLOCATE",
        "FSTATAT",
        "PIPE2",
        "SPLICE",
        "VMSPLICE",
    )
    (example / "config.h").write_text("".join(f"#define HAVE_{name} 1\n" for name in features))
    _run(
        *("g++", "-std=c++17", "-O2", "-DFUSE_USE_VERSION=35", "-D_FILE_OFFSET_BITS=64"),
        *("-include", example / "config.h", example / "passthrough_hp.cc", "-o", program),
        *_run("pkg-config", "--cflags", "--libs", "fuse3").split(),
        "-lpthread",
    )
    return program


@contextmanager
def mounted(command: list[str | Path], mount: Path) -> Iterator[Path]:
    """A FUSE program in the foreground, until its mount is there."""
    mount.mkdir()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not mount.is_mount():
            assert process.poll() is None, f"{command[0]} ended"
            assert time.monotonic() < deadline, f"{command[0]} did not mount within 10 s"
            time.sleep(0.02)
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=False, capture_output=True)
        process.terminate()
        process.wait(10)


class Contenders:
    """All of them over one lower directory; a context manager."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.lower = directory / "lower"
        self._options = options
        self._stack = ExitStack()

    def __enter__(self) -> Contenders:
        self.lower.mkdir()
        shm = Path(self._stack.enter_context(_short_directory()))
        self.tmemd = self._stack.enter_context(Tmemd(shm, capacity="2G"))
        self.tmemd.add_vm("bench", quota_bytes=2 << 30)
        endpoint = f"unix:{self.tmemd.vm_socket('bench')}"
        (self.directory / "ours").mkdir()
        self.ours = FileCache(self.directory / "ours", self.lower, *self._options, endpoint=endpoint)
        self._stack.enter_context(self.ours)
        self.ours.wait_for("connected", 1)
        # Like passthrough_hp, it assumes that nobody else changes the directory.
        (self.directory / "alone").mkdir()
        alone = FileCache(
            self.directory / "alone", self.lower, *self._options, "--changes=none", endpoint=endpoint
        )
        self._stack.enter_context(alone)
        alone.wait_for("connected", 1)
        points = {name: self.directory / name for name in ("bindfs", "passthrough_hp")}
        bindfs: list[str | Path] = ["bindfs", "-f", "-o", "allow_other", self.lower, points["bindfs"]]
        hp: list[str | Path] = [passthrough_hp(), "--foreground", self.lower, points["passthrough_hp"]]
        self.roots = {
            "lower": self.lower,
            "bindfs": self._stack.enter_context(mounted(bindfs, points["bindfs"])),
            "passthrough_hp": self._stack.enter_context(mounted(hp, points["passthrough_hp"])),
            "ours": self.ours.mount,
            "alone": alone.mount,
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def forget_tmem(self) -> None:
        """Make tmem empty. The guest is not told, and asks for what it put."""
        with self.tmemd.admin() as admin:
            admin.flush("bench")

    def renew(self, name: str) -> None:
        """Make a lower file one that was never read since it was written."""
        os.utime(self.lower / name)

    def fill_tmem(self, path: Path, pages: int) -> None:
        """Read a file of the mount until tmem holds all of it."""
        for _ in range(20):
            drop_caches()
            before = self.ours.status()
            with path.open("rb") as file:
                while file.read(1 << 20):
                    time.sleep(0.004)
            time.sleep(0.2)
            after = self.ours.status()
            if after["hit_pages"] - before["hit_pages"] >= pages:
                return
        raise AssertionError(f"tmem did not take all of {path}: {after}")

    def resident_mib(self) -> float:
        """The most memory our program ever had resident, in MiB."""
        status = Path(f"/proc/{self.ours.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024


@contextmanager
def _short_directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tm-", dir="/dev/shm") as name:
        yield name


def drop_caches() -> None:
    """Write everything back and make the kernel forget clean pages, names and inodes."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
