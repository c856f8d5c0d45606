"""Where nobody else changes the directory (`--changes none`), the kernel opens files without asking."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from framework.daemon import Tmemd
from integration.fs_mount import PAGE_BYTES, FileCache, lower_directory

FILES = 200
"""More than keep their descriptors."""
_APPEND_ONLY = 0x20
_SETFLAGS = 0x40086602

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


_WALK = """
import os, sys
for root, _, names in os.walk(sys.argv[1]):
    for name in names:
        os.lstat(os.path.join(root, name))
"""


@pytest.fixture
def cache(tmemd: Tmemd) -> Iterator[FileCache]:
    with tempfile.TemporaryDirectory(prefix="tmem-openless-") as name:
        directory = Path(name)
        with lower_directory("ext4", directory) as lower:
            for number in range(FILES):
                (lower / f"{number}").write_bytes(content_of(number))
            endpoint = f"unix:{tmemd.vm_socket('a')}"
            with FileCache(directory, lower, "--changes", "none", endpoint=endpoint) as mounted:
                mounted.wait_for("connected", 1)
                yield mounted
                assert mounted.stop() == 0, mounted.log


def content_of(number: int) -> bytes:
    return f"{number:07}\n".encode() * (2 * PAGE_BYTES // 8)


@contextmanager
def stopped(cache: FileCache) -> Iterator[None]:
    os.kill(cache.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(cache.pid, signal.SIGCONT)


def within(seconds: float, what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def descriptors(cache: FileCache) -> list[str]:
    directory = Path(f"/proc/{cache.pid}/fd")
    found = []
    for entry in directory.iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return found


def test_a_file_that_was_read_is_opened_without_asking(cache: FileCache) -> None:
    path = cache.mount / "7"
    for _ in range(2):
        # What follows the first reading, a look at the new access time for instance, is asked for once.
        assert path.read_bytes() == content_of(7)
    with stopped(cache):
        reader = subprocess.Popen(["cmp", path, cache.lower / "7"])
        finished = within(5, lambda: reader.poll() is not None)
    assert finished
    assert reader.wait(5) == 0


def test_many_files_are_used_at_once(cache: FileCache) -> None:
    opened = [os.open(cache.mount / f"{number}", os.O_RDWR) for number in range(FILES)]
    try:
        for number, fd in enumerate(opened):
            os.pwrite(fd, b"changed", PAGE_BYTES + number)
        (cache.mount / "3").unlink()
        for number, fd in enumerate(opened):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            expected = bytearray(content_of(number))
            expected[PAGE_BYTES + number : PAGE_BYTES + number + 7] = b"changed"
            assert os.pread(fd, len(expected) + 1, 0) == expected, number
            os.ftruncate(fd, number)
            assert os.fstat(fd).st_size == number
    finally:
        for fd in opened:
            os.close(fd)
    sizes = {path.name: path.stat().st_size for path in cache.lower.iterdir()}
    assert sizes == {f"{number}": number for number in range(FILES) if number != 3}


def test_nothing_of_a_removed_file_stays_open(cache: FileCache) -> None:
    fd = os.open(cache.mount / "5", os.O_RDWR)
    os.pwrite(fd, b"x", 0)
    assert os.pread(fd, 1, 0) == b"x"
    (cache.mount / "5").unlink()
    assert any("(deleted)" in name for name in descriptors(cache))
    os.close(fd)
    assert within(5, lambda: not any("(deleted)" in name for name in descriptors(cache)))


def test_a_created_file_is_closed(cache: FileCache) -> None:
    # From here on the kernel opens files without asking.
    assert (cache.mount / "1").read_bytes() == content_of(1)
    before = len(descriptors(cache))
    for _ in range(100):
        fd = os.open(cache.mount / "new", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.write(fd, b"created")
        assert os.pread(fd, 20, 0) == b"created"
        (cache.mount / "new").unlink()
        assert os.pread(fd, 20, 0) == b"created"
        os.close(fd)
        fd = os.open(cache.mount, os.O_TMPFILE | os.O_RDWR)
        os.write(fd, b"nameless")
        assert os.pread(fd, 20, 0) == b"nameless"
        os.close(fd)
    assert within(5, lambda: len(descriptors(cache)) <= before + 4), descriptors(cache)


def test_a_file_that_can_only_be_appended_to(cache: FileCache) -> None:
    path = cache.mount / "9"
    own = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(own, _SETFLAGS, array.array("I", [_APPEND_ONLY]))
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        assert os.write(fd, b"more") == 4
        os.close(fd)
        fd = os.open(path, os.O_WRONLY)
        with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
            os.pwrite(fd, b"other", 0)
        os.close(fd)
        fcntl.ioctl(own, _SETFLAGS, array.array("I", [0]))
    finally:
        os.close(own)
    assert path.read_bytes() == content_of(9) + b"more"


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_directory_that_was_listed_is_walked_without_asking(cache: FileCache) -> None:
    walk = [sys.executable, "-c", _WALK, str(cache.mount)]
    for _ in range(2):
        # The first listing moves the directory's access time, which is asked for once.
        subprocess.run(walk, check=True)
    with stopped(cache):
        lister = subprocess.Popen(walk)
        finished = within(5, lambda: lister.poll() is not None)
    assert finished
    assert lister.wait(5) == 0


def test_listings_follow_what_changes_through_the_mount(cache: FileCache) -> None:
    """Whoever lists a directory does so over one descriptor that nobody opened."""
    for number in range(100):
        (cache.mount / f"made{number}").mkdir()
        (cache.mount / f"made{number}" / "in").write_bytes(b"")
        assert f"made{number}" in listed(cache.mount)
        assert listed(cache.mount / f"made{number}") == ["in"]
    with os.scandir(cache.mount) as slow:
        next(slow)
        # Two who list side by side do not disturb each other.
        assert len(listed(cache.mount)) == FILES + 100
        left = {entry.name for entry in slow}
    assert len(left) == FILES + 100 - 1
    for number in range(100):
        (cache.mount / f"made{number}" / "in").unlink()
        (cache.mount / f"made{number}").rmdir()
        assert f"made{number}" not in listed(cache.mount)
    assert listed(cache.mount) == listed(cache.lower)
