"""Read-around: pages that the kernel is given unasked save reads, and never overwrite anything newer."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from framework.daemon import Tmemd
from integration.fs_mount import (
    PAGE_BYTES,
    SETTLE_S,
    FileCache,
    forget,
    fresh_lower_directory,
    open_at_random,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

WINDOW = 4
"""Pages that are read in the place of one."""
NEIGHBOURHOOD = 64
KNOWN = 8
"""Pages of a neighbourhood that must be at the host."""


@pytest.fixture(scope="module")
def lower() -> Iterator[Path]:
    with fresh_lower_directory("ext4") as directory:
        yield directory


@pytest.fixture
def cache(tmemd: Tmemd, lower: Path, tmp_path: Path) -> Iterator[FileCache]:
    with FileCache(tmp_path, lower, endpoint=f"unix:{tmemd.vm_socket('a')}") as mounted:
        mounted.wait_for("connected", 1)
        yield mounted


def page_of(fd: int, index: int) -> bytes:
    return os.pread(fd, PAGE_BYTES, index * PAGE_BYTES)


def stamp(number: int) -> bytes:
    return number.to_bytes(8, "little") * (PAGE_BYTES // 8)


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    time.sleep(SETTLE_S)


def make_known(cache: FileCache, fd: int) -> None:
    """Read every other window's first page, so that the host has much of the neighbourhood."""
    before = cache.status()["put_pages"]
    for n in range(KNOWN):
        page_of(fd, n * 2 * WINDOW)
    cache.wait_for("put_pages", before + KNOWN)


def misses(cache: FileCache, action: Callable[[], object]) -> int:
    def read_pages() -> int:
        told = cache.status()
        return told["miss_pages"] + told["hit_pages"] + told["bypass_pages"]

    before = read_pages()
    action()
    return read_pages() - before


def test_pages_around_a_miss_are_not_asked_for_again(cache: FileCache) -> None:
    content = random.Random(1).randbytes(NEIGHBOURHOOD * PAGE_BYTES)
    write(cache.lower / "file", content)
    fd = open_at_random(cache.mount / "file")
    try:
        make_known(cache, fd)
        assert cache.status()["around_pages"] == 0, "one page is as good as another where the host knows few"
        missed = WINDOW + 1
        assert page_of(fd, missed) == content[missed * PAGE_BYTES :][:PAGE_BYTES]
        cache.wait_for("around_pages", WINDOW - 1)
        rest = [WINDOW, WINDOW + 2, WINDOW + 3]
        assert misses(cache, lambda: [page_of(fd, index) for index in rest]) == 0
        for index in rest:
            assert page_of(fd, index) == content[index * PAGE_BYTES :][:PAGE_BYTES]
        # They are at the host, too.
        cache.wait_for("put_pages", KNOWN + WINDOW)
        # And come from there together.
        forget(cache.mount / "file")
        before = cache.status()
        assert page_of(fd, missed) == content[missed * PAGE_BYTES :][:PAGE_BYTES]
        cache.wait_for("around_pages", 2 * (WINDOW - 1))
        assert misses(cache, lambda: [page_of(fd, index) for index in rest]) == 0
        for index in rest:
            assert page_of(fd, index) == content[index * PAGE_BYTES :][:PAGE_BYTES]
        after = cache.status()
        assert after["hit_pages"] == before["hit_pages"] + 1
        assert after["miss_pages"] == before["miss_pages"]
    finally:
        os.close(fd)


def test_the_last_page_need_not_be_whole(cache: FileCache) -> None:
    content = random.Random(2).randbytes((NEIGHBOURHOOD - 2) * PAGE_BYTES + 100)
    write(cache.lower / "odd", content)
    fd = open_at_random(cache.mount / "odd")
    try:
        make_known(cache, fd)
        last = NEIGHBOURHOOD - 2
        assert page_of(fd, last - 1) == content[(last - 1) * PAGE_BYTES : last * PAGE_BYTES]
        cache.wait_for("around_pages", 2)
        assert misses(cache, lambda: page_of(fd, last)) == 0
        assert page_of(fd, last) == content[last * PAGE_BYTES :]
        assert os.fstat(fd).st_size == len(content)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == content
    finally:
        os.close(fd)


