"""Random operations on the mount and on a plain directory tell the same, with tmem evicting and being killed.

The page cache of the mount is dropped at random, so that pages come from every place they can be: the guest's
page cache, tmem, the lower file system. A failure names its seed: `TMEM_FS_SEED=n` repeats it.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from pathlib import Path

import pytest
from framework.daemon import Tmemd
from integration.fs_mount import FileCache, forget, fresh_lower_directory, open_at_random
from tmem_host.api.types import VmChange

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

NAMES = [f"f{n}" for n in range(12)]
DIRECTORIES = ["", "d1", "d2", "d1/d3"]
LARGEST = 600_000
REPORT_S = 0.03
"""After this, a change behind the mount was reported."""


class Pair:
    """The mount, the plain directory that models it, and what both have open."""

    def __init__(self, mount: Path, model: Path, lower: Path, seed: int) -> None:
        self.roots = (mount, model)
        self.lower = lower
        self.chance = random.Random(seed)
        self.open: list[tuple[int, int]] = []
        self.log: list[str] = []

    def name(self) -> str:
        directory = self.chance.choice(DIRECTORIES)
        return f"{directory}/{self.chance.choice(NAMES)}" if directory else self.chance.choice(NAMES)

    def both(self, what: str, action: Callable[[Path], object]) -> object:
        """Do it on both; they must tell the same."""
        told = []
        for root in self.roots:
            try:
                told.append(action(root))
            except OSError as error:
                told.append(errno.errorcode[error.errno or 0])
        self.log.append(what)
        assert told[0] == told[1], f"{what}: the mount tells {short(told[0])}, the model {short(told[1])}"
        return told[0]

    def both_open(self, what: str, action: Callable[[int], object]) -> None:
        if not self.open:
            return
        pair = self.chance.choice(self.open)
        told = []
        for fd in pair:
            try:
                told.append(action(fd))
            except OSError as error:
                told.append(errno.errorcode[error.errno or 0])
        self.log.append(what)
        assert told[0] == told[1], f"{what}: the mount tells {short(told[0])}, the model {short(told[1])}"

    # Operations, each chosen as often as it is listed.

    def write(self) -> None:
        name, at = self.name(), self.chance.randrange(LARGEST)
        data = self.chance.randbytes(self.chance.choice([1, 100, 4096, 8192, 70_000]))
        create = self.chance.random() < 0.5

        def action(root: Path) -> object:
            fd = os.open(root / name, os.O_WRONLY | (os.O_CREAT if create else 0))
            try:
                return os.pwrite(fd, data, at)
            finally:
                os.close(fd)

        self.both(f"write {name} {at}+{len(data)}", action)

    def behind(self) -> None:
        """Change the lower directory itself. An open sees that at once, all else when it is reported."""
        name, at = self.name(), self.chance.randrange(LARGEST)
        data = self.chance.randbytes(self.chance.choice([1, 5000]))
        told = []
        for root in (self.lower, self.roots[1]):
            try:
                fd = os.open(root / name, os.O_WRONLY)
            except OSError as error:
                told.append(error.errno)
                continue
            told.append(os.pwrite(fd, data, at))
            os.close(fd)
        self.log.append(f"behind {name} {at}+{len(data)}")
        assert told[0] == told[1]
        if self.chance.random() < 0.5:
            self.both(f"read all of {name}", lambda root: (root / name).read_bytes())
        time.sleep(REPORT_S)

    def read(self) -> None:
        name, at = self.name(), self.chance.randrange(LARGEST)

        def action(root: Path) -> object:
            fd = os.open(root / name, os.O_RDONLY)
            try:
                return os.pread(fd, 30_000, at)
            finally:
                os.close(fd)

        self.both(f"read {name} {at}", action)

    def read_singly(self) -> None:
        """Single pages at random, as they are read around."""
        name = self.name()
        places = [self.chance.randrange(LARGEST) & ~4095 for _ in range(20)]

        def action(root: Path) -> object:
            fd = open_at_random(root / name)
            try:
                return [blake2b(os.pread(fd, 4096, at)).digest() for at in places]
            finally:
                os.close(fd)

        self.both(f"read single pages of {name}", action)

    def read_all(self) -> None:
        name = self.name()
        self.both(f"read all of {name}", lambda root: (root / name).read_bytes())

    def map_read(self) -> None:
        name = self.name()

        def action(root: Path) -> object:
            with (root / name).open("rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    return b""
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                    return mapped[::777]

        self.both(f"map {name}", action)

    def map_write(self) -> None:
        name, where, data = self.name(), self.chance.random(), self.chance.randbytes(50)

        def action(root: Path) -> object:
            with (root / name).open("r+b") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 100:
                    return size
                with mmap.mmap(file.fileno(), 0) as mapped:
                    at = int(where * (size - 50))
                    mapped[at : at + 50] = data
                return size

        self.both(f"write through a map of {name}", action)

    def drop(self) -> None:
        for _ in range(3):
            path = self.roots[0] / self.name()
            if path.is_file():
                forget(path)

    def truncate(self) -> None:
        name, size = self.name(), self.chance.choice([0, 5, 4096, self.chance.randrange(LARGEST)])
        self.both(f"truncate {name} {size}", lambda root: os.truncate(root / name, size))

    def rename(self) -> None:
        old, new = self.name(), self.name()
        self.both(f"rename {old} {new}", lambda root: (root / old).rename(root / new) and None)

    def link(self) -> None:
        old, new = self.name(), self.name()
        self.both(f"link {old} {new}", lambda root: (root / new).hardlink_to(root / old))

    def unlink(self) -> None:
        name = self.name()
        self.both(f"unlink {name}", lambda root: (root / name).unlink())

    def replace(self) -> None:
        name, data = self.name(), self.chance.randbytes(self.chance.randrange(LARGEST))
        self.both(f"replace {name} with {len(data)}", lambda root: (root / name).write_bytes(data))

    def stat(self) -> None:
        name = self.name()

        def action(root: Path) -> object:
            got = (root / name).lstat()
            return got.st_size, got.st_mode, got.st_nlink

        self.both(f"stat {name}", action)

    def mode(self) -> None:
        name, mode = self.name(), self.chance.choice([0o644, 0o600, 0o755])
        self.both(f"chmod {name}", lambda root: (root / name).chmod(mode))

    def copy(self) -> None:
        old, new, at = self.name(), self.name(), self.chance.randrange(50_000)
        if old == new:
            return

        def action(root: Path) -> object:
            with (root / old).open("rb") as source, (root / new).open("r+b") as target:
                # The same file under two names may overlap.
                if os.path.samestat(os.fstat(source.fileno()), os.fstat(target.fileno())):
                    return None
                return os.copy_file_range(source.fileno(), target.fileno(), 20_000, at, 4096)

        self.both(f"copy {old} to {new}", action)

    def open_one(self) -> None:
        name = self.name()
        fds = []
        for root in self.roots:
            try:
                fds.append(os.open(root / name, os.O_RDWR))
            except OSError as error:
                fds.append(-(error.errno or 0))
        if min(fds) < 0:
            assert fds[0] == fds[1], f"open {name}: {fds}"
            return
        self.open.append((fds[0], fds[1]))
        if len(self.open) > 6:
            for fd in self.open.pop(0):
                os.close(fd)

    def read_open(self) -> None:
        at = self.chance.randrange(LARGEST)
        self.both_open(f"read an open file {at}", lambda fd: os.pread(fd, 9000, at))

    def write_open(self) -> None:
        at, data = self.chance.randrange(LARGEST), self.chance.randbytes(3000)
        self.both_open(f"write an open file {at}", lambda fd: os.pwrite(fd, data, at))

    def settle(self) -> None:
        time.sleep(0.03)

    def compare(self) -> None:
        """The whole trees."""

        def facts(root: Path) -> dict[str, object]:
            # Sums, because this process may be short of memory.
            return {
                str(path.relative_to(root)): blake2b(path.read_bytes()).digest() if path.is_file() else None
                for path in sorted(root.rglob("*"))
            }

        self.both("compare all", facts)

    def close(self) -> None:
        for pair in self.open:
            for fd in pair:
                os.close(fd)


def short(told: object) -> str:
    text = repr(told)
    return text if len(text) < 200 else f"{text[:200]}... ({len(text)})"


OPERATIONS: list[tuple[Callable[[Pair], None], int]] = [
    (Pair.read, 8),
    (Pair.read_singly, 6),
    (Pair.read_all, 6),
    (Pair.map_read, 4),
    (Pair.drop, 12),
    (Pair.write, 8),
    (Pair.write_open, 3),
    (Pair.read_open, 5),
    (Pair.map_write, 3),
    (Pair.truncate, 2),
    (Pair.replace, 3),
    (Pair.rename, 3),
    (Pair.link, 1),
    (Pair.unlink, 2),
    (Pair.stat, 4),
    (Pair.mode, 1),
    (Pair.copy, 2),
    (Pair.open_one, 3),
    (Pair.settle, 2),
]


@pytest.fixture(params=["ext4", "overlay"])
def lower(request: pytest.FixtureRequest) -> Iterator[Path]:
    with fresh_lower_directory(request.param) as directory:
        yield directory


def run(
    tmemd: Tmemd, lower: Path, tmp_path: Path, steps: int, *, kill: bool, changes: str = "watch"
) -> FileCache:
    seed = int(os.environ.get("TMEM_FS_SEED") or random.SystemRandom().randrange(1 << 32))
    # Room for a part of the files only, so that the host evicts all the time.
    with tmemd.admin() as admin:
        admin.change_vm("a", VmChange(quota_bytes=2 << 20))
    options = ("--get-timeout-ms", "200", "--changes", changes)
    with FileCache(tmp_path, lower, *options, endpoint=f"unix:{tmemd.vm_socket('a')}") as cache:
        cache.wait_for("connected", 1)
        model = tmp_path / "model"
        model.mkdir()
        pair = Pair(cache.mount, model, lower, seed)
        for directory in DIRECTORIES[1:]:
            pair.both(f"mkdir {directory}", lambda root, d=directory: (root / d).mkdir())  # type: ignore[misc]
        operations, weights = zip(*OPERATIONS, strict=True)
        try:
            for step in range(steps):
                pair.chance.choices(operations, weights)[0](pair)
                if kill and step % 400 == 399:
                    tmemd.restart(kill=True)
                if step % 200 == 199:
                    pair.compare()
                if step % 20 == 19 and changes != "none":
                    pair.behind()
            pair.compare()
        except AssertionError as error:
            last = "\n".join(pair.log[-30:])
            raise AssertionError(f"TMEM_FS_SEED={seed}: {error}\nlast operations:\n{last}") from error
        finally:
            pair.close()
        status = cache.status()
        assert status["hit_pages"] > 100, status
        assert status["put_pages"] > 1000, status
        assert cache.stop() == 0
        return cache


@contextmanager
def short_of_memory(limit_bytes: int) -> Iterator[None]:
    """This process in a cgroup with room for so much of what it touches from now on, page cache included."""
    version_1 = Path("/sys/fs/cgroup/memory")
    root, key, limit = (
        (version_1, ":memory:", "memory.limit_in_bytes")
        if version_1.is_dir()
        else (Path("/sys/fs/cgroup"), "0::", "memory.max")
    )
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    home = root / next(line for line in lines if key in line).rsplit(":", 1)[1].lstrip("/")
    group = root / f"tmem-test-{os.getpid()}"
    group.mkdir()
    try:
        try:
            if root != version_1:
                (root / "cgroup.subtree_control").write_text("+memory")
            (group / limit).write_text(str(limit_bytes))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            pytest.skip(f"no cgroup of its own: {error}")
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


@pytest.mark.parametrize("kill", [False, True], ids=["evicting", "killed"])
def test_the_mount_tells_what_a_plain_directory_tells(
    tmemd: Tmemd, lower: Path, tmp_path: Path, kill: bool
) -> None:
    run(tmemd, lower, tmp_path, 2500, kill=kill)


def test_where_nobody_else_changes_files(tmemd: Tmemd, lower: Path, tmp_path: Path) -> None:
    """Files are not opened there."""
    run(tmemd, lower, tmp_path, 2500, kill=False, changes="none")


def test_under_memory_pressure(tmemd: Tmemd, lower: Path, tmp_path: Path) -> None:
    """The kernel evicts pages of the mount all the time."""
    with short_of_memory(40 << 20):
        run(tmemd, lower, tmp_path, 2500, kill=False)


@pytest.mark.long
@pytest.mark.parametrize("limit_mib", [0, 40], ids=["roomy", "short-of-memory"])
def test_for_a_long_time(tmemd: Tmemd, lower: Path, tmp_path: Path, limit_mib: int) -> None:
    with short_of_memory(limit_mib << 20) if limit_mib else nullcontext():
        # Not both: a tmemd that is started here would be in the cgroup too.
        run(tmemd, lower, tmp_path, 100_000, kill=not limit_mib)
