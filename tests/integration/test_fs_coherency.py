"""No reader of the mount ever sees stale data, whoever changes the file and whatever fails."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from framework.daemon import Tmemd
from integration.fs_mount import PAGE_BYTES, SETTLE_S, FileCache, forget, fresh_lower_directory, has
from tmem_host.api.types import VmChange

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MIB = 1 << 20

StartMount = Callable[..., FileCache]


@pytest.fixture(scope="module")
def lower() -> Iterator[Path]:
    with fresh_lower_directory("ext4") as directory:
        yield directory


@pytest.fixture
def start_mount(lower: Path, tmp_path: Path) -> Iterator[StartMount]:
    """Mounts the lower directory once more."""
    with ExitStack() as stack:
        count = 0

        def start(*options: str, endpoint: str | None = None, mount: Path | None = None) -> FileCache:
            nonlocal count
            count += 1
            directory = tmp_path / str(count)
            directory.mkdir()
            return stack.enter_context(FileCache(directory, lower, *options, endpoint=endpoint, mount=mount))

        yield start


def endpoint(daemon: Tmemd) -> str:
    return f"unix:{daemon.vm_socket('a')}"


@pytest.fixture(params=["watch", "check"])
def cache(request: pytest.FixtureRequest, tmemd: Tmemd, start_mount: StartMount) -> FileCache:
    mounted = start_mount("--changes", request.param, endpoint=endpoint(tmemd))
    mounted.wait_for("connected", 1)
    return mounted


def cached(cache: FileCache, name: str, content: bytes) -> Path:
    """A file whose pages tmem holds and the guest's page cache does not."""
    (cache.lower / name).write_bytes(content)
    time.sleep(SETTLE_S)
    before = cache.status()["put_pages"]
    assert (cache.mount / name).read_bytes() == content
    pages = -(-len(content) // PAGE_BYTES)
    cache.wait_for("put_pages", before + pages)
    cache.forget(name)
    return cache.mount / name


def content_of(pages: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE_BYTES)


def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 2
    while not condition():
        assert time.monotonic() < deadline


def hits(cache: FileCache, action: Callable[[], object]) -> int:
    before = cache.status()["hit_pages"]
    action()
    return cache.status()["hit_pages"] - before


def test_what_the_page_cache_forgot_comes_from_tmem(cache: FileCache) -> None:
    content = content_of(200) + b"the last page is not full"
    path = cached(cache, "hit", content)
    assert hits(cache, lambda: check(path, content)) == 201
    cache.forget("hit")
    with path.open("rb") as file:
        assert os.pread(file.fileno(), 100, 77 * PAGE_BYTES + 5) == content[77 * PAGE_BYTES + 5 :][:100]


def check(path: Path, content: bytes) -> None:
    assert path.read_bytes() == content


def splice(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize("where", ["mount", "lower"])
@pytest.mark.parametrize(
    "how", ["write", "mmap", "truncate", "punch", "rename", "recreate", "copy", "same-times"]
)
def test_a_change_is_seen_at_once(cache: FileCache, where: str, how: str) -> None:
    content = content_of(40)
    name = f"{where}-{how}"
    path = cached(cache, name, content)
    target = (cache.mount if where == "mount" else cache.lower) / name
    new = b"N" * 5000
    expected = splice(content, 10_000, new)
    stat = target.stat()
    if how in {"write", "same-times"}:
        with target.open("r+b") as file:
            os.pwrite(file.fileno(), new, 10_000)
        if how == "same-times":
            os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif how == "mmap":
        with target.open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
            shared[10_000:15_000] = new
            shared.flush()
    elif how == "truncate":
        os.truncate(target, 12_345)
        os.truncate(target, len(content))
        expected = content[:12_345] + bytes(len(content) - 12_345)
    elif how == "punch":
        subprocess.run(["fallocate", "-p", "-o", "8192", "-l", "8192", target], check=True)
        expected = splice(content, 8192, bytes(8192))
    elif how == "rename":
        other = target.with_name(name + ".new")
        other.write_bytes(expected)
        other.rename(target)
    elif how == "recreate":
        target.unlink()
        target.write_bytes(expected)
    else:
        source = target.with_name(name + ".source")
        source.write_bytes(new)
        with source.open("rb") as from_file, target.open("r+b") as to_file:
            os.copy_file_range(from_file.fileno(), to_file.fileno(), len(new), 0, 10_000)
    if where == "lower" and how in {"rename", "recreate"}:
        # Which file a name stands for is told by a report, not by opening what it stood for.
        soon(lambda: path.stat().st_ino == target.stat().st_ino)
    check(path, expected)
    cache.forget(name)
    check(path, expected)
    time.sleep(SETTLE_S)
    for _ in range(2):
        cache.forget(name)
        check(path, expected)


def test_the_same_inode_number_is_not_the_same_file(cache: FileCache) -> None:
    """Ext4 gives a freed inode number to the next file."""
    numbers = set()
    for n in range(20):
        content = content_of(3, seed=n)
        path = cached(cache, "reborn", content)
        numbers.add(path.stat().st_ino)
        path.unlink()
    assert len(numbers) < 20, "no number was used twice: nothing was tested"


def test_an_open_file_sees_changes_behind_the_mount(cache: FileCache) -> None:
    cached(cache, "open", content_of(4))
    with (cache.mount / "open").open("rb") as file:
        for n in range(20):
            stamp = b"%016d" % n
            with (cache.lower / "open").open("r+b") as behind:
                behind.write(stamp)
            deadline = time.monotonic() + 2
            while os.pread(file.fileno(), 16, 0) != stamp:
                assert time.monotonic() < deadline, f"change {n} was never seen"


def test_names_and_attributes_changed_behind_the_mount_are_seen(cache: FileCache) -> None:
    for n in range(20):
        name = f"name{n}"
        path = cache.mount / name
        assert not path.exists()
        (cache.lower / name).write_bytes(b"x" * n)
        soon(path.exists)
        assert path.stat().st_size == n
        (cache.lower / name).chmod(0o600 + n % 8)
        soon(lambda path=path, n=n: path.stat().st_mode & 0o777 == 0o600 + n % 8)  # type: ignore[misc]
        (cache.lower / name).rename(cache.lower / "moved")
        soon(lambda path=path: not path.exists())  # type: ignore[misc]
        (cache.lower / "moved").unlink()
        soon(lambda: not (cache.mount / "moved").exists())


def test_looking_around_does_not_wake_who_waits_for_changes(start_mount: StartMount) -> None:
    cache = start_mount("--changes", "watch")

    def woken() -> int:
        tasks = Path(f"/proc/{cache.pid}/task").iterdir()
        watch = next(task for task in tasks if (task / "comm").read_text() == "tmem-watch\n")
        lines = (watch / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("voluntary_ctxt_switches")).split()[1])

    before = woken()
    for n in range(500):
        assert not (cache.mount / f"absent{n}").exists()
    assert woken() - before < 50


def stamped(fd: int, page: int) -> int:
    return int.from_bytes(os.pread(fd, 8, page * PAGE_BYTES), "little")


@pytest.mark.parametrize("where", ["mount", "lower"])
def test_readers_never_go_back_in_time(cache: FileCache, where: str) -> None:
    """A reader that starts after a write ended sees it, whichever cache its page comes from."""
    pages, seconds = 64, 4.0
    name = f"race-{where}"
    path = cache.mount / name
    (cache.lower / name).write_bytes(bytes(pages * PAGE_BYTES))
    written = [0] * pages
    until = time.monotonic() + seconds
    wrong: list[str] = []

    def write() -> None:
        chance = random.Random(2)
        with ((cache.mount if where == "mount" else cache.lower) / name).open("r+b", buffering=0) as file:
            for stamp in range(1, 1 << 30):
                page = chance.randrange(pages)
                os.pwrite(file.fileno(), stamp.to_bytes(8, "little") * 512, page * PAGE_BYTES)
                written[page] = stamp
                if chance.random() < 0.2:
                    time.sleep(chance.choice([0.001, 0.03, 0.08]))
                if time.monotonic() > until:
                    return

    def read(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < until and not wrong:
            page = chance.randrange(pages)
            least = written[page]
            fd = os.open(path, os.O_RDONLY)
            try:
                if (seen := stamped(fd, page)) < least:
                    wrong.append(f"page {page}: {seen} after {least} was written")
                if chance.random() < 0.5:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    threads = [threading.Thread(target=write)] + [threading.Thread(target=read, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert max(written) > 50


def test_an_agent_that_was_killed_is_replaced(tmemd: Tmemd, start_mount: StartMount) -> None:
    content = content_of(50)
    mounted = start_mount(endpoint=endpoint(tmemd))
    mounted.wait_for("connected", 1)
    path = cached(mounted, "survivor", content)
    mounted.kill()
    with pytest.raises(OSError, match="endpoint"):
        path.read_bytes()
    with (mounted.lower / "survivor").open("r+b") as file:
        file.write(b"changed while nobody looked")
    expected = splice(content, 0, b"changed while nobody looked")
    mounted.start()
    mounted.wait_for("connected", 1)
    check(path, expected)

    path = cached(mounted, "kept", content)
    mounted.kill()
    mounted.start()
    mounted.wait_for("connected", 1)
    assert hits(mounted, lambda: check(path, content)) == 50, "pages outlive the agent"


def test_tmemd_may_die_and_return(tmemd: Tmemd, start_mount: StartMount) -> None:
    content = content_of(50)
    mounted = start_mount(endpoint=endpoint(tmemd))
    mounted.wait_for("connected", 1)
    path = cached(mounted, "file", content)
    tmemd.kill()
    check(path, content)
    mounted.forget("file")
    check(path, content)
    with path.open("r+b") as file:
        file.write(b"offline")
    expected = splice(content, 0, b"offline")
    tmemd.start()
    deadline = time.monotonic() + 10
    while not mounted.status()["connected"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    mounted.forget("file")
    check(path, expected)
    time.sleep(SETTLE_S)
    path = cached(mounted, "again", content)
    assert hits(mounted, lambda: check(path, content)) == 50


def test_a_refusing_host_costs_nothing_but_the_hit(tmemd: Tmemd, start_mount: StartMount) -> None:
    mounted = start_mount(endpoint=endpoint(tmemd))
    mounted.wait_for("connected", 1)
    with tmemd.admin() as admin:
        admin.change_vm("a", VmChange(frozen=True))
    content = content_of(100)
    (mounted.lower / "cold").write_bytes(content)
    time.sleep(SETTLE_S)
    check(mounted.mount / "cold", content)
    mounted.wait_for("refused_pages", 1)
    mounted.forget("cold")
    check(mounted.mount / "cold", content)
    assert mounted.status()["hit_pages"] == 0


def test_a_host_that_does_not_answer_is_not_waited_for(tmemd: Tmemd, start_mount: StartMount) -> None:
    mounted = start_mount("--get-timeout-ms", "50", endpoint=endpoint(tmemd))
    mounted.wait_for("connected", 1)
    content = content_of(100)
    path = cached(mounted, "slow", content)
    tmemd.signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        check(path, content)
        assert time.monotonic() - start < 1.0
    finally:
        tmemd.signal(signal.SIGCONT)


def test_without_a_host_files_are_served(start_mount: StartMount, tmp_path: Path) -> None:
    mounted = start_mount(endpoint=f"unix:{tmp_path}/nobody")
    (mounted.mount / "plain").write_bytes(b"content")
    mounted.forget("plain")
    check(mounted.lower / "plain", b"content")
    check(mounted.mount / "plain", b"content")
    assert not mounted.status()["connected"]
    assert mounted.stop() == 0


def test_two_mounts_of_one_directory_agree(tmemd: Tmemd, start_mount: StartMount) -> None:
    one, two = (start_mount(endpoint=endpoint(tmemd)) for _ in range(2))
    for n in range(100):
        writer, reader = (one, two) if n % 2 else (two, one)
        text = b"%d" % n * 1000
        (writer.mount / "shared").write_bytes(text)
        check(reader.mount / "shared", text)
        if n % 10 == 0:
            time.sleep(SETTLE_S)
            reader.forget("shared")
            check(reader.mount / "shared", text)


def test_a_directory_can_be_mounted_over_itself(lower: Path, tmemd: Tmemd, start_mount: StartMount) -> None:
    (lower / "below").write_bytes(b"below")
    mounted = start_mount(endpoint=endpoint(tmemd), mount=lower)
    mounted.wait_for("connected", 1)
    check(lower / "below", b"below")
    (lower / "new").write_bytes(b"new")
    (lower / "new").rename(lower / "newer")
    again = subprocess.run(mounted.command(), capture_output=True, check=False)
    assert again.returncode == 1
    assert b"already" in again.stderr
    assert mounted.stop() == 0, mounted.log
    check(lower / "newer", b"new")
    assert b"fuse.tmem" not in Path("/proc/self/mountinfo").read_bytes()


def test_what_cannot_be_mounted_is_refused(lower: Path, start_mount: StartMount, tmp_path: Path) -> None:
    mounted = start_mount()
    (lower / "file").write_bytes(b"")
    (lower / "inside").mkdir()
    for directory, mount, words in [
        (lower / "file", mounted.mount, b"Not a directory"),
        (lower / "none", mounted.mount, b"No such file"),
        (lower, lower / "inside", b"inside the other"),
        (lower, tmp_path / "none", b"No such file"),
        (lower, mounted.mount, b"already"),
    ]:
        command = mounted.command()
        command[3], command[5] = str(directory), str(mount)
        done = subprocess.run(command, capture_output=True, check=False, timeout=20)
        assert done.returncode == 1
        assert words in done.stderr, done.stderr
    assert mounted.status()["inodes"] >= 1


def test_a_busy_mount_is_detached(start_mount: StartMount) -> None:
    mounted = start_mount("--linger-s", "1")
    (mounted.mount / "busy").write_bytes(b"x")
    with (mounted.mount / "busy").open("rb"):
        assert mounted.stop() == 0
    assert not (mounted.mount / "busy").exists()


@pytest.mark.skipif(not has("fio"), reason="needs fio")
@pytest.mark.parametrize(
    "options", [["--rw=randwrite", "--bs=4k"], ["--rw=write", "--bs=128k"], ["--rw=randrw", "--bs=16k"]]
)
def test_fio_verifies_its_data(cache: FileCache, options: list[str]) -> None:
    fio = ["fio", "--name=verify", f"--directory={cache.mount}", "--size=24m", "--numjobs=2"]
    fio += ["--verify=crc32c", "--verify_state_save=0", *options]
    checks = ["--verify_fatal=1", "--do_verify=1", "--verify_backlog=512", "--group_reporting"]
    subprocess.run([*fio, *checks], check=True, capture_output=True)
    for file in cache.mount.glob("verify.*"):
        forget(file)
    if "randrw" not in options[0]:
        for _ in range(2):
            subprocess.run([*fio, "--verify_only"], check=True, capture_output=True)
            for file in cache.mount.glob("verify.*"):
                forget(file)
    for file in cache.mount.glob("verify.*"):
        file.unlink()
