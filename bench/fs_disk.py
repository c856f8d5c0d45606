"""Where a VM's disks are on the host: limits below the host's page cache, what was read, what is cached.

libvirt's iotune is a valve between guest and page cache: what the page cache answers is throttled as well. A
disk that is slow *under* the page cache takes the block I/O controller of cgroups, which is what libvirt's
blkiotune uses.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import libvirt
import psutil
from tmem_host.vm import disks, images, libvirtd
from tmem_host.vm.domain import DiskLimits
from tmem_host.vm.machine import Machine

_GROUP = "tmem-bench-disk"
_V1 = Path("/sys/fs/cgroup/blkio")
_V2 = Path("/sys/fs/cgroup")
_SECTOR_BYTES = 512


def emulator(guest: Machine) -> psutil.Process:
    """The QEMU process of a VM."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.startswith(f"guest={guest.name},") or word == f"guest={guest.name}" for word in words):
            return process
    raise AssertionError(f"no QEMU runs for {guest.name}")


def sectors_read(process: psutil.Process) -> int:
    """What a process made the host's disks read, in sectors of 512 bytes; the page cache's hits are none."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    return int(fields["read_bytes"]) // _SECTOR_BYTES


def _files(guest: Machine) -> list[Path]:
    image = images.get(guest.state.image)
    backing = [path for path in (image.root, image.data) if path is not None]
    return [*backing, *sorted(disks.directory(guest.name).glob("*.qcow2"))]


def forget(guest: Machine) -> None:
    """Make the host's page cache drop what it has of the disks."""
    for path in _files(guest):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_bytes(guest: Machine) -> int:
    """What the host's page cache has of the disks."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, _files(guest))]
    return sum(map(int, subprocess.check_output(command, text=True).split()))


@contextmanager
def iotune(guest: Machine, limits: DiskLimits) -> Iterator[None]:
    """All disks of the VM as one slow disk, by libvirt's iotune: what the guest asks for is counted."""
    _tune(guest, limits)
    try:
        yield
    finally:
        _tune(guest, DiskLimits())


def _tune(guest: Machine, limits: DiskLimits) -> None:
    with libvirtd.connection() as connection:
        found = connection.lookupByName(guest.name)
        for target in _targets(guest):
            # One group: the disks share the limit.
            wanted: dict[str, int | str] = {**limits.iotune(), "group_name": "disk"}
            found.setBlockIoTune(target, wanted, libvirt.VIR_DOMAIN_AFFECT_LIVE)


def _targets(guest: Machine) -> Sequence[str]:
    count = len([path for path in _files(guest) if path.suffix == ".qcow2"])
    return [f"vd{'abcd'[n]}" for n in range(count)]


@contextmanager
def below_the_page_cache(guest: Machine, limits: DiskLimits) -> Iterator[None]:
    """The disk that holds the VM's disks is slow for its QEMU; what the page cache answers is not."""
    group = (_V1 if _V1.is_dir() else _V2) / _GROUP
    group.mkdir(exist_ok=True)
    device = _whole_disk(_files(guest)[0])
    iops, rate = limits.total_iops or 0, limits.total_bytes or 0
    process = emulator(guest)
    home = group.parent
    try:
        if _V1.is_dir():
            for name, value in (("iops", iops), ("bps", rate)):
                for way in ("read", "write"):
                    (group / f"blkio.throttle.{way}_{name}_device").write_text(f"{device} {value}")
        else:
            (_V2 / "cgroup.subtree_control").write_text("+io")
            text = f"{device} riops={iops} wiops={iops} rbps={rate} wbps={rate}"
            (group / "io.max").write_text(text)
            home = _V2 / Path(f"/proc/{process.pid}/cgroup").read_text().split("::/", 1)[1].strip()
        (group / "cgroup.procs").write_text(str(process.pid))
        yield
    finally:
        (home / "cgroup.procs").write_text(str(process.pid))
        group.rmdir()


def _whole_disk(path: Path) -> str:
    """`major:minor` of the disk that a file is on, for a partition that of its disk."""
    number = path.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if (place / "partition").exists():
        place = place.parent
    return (place / "dev").read_text().strip()
