"""The swap shim against a real tmemd: its NBD server takes the place of the kernel."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.daemon import Tmemd
from integration.fs_mount import program
from integration.swap_shim import PAGE_BYTES, Nbd, NbdError, Shim
from tmem_host.api.types import VmChange

PAGES = 4096


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on a file system that can do direct I/O."""
    with tempfile.TemporaryDirectory(prefix="tmem-swap-", dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def shim(tmemd: Tmemd, disk: Path, short_directory: Path) -> Iterator[Shim]:
    with Shim(short_directory, disk, f"unix:{tmemd.vm_socket('a')}") as running:
        yield running


def page(index: int, generation: int) -> bytes:
    """A page that tells what it is; half of it compresses."""
    noise = random.Random(index << 32 | generation).randbytes(PAGE_BYTES // 2)
    return noise + index.to_bytes(8, "little") * (PAGE_BYTES // 16)


def set_quota(tmemd: Tmemd, quota_bytes: int) -> None:
    with tmemd.admin() as admin:
        admin.change_vm("a", VmChange(quota_bytes=quota_bytes))


def verify(device: Nbd, written: dict[int, int]) -> None:
    for index, generation in written.items():
        assert device.read(index) == page(index, generation), f"page {index}"


def test_pages_live_at_the_host_and_are_forgotten_when_discarded(tmemd: Tmemd, shim: Shim) -> None:
    with Nbd(shim.nbd_socket) as device:
        assert device.size_bytes == PAGES * PAGE_BYTES
        shim.wait_for("connection", lambda status: status["connected"] is True)
        written = dict.fromkeys(range(100, 400), 1)
        for index in written:
            device.write(index, page(index, 1))
        verify(device, written)
        assert device.read(0, 16) == bytes(16 * PAGE_BYTES)
        status = shim.status()
        assert (status["host_pages"], status["file_pages"]) == (300, 0)
        with tmemd.admin() as admin:
            assert admin.vm("a").persistent_pages == 300
        device.discard(0, PAGES)
        assert device.read(200) == bytes(PAGE_BYTES)
        with tmemd.admin() as admin:
            assert admin.vm("a").persistent_pages == 0


def test_refused_pages_and_only_they_go_to_the_file(tmemd: Tmemd, shim: Shim) -> None:
    with Nbd(shim.nbd_socket) as device:
        shim.wait_for("connection", lambda status: status["connected"] is True)
        device.write(0, page(0, 1))
        set_quota(tmemd, 0)
        for index in range(1, 9):
            device.write(index, page(index, 1))
        device.write(0, page(0, 2))  # a refused overwrite leaves nothing old behind
        verify(device, {0: 2} | dict.fromkeys(range(1, 9), 1))
        status = shim.status()
        assert (status["host_pages"], status["file_pages"], status["refused"]) == (0, 9, 9)
        set_quota(tmemd, 32 << 20)
        device.write(3, page(3, 2))
        assert shim.status()["host_pages"] == 1


def test_reclaim_moves_pages_to_the_file_and_the_host_gets_its_memory_back(tmemd: Tmemd, shim: Shim) -> None:
    with Nbd(shim.nbd_socket) as device:
        shim.wait_for("connection", lambda status: status["connected"] is True)
        written = dict.fromkeys(range(600), 1)
        for index in written:
            device.write(index, page(index, 1))
        shim.ask(op="reclaim", pages=500)
        status = shim.wait_for("reclaimed pages", lambda status: status["reclaimed"] == 500)
        assert (status["host_pages"], status["file_pages"]) == (100, 500)
        with tmemd.admin() as admin:
            assert admin.vm("a").persistent_pages == 100
        verify(device, written)
        shim.ask(op="drain")
        shim.wait_for("drained pages", lambda status: status["host_pages"] == 0)
        device.write(0, page(0, 2))
        assert shim.status()["file_pages"] == 600
        shim.ask(op="resume")
        device.write(0, page(0, 3))
        assert shim.status()["host_pages"] == 1
        verify(device, written | {0: 3})


def test_every_page_survives_a_daemon_that_is_killed_again_and_again(tmemd: Tmemd, shim: Shim) -> None:
    chance = random.Random(1)
    written: dict[int, int] = {}
    with Nbd(shim.nbd_socket) as device:
        shim.wait_for("connection", lambda status: status["connected"] is True)
        for round_ in range(4):
            for step in range(300):
                index = chance.randrange(1000)
                generation = round_ * 1000 + step
                match chance.randrange(8):
                    case 0:
                        device.discard(index, 1)
                        written.pop(index, None)
                    case 1 if index in written:
                        assert device.read(index) == page(index, written[index])
                    case _:
                        device.write(index, page(index, generation))
                        written[index] = generation
                if step == 200:
                    tmemd.kill()
                    # New pages go to the file while nobody answers.
                    for index in range(2000, 2020):
                        device.write(index, page(index, generation))
                        written[index] = generation
                    tmemd.start()
            verify(device, written)
        status = shim.wait_for("flushed copies", lambda status: status["stale_pages"] == 0)
        assert status["lost_pages"] == 0
        assert status["disconnects"] == 4, shim.log
        with tmemd.admin() as admin:
            assert admin.vm("a").persistent_pages == status["host_pages"]


def test_a_host_that_lost_its_pages_gives_errors_and_no_wrong_data(tmemd: Tmemd, shim: Shim) -> None:
    with Nbd(shim.nbd_socket) as device:
        shim.wait_for("connection", lambda status: status["connected"] is True)
        for index in range(20):
            device.write(index, page(index, 1))
        tmemd.kill()
        arena = Path(tmemd.arena)
        shutil.rmtree(arena) if arena.is_dir() else arena.unlink()
        tmemd.start()
        for index in range(20):
            with pytest.raises(NbdError):
                device.read(index)
        assert shim.status()["lost_pages"] == 20
        assert "lost swap pages" in shim.log
        device.write(0, page(0, 2))
        assert device.read(0) == page(0, 2)


def test_the_shim_is_small(tmemd: Tmemd, disk: Path, short_directory: Path) -> None:
    endpoint = f"unix:{tmemd.vm_socket('a')}"
    with Shim(short_directory, disk, endpoint, size="512M") as shim, Nbd(shim.nbd_socket) as device:
        shim.wait_for("connection", lambda status: status["connected"] is True)
        device.write(0, page(0, 1))
        assert device.read(0) == page(0, 1)
        status = shim.status()
    protections, rss_bytes = status["protections"], status["rss_bytes"]
    assert isinstance(protections, dict) and isinstance(rss_bytes, int)
    assert protections["mlockall"], "all of it is resident, or the figure means nothing"
    assert rss_bytes < 6 << 20


def test_qemu_finds_nothing_to_complain_about(shim: Shim) -> None:
    commands = ["write -P 7 0 64k", "read -P 7 0 64k", "discard 0 64k", "read -P 0 0 1M", "flush"]
    tool = shutil.which("qemu-io")
    if tool is None:
        pytest.skip("qemu-io is not installed")
    options = [option for command in commands for option in ("-c", command)]
    done = subprocess.run(
        [tool, "-f", "raw", *options, f"nbd+unix:///?socket={shim.nbd_socket}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0 and "verification failed" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--file", "/dev/shm/tmem-swap-test"], "keeps files in memory"),
        (["--file", "/nowhere/swap.tmem"], "/nowhere/swap.tmem"),
        (["--endpoint", "tcp:1.2.3.4:5"], "is no endpoint"),
        (["--size", "1X"], "unknown suffix"),
        (["--device", "floppy"], "none of auto, ublk, nbd"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(disk: Path, options: list[str], message: str) -> None:
    defaults = {"--file": str(disk / "swap"), "--size": "1M", "--device": "serve:/tmp/none/x"}
    given = defaults | dict(zip(options[::2], options[1::2], strict=True))
    done = subprocess.run(
        [str(program()), "swap", *(word for pair in given.items() for word in pair)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    Path("/dev/shm/tmem-swap-test").unlink(missing_ok=True)
    assert done.returncode != 0
    assert message in done.stderr


# Ways to take a protection from a program that root starts.
DENIED = {
    "mlockall": ["prlimit", "--memlock=65536", "setpriv", "--bounding-set=-ipc_lock"],
    "io_flusher": ["setpriv", "--bounding-set=-sys_resource"],
    "oom_exempt": ["setpriv", "--bounding-set=-sys_resource"],
    "real_time": ["prlimit", "--rtprio=0", "setpriv", "--bounding-set=-sys_nice"],
    "memory_reserve": [
        *("unshare", "--mount", "sh", "-c"),
        'mount --bind /proc/version /proc/sys/vm/min_free_kbytes && exec "$@"',
        "sh",
    ],
}


@pytest.mark.parametrize("name", DENIED)
def test_a_missing_protection_is_warned_of_loudly_or_refused(
    disk: Path, short_directory: Path, name: str
) -> None:
    endpoint = f"unix:{short_directory}/nobody"
    with Shim(short_directory, disk, endpoint, wrapper=DENIED[name]) as shim:
        protections = shim.status()["protections"]
        log = shim.log
    assert isinstance(protections, dict)
    assert list(protections) == list(DENIED)
    # The machine may deny more, a container for instance.
    missing = [each for each, had in protections.items() if not had]
    assert name in missing
    for each in missing:
        assert f"UNPROTECTED: no {each}: " in log
    strict = Shim(short_directory, disk, endpoint, "--require-protection", wrapper=DENIED[name])
    done = subprocess.run(strict.command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode != 0
    assert f"no {missing[0]}: " in done.stderr
    assert "run as root" in done.stderr, "what to try"


def test_a_full_file_system_is_named_and_left_as_it_was(disk: Path) -> None:
    image, mount = disk / "image", disk / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        done = subprocess.run(
            [program(), "swap", "--file", mount / "swap", "--size", "64M", "--device", "serve:/tmp/none/x"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode != 0
        assert "no space for 67108864 bytes" in done.stderr
        assert (mount / "swap").stat().st_size == 0
    finally:
        subprocess.run(["umount", mount], check=True)
