"""A host for the guests of a benchmark: the image, a tmemd of its own, libvirtd."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from framework.daemon import Tmemd
from tmem_host.vm import images, libvirtd


@contextmanager
def running(capacity: str = "1G") -> Iterator[Tmemd]:
    """All that VMs of the image `debian` need; nothing is left behind."""
    images.build("debian", progress=print)
    # A short name, for unix sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="tb-", dir="/dev/shm") as place:
        directory = Path(place)
        os.environ["TMEM_VM_DIRECTORY"] = str(directory / "vm")
        with Tmemd(directory, capacity=capacity) as tmemd, libvirtd.running():
            yield tmemd