@pytest.mark.parametrize("options", [("--changes=check",), ("--changes=none",), ("--put=evicted",)])
def test_where_it_cannot_be_safe_it_is_not_done(
    tmemd: Tmemd, lower: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    with FileCache(tmp_path, lower, *options, endpoint=f"unix:{tmemd.vm_socket('a')}") as cache:
        if options == ("--put=evicted",) and cache.status()["put"] == "read":  # type: ignore[comparison-overlap]
            pytest.skip("this kernel does not let evicted pages be caught")
        cache.wait_for("connected", 1)
        write(lower / "unsafe", bytes(NEIGHBOURHOOD * PAGE_BYTES))
        fd = open_at_random(cache.mount / "unsafe")
        try:
            assert misses(cache, lambda: [page_of(fd, index) for index in range(0, NEIGHBOURHOOD, 2)]) == 32
            time.sleep(SETTLE_S)
            assert misses(cache, lambda: [page_of(fd, index) for index in range(1, NEIGHBOURHOOD, 2)]) == 32
            assert cache.status()["around_pages"] == 0
        finally:
            os.close(fd)


def test_what_may_be_written_to_is_let_alone(cache: FileCache) -> None:
    """Stores into a shared map are in the page cache alone, and nobody is told."""
    write(cache.lower / "mapped", bytes(NEIGHBOURHOOD * PAGE_BYTES))
    fd = open_at_random(cache.mount / "mapped", os.O_RDWR)
    reader = open_at_random(cache.mount / "mapped")
    try:
        with mmap.mmap(fd, 0) as mapped:
            os.close(fd)
            mapped.madvise(mmap.MADV_RANDOM)
            make_known(cache, reader)
            mapped[(WINDOW + 2) * PAGE_BYTES : (WINDOW + 2) * PAGE_BYTES + 5] = b"dirty"
            assert misses(cache, lambda: page_of(reader, WINDOW + 1)) == 1
            time.sleep(SETTLE_S)
            assert cache.status()["around_pages"] == 0
            assert mapped[(WINDOW + 2) * PAGE_BYTES :][:5] == b"dirty"
        # Closed, it is like any other file.
        forget(cache.mount / "mapped")
        time.sleep(SETTLE_S)
        make_known(cache, reader)
        page_of(reader, WINDOW + 1)
        cache.wait_for("around_pages", WINDOW - 1)
        assert page_of(reader, WINDOW + 2)[:5] == b"dirty"
    finally:
        os.close(reader)


class Race:
    """Files whose pages tell when they were written, and threads that write, open and read them."""

    NAMES = 4
    PAGES = 512

    def __init__(self, mount: Path, root: Path, seconds: float) -> None:
        """Writers work below `root`, which is the mount or the directory behind it."""
        self.mount = mount
        self.root = root
        self.behind = root != mount
        self.names = [f"{'behind' if self.behind else 'through'}{n}" for n in range(self.NAMES)]
        self.until = time.monotonic() + seconds
        self.written = {name: [1] * self.PAGES for name in self.names}
        self.done: list[str] = []
        self.wrong: list[str] = []
        self.opened = 0
        for name in self.names:
            write(root / name, stamp(1) * self.PAGES)

    def goes_on(self) -> bool:
        return time.monotonic() < self.until and not self.wrong

    def change(self, name: str, number: int, chance: random.Random) -> None:
        path, written = self.root / name, self.written[name]
        # Behind the mount, names and sizes are told by reports, so that readers may be late.
        how = chance.choice(["write", "map"] if self.behind else ["write", "map", "replace", "truncate"])
        some = sorted(chance.sample(range(self.PAGES), 8))
        self.done.append(f"{number}: {name} {how}")
        if how == "replace":
            new = path.with_name(f"{name}.new")
            new.write_bytes(stamp(number) * self.PAGES)
            new.rename(path)
            some = list(range(self.PAGES))
        elif how == "truncate":
            with path.open("r+b", buffering=0) as file:
                # What is cut off must not come back: the pages are written anew, with a higher number.
                os.ftruncate(file.fileno(), some[0] * PAGE_BYTES)
                os.pwrite(file.fileno(), stamp(number) * (self.PAGES - some[0]), some[0] * PAGE_BYTES)
            some = list(range(some[0], self.PAGES))
        elif how == "write":
            with path.open("r+b", buffering=0) as file:
                for index in some:
                    os.pwrite(file.fileno(), stamp(number), index * PAGE_BYTES)
        else:
            with path.open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as mapped:
                for index in some:
                    mapped[index * PAGE_BYTES : (index + 1) * PAGE_BYTES] = stamp(number)
                mapped.flush()
        for index in some:
            written[index] = number

    def write(self) -> None:
        chance = random.Random(5)
        number = 2
        while self.goes_on():
            self.change(chance.choice(self.names), number, chance)
            number += 1
            time.sleep(chance.choice([0.05, 0.1, 0.2]))

    def open(self) -> None:
        while self.goes_on():
            for name in self.names:
                self.opened += 1
                os.close(os.open(self.mount / name, os.O_RDONLY if self.opened % 16 else os.O_RDWR))

    def read(self, seed: int) -> None:
        chance = random.Random(seed)
        while self.goes_on():
            name = chance.choice(self.names)
            least = list(self.written[name])
            fd = open_at_random(self.mount / name)
            try:
                for index in chance.sample(range(self.PAGES), 64):
                    seen = int.from_bytes(page_of(fd, index)[:8], "little")
                    # What is being truncated and written reads as zeros for a moment, on every FUSE mount.
                    if 0 < seen < least[index]:
                        how = [line for line in self.done if name in line][-3:]
                        self.wrong.append(f"{name}, page {index}: {seen} after {least[index]}; {how}")
                if chance.random() < 0.1:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


@pytest.mark.parametrize("where", ["mount", "lower"])
def test_readers_at_random_never_go_back_in_time(cache: FileCache, tmemd: Tmemd, where: str) -> None:
    """Whoever writes, truncates, maps or replaces a file while pages are stored: later readers see it.

    Openers come and go all the time, so that some are put off: none of them may be lost.
    """
    race = Race(cache.mount, cache.mount if where == "mount" else cache.lower, seconds=8.0)
    threads = [threading.Thread(target=race.write), threading.Thread(target=race.open)]
    threads += [threading.Thread(target=race.read, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    while race.goes_on():
        # What the host lost is read around, too.
        with tmemd.admin() as admin:
            admin.flush("a")
        time.sleep(0.5)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a request was never answered"
    assert not race.wrong
    told = cache.status()
    assert told["around_pages"] > 100, told
    assert race.opened > 1000
    assert cache.stop() == 0
