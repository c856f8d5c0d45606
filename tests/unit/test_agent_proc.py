"""What the agent reads of the kernel: /proc/meminfo, vmstat, pressure, swaps, mountinfo."""

from __future__ import annotations

from pathlib import Path

import pytest
from tmem_guest import mounts, pressure

MOUNTINFO = """\
22 1 254:0 / / rw,noatime shared:1 - ext4 /dev/vda rw
30 22 254:16 / /data rw,noatime - ext4 /dev/vdb rw
40 22 0:40 / /mnt/two\\040words rw,nosuid shared:9 master:2 - fuse.tmem tmem rw,user_id=0
41 30 0:41 / /data/srv rw - fuse.tmem tmem rw
42 22 0:42 / /mnt/sshfs rw - fuse.sshfs host:/ rw
43 30 0:43 / /data/srv rw - tmpfs none rw
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure/memory").write_text(
        "some avg10=12.34 avg60=0.00 avg300=0.00 total=1\nfull avg10=5.60 avg60=0.00 avg300=0.00 total=1\n"
    )
    (tmp_path / "meminfo").write_text(
        "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   400 kB\n"
        "SwapTotal: 80 kB\nSwapFree: 70 kB\nHugePages_Total: 0\n"
    )
    (tmp_path / "vmstat").write_text("nr_free_pages 1\npswpin 11\npswpout 22\npswpin_zero 9\n")
    (tmp_path / "swaps").write_text(
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        "/dev/ublkb0                             partition\t1024\t\t512\t\t100\n"
        "/a\\040b                                file\t\t2048\t\t0\t\t-2\n"
    )
    return tmp_path


def test_memory(proc: Path) -> None:
    assert pressure.read_memory(proc) == pressure.Memory(
        psi_some_avg10=1234,
        psi_full_avg10=560,
        mem_total_bytes=1000 << 10,
        mem_available_bytes=400 << 10,
        swap_total_bytes=80 << 10,
        swap_free_bytes=70 << 10,
        swap_in_pages=11,
        swap_out_pages=22,
    )


def test_a_kernel_without_psi_reports_none(proc: Path) -> None:
    (proc / "pressure/memory").unlink()
    assert pressure.read_memory(proc).psi_some_avg10 == 0


def test_swaps(proc: Path) -> None:
    assert pressure.read_swaps(proc) == [
        pressure.SwapArea("/dev/ublkb0", 1024 << 10, 512 << 10, 100),
        pressure.SwapArea("/a b", 2048 << 10, 0, -2),
    ]


def test_the_real_proc_can_be_read() -> None:
    memory = pressure.read_memory()
    assert 0 < memory.mem_available_bytes <= memory.mem_total_bytes
    pressure.read_swaps()
    assert any(mount.path == "/" for mount in mounts.table())


def test_mount_table() -> None:
    table = mounts.parse(MOUNTINFO)
    by_path = {mount.path: mount for mount in table}
    assert by_path["/mnt/two words"].is_tmem
    assert not by_path["/mnt/sshfs"].is_tmem
    assert not by_path["/"].is_tmem
    assert by_path["/data/srv"].filesystem == "tmpfs"  # the last one hides the others


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("/etc", "/"),
        ("/data", "/data"),
        ("/database", "/"),
        ("/data/srv/a", "/data/srv"),
        ("/mnt/two words/x", "/mnt/two words"),
    ],
)
def test_which_mount_a_path_is_in(path: str, inside: str) -> None:
    mount = mounts.containing(path, mounts.parse(MOUNTINFO))
    assert mount is not None
    assert mount.path == inside


def test_of_stacked_mounts_the_last_counts() -> None:
    mount = mounts.containing("/data/srv/x", mounts.parse(MOUNTINFO))
    assert mount is not None
    assert mount.filesystem == "tmpfs"
