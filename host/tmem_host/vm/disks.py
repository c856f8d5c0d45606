"""A VM's disks: overlays of its image's, so that the image is never written to."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm import images
from tmem_host.vm.domain import Disk, DiskCache, DiskLimits
from tmem_host.vm.images import Image


def directory(name: str) -> Path:
    """Where the disks of a VM are: not below /run, which is memory on most machines."""
    return images.cache_directory() / "vm" / name


def make(name: str, image: Image, limits: DiskLimits, cache: DiskCache | None = None) -> tuple[Disk, ...]:
    """Make the disks of a VM: its root disk if the image has one, and its data disk, the last. NO_SPACE.

    `cache` is for all of them; by default only the data disk goes past the host's page cache.
    """
    place = directory(name)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    disks = []
    if image.root is not None:
        disks.append(Disk(_overlay(image.root, place / "root.qcow2"), cache=cache or "unsafe"))
    overlay = _overlay(image.data, place / "data.qcow2")
    usual: DiskCache = "none" if _supports_direct(place) else "unsafe"
    return (*disks, Disk(overlay, cache=cache or usual, limits=limits))


def remove(name: str) -> None:
    """Remove the disks of a VM."""
    shutil.rmtree(directory(name), ignore_errors=True)


def _overlay(backing: Path, target: Path) -> Path:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(backing), str(target)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        full = "No space left" in made.stderr
        raise OperatorError(
            f"cannot make the disk {target}: {made.stderr.strip()}",
            code=ExitCode.NO_SPACE if full else ExitCode.FAILED,
        )
    return target


def _supports_direct(directory: Path) -> bool:
    """Whether files here can be opened past the page cache (tmpfs could not before Linux 6.6)."""
    probe = directory / ".direct"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True
