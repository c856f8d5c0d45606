"""VMs as fixtures: images, a `tmemd` they are registered with, and proof that nothing of them is left."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
from tmem_host.api.client import Client
from tmem_host.errors import OperatorError
from tmem_host.vm import disks, images, libvirtd, machine
from tmem_host.vm.machine import Machine
from tmem_host.vm.request import Registration, VmRequest

from framework.daemon import Tmemd

MIB = 1 << 20
BOOT_S = 240.0
"""Generous: an emulated guest on a busy machine."""
COMMAND_S = 60.0
_VM_DIRECTORY = "TMEM_VM_DIRECTORY"
_numbers = count(1)


class Vms:
    """Brings VMs up, registered with one `tmemd`; all are down at the end of the test or module."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self._tmemd: Tmemd | None = None

    @property
    def tmemd(self) -> Tmemd:
        """The daemon, started when it is first asked for."""
        if self._tmemd is None:
            home = self.directory / "d"
            home.mkdir()
            self._tmemd = self._stack.enter_context(Tmemd(home, capacity="256M"))
        return self._tmemd

    def admin(self) -> Client:
        """A client of the daemon."""
        return Client(self.tmemd.admin_socket)

    def up(self, image: str = "mini", *, registered: bool = True, **options: Any) -> Machine:  # noqa: ANN401  # fields of VmRequest
        """A VM of its own name (`name` overrides), 256 MiB unless said otherwise."""
        register = Registration(self.tmemd.admin_socket, quota_bytes=64 * MIB) if registered else None
        defaults: dict[str, Any] = {
            "name": f"t{os.getpid()}-{next(_numbers)}",
            "image": image,
            "memory_bytes": 256 * MIB,
            "register": register,
            "deadline_s": BOOT_S,
        }
        return self._stack.enter_context(machine.up(VmRequest(**(defaults | options)), say))


def say(line: str) -> None:
    """Progress, into pytest's captured output."""
    print(line, file=sys.stderr)


def answers(up: Machine) -> bool:
    """Whether somebody can come in and run something."""
    try:
        with up.ssh() as shell:
            return shell.run("true", deadline_s=COMMAND_S) == 0
    except OperatorError:
        return False


def leftovers(directory: Path) -> list[str]:
    """What of the VMs whose files were in this directory is still there."""
    found = [f"{path}" for path in directory.glob("*/vm.json")]
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if f"{directory}/" in words:
            found.append(f"process {process.pid}: {words[:200]}")
    return found


def _vms() -> Iterator[Vms]:
    if os.geteuid() != 0:
        pytest.fail("VM tests need root: sudo make test")
    directory = Path(tempfile.mkdtemp(prefix="tv-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    before = os.environ.get(_VM_DIRECTORY)
    # For this process and those it starts.
    vm_directory = directory / "vm"
    os.environ[_VM_DIRECTORY] = str(vm_directory)
    try:
        with libvirtd.running():
            with ExitStack() as stack:
                yield Vms(directory, stack)
            assert leftovers(vm_directory) == []
            assert not any(disks.directory(path.name).exists() for path in vm_directory.glob("*/"))
    finally:
        if before is None:
            del os.environ[_VM_DIRECTORY]
        else:
            os.environ[_VM_DIRECTORY] = before
        shutil.rmtree(directory)


@pytest.fixture
def vms(built: Callable[[str], None]) -> Iterator[Vms]:
    """VMs of one test."""
    built("mini")
    yield from _vms()


@pytest.fixture(scope="module")
def module_vms(built: Callable[[str], None]) -> Iterator[Vms]:
    """VMs that the tests of a module share: booting takes most of the time."""
    built("mini")
    yield from _vms()


@pytest.fixture(scope="session")
def built() -> Callable[[str], None]:
    """Builds an image unless it is cached."""

    def build(name: str) -> None:
        images.build(name, progress=say)

    return build
