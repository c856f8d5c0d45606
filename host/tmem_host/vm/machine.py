"""VMs: up, down, list. What a VM owns is recorded before it is made, so that `down` always finds it."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.etree import ElementTree as Xml

import libvirt

from tmem_host.api.client import Client
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm import console, disks, images, kvm, libvirtd, process, readiness, ssh, state, transport
from tmem_host.vm.domain import DiskLimits
from tmem_host.vm.images import Image
from tmem_host.vm.kvm import Virt
from tmem_host.vm.launch import KEY_FILE, Progress, launch
from tmem_host.vm.request import Registration, VmRequest
from tmem_host.vm.ssh import GuestShell
from tmem_host.vm.state import VmState

__all__ = [
    "BlockStats",
    "DiskLimits",
    "Machine",
    "MachineInfo",
    "Registration",
    "VmRequest",
    "down",
    "get",
    "list_machines",
    "up",
]

_SECTOR_BYTES = 512
_CONNECT_TIMEOUT_S = 20.0
_SHUTDOWN_POLL_S = 0.1


@dataclass(frozen=True)
class BlockStats:
    """What a VM's disks did since it started, in sectors of 512 bytes."""

    sectors_read: int
    sectors_written: int
    reads: int
    writes: int


class Machine:
    """A VM that is up. As a context manager it is brought down at the end of the block."""

    def __init__(self, recorded: VmState) -> None:
        self.state = recorded
        self.name = recorded.name
        self.directory = state.directory(recorded.name)
        self.transport = state.transport(recorded)

    def __enter__(self) -> Self:
        """Return the machine itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def down(self) -> None:
        """Power off at once, unregister, remove everything. Nothing happens if it is down."""
        with contextlib.suppress(_NotFoundError):
            down(self.name)

    def running(self) -> bool:
        """Whether QEMU runs."""
        with libvirtd.connection() as connection:
            return libvirtd.find(connection, self.name) is not None

    def ssh(self) -> GuestShell:
        """A shell in the guest. UNAVAILABLE or TIMEOUT if it does not answer."""
        stream = self.transport.connect(ssh.PORT, _CONNECT_TIMEOUT_S)
        return GuestShell(stream, self.directory / KEY_FILE, self.state.host_key, self.name)

    def ssh_command(self, *command: str) -> list[str]:
        """The argv of OpenSSH's client for a person at a terminal."""
        proxy = f"{sys.executable} -m tmem_host.vm.proxy {self.name} {ssh.PORT}"
        known = self.directory / "known_hosts"
        known.write_text(f"{self.name} {self.state.host_key}\n")
        options = [f"ProxyCommand={proxy}", f"UserKnownHostsFile={known}", "StrictHostKeyChecking=yes"]
        argv = ["ssh", "-q", "-i", str(self.directory / KEY_FILE)]
        for option in options:
            argv += ["-o", option]
        return [*argv, f"root@{self.name}", *command]

    def block_stats(self) -> BlockStats:
        """What its disks did, all together, as QEMU counts it."""
        with libvirtd.connection() as connection:
            found = _need(connection, self.name)
            counters = [found.blockStats(target) for target in _disk_targets(found)]
        reads, read_bytes, writes, written_bytes, _ = (sum(column) for column in zip(*counters, strict=True))
        return BlockStats(read_bytes // _SECTOR_BYTES, written_bytes // _SECTOR_BYTES, reads, writes)

    def set_disk_limits(self, limits: DiskLimits) -> None:
        """Change what its data disk, the last one, may do in a second, at once."""
        with libvirtd.connection() as connection:
            found = _need(connection, self.name)
            target = _disk_targets(found)[-1]
            found.setBlockIoTune(target, limits.iotune(), libvirt.VIR_DOMAIN_AFFECT_LIVE)

    def console(self, count: int = 15) -> list[str]:
        """The last lines of its console."""
        return console.last_lines(self.directory, count)

    def wait_until_down(self, deadline_s: float) -> None:
        """Wait until the guest has powered off by itself. TIMEOUT."""
        deadline = time.monotonic() + deadline_s
        while self.running():
            if time.monotonic() > deadline:
                raise readiness.late(self.state, f"the guest has not powered off within {deadline_s:g} s")
            threading.Event().wait(_SHUTDOWN_POLL_S)


class _NotFoundError(OperatorError):
    """No such VM: for callers to whom that is fine."""


@dataclass(frozen=True)
class MachineInfo:
    """A line of the list of VMs."""

    state: VmState
    running: bool


def up(request: VmRequest, progress: Progress = lambda _: None) -> Machine:
    """Bring a VM up and wait until it is ready; whatever fails, nothing of it is left.

    Raises OperatorError: NOT_FOUND (image unknown or not built), CONFLICT (name or CID taken), UNAVAILABLE
    (libvirtd, tmemd or the transport missing), TIMEOUT (not ready; the message has the last console lines).
    """
    state.check_name(request.name)
    image = images.get(request.image)
    with contextlib.ExitStack() as undo:
        undo.callback(libvirtd.stop_if_idle)
        with libvirtd.in_use():
            recorded = _claim(request, image)
            undo.callback(_tear_down, recorded)
            started = time.monotonic()
            recorded = launch(request, image, recorded, started + request.deadline_s, progress)
        undo.pop_all()
    progress(f"VM {request.name} is up after {time.monotonic() - started:.1f} s")
    return Machine(recorded)


def down(name: str) -> None:
    """Power a VM off at once and remove everything it had. NOT_FOUND if there is none; PRIVILEGE."""
    try:
        recorded = state.load(name)
    except OperatorError as error:
        if error.code is not ExitCode.NOT_FOUND:
            raise
        raise _NotFoundError(error.message, hint=error.hint, vm=error.vm, code=error.code) from error
    libvirtd.check_permission()
    _tear_down(recorded)
    libvirtd.stop_if_idle()


def get(name: str) -> Machine:
    """A VM that is up, by name. NOT_FOUND."""
    return Machine(state.load(name))


def list_machines() -> list[MachineInfo]:
    """All VMs that were brought up and not down, by name."""
    recorded = state.every()
    active: set[str] = set()
    if recorded:
        with contextlib.suppress(OperatorError), libvirtd.connection() as connection:
            active = {
                found.name() for found in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            }
    return [MachineInfo(one, one.name in active) for one in recorded]


def _claim(request: VmRequest, image: Image) -> VmState:
    """Take the name and a CID, and record the VM."""
    virt, reason = _virt(request)
    chosen, _ = transport.choose(request.transport, registered=request.register is not None)
    with state.exclusive(), libvirtd.connection() as connection:
        others = state.every()
        if libvirtd.find(connection, request.name) or any(other.name == request.name for other in others):
            raise OperatorError(
                "there is a VM of that name",
                vm=request.name,
                hint=f"tmemctl vm down {request.name}, or another name",
                code=ExitCode.CONFLICT,
            )
        taken = {other.cid: other.name for other in others}
        cid = state.choose_cid(request.cid, taken)
        state.directory(request.name).mkdir(parents=True, exist_ok=True)
        recorded = VmState(
            name=request.name,
            image=image.name,
            cid=cid,
            memory_bytes=request.memory_bytes,
            cpus=request.cpus,
            virt=virt,
            virt_reason=reason,
            transport=chosen,
            host_key=image.host_key,
            admin_socket=str(request.register.admin_socket) if request.register else None,
        )
        state.save(recorded)
    return recorded


def _virt(request: VmRequest) -> tuple[Virt, str]:
    probe = kvm.probe()
    if request.virt == "kvm" and probe.virt != "kvm":
        raise OperatorError(f"no KVM: {probe.reason}", vm=request.name, code=ExitCode.UNAVAILABLE)
    return (probe.virt, probe.reason) if request.virt == "auto" else (request.virt, "as asked for")


def _need(connection: libvirt.virConnect, name: str) -> libvirt.virDomain:
    found = libvirtd.find(connection, name)
    if found is None:
        raise OperatorError("it is not running", vm=name, code=ExitCode.UNAVAILABLE)
    return found


def _disk_targets(found: libvirt.virDomain) -> list[str]:
    description = Xml.fromstring(found.XMLDesc())  # noqa: S314  # libvirt's own
    return [target.get("dev", "") for target in description.iterfind("devices/disk/target")]


def _tear_down(recorded: VmState) -> None:
    """Undo all there may be of a VM; every step is tried."""
    with contextlib.suppress(OperatorError):
        recorded = state.load(recorded.name)  # a device may have been recorded since
    with contextlib.ExitStack() as steps:
        steps.callback(state.remove, recorded)
        steps.callback(disks.remove, recorded.name)
        if recorded.device is not None:
            steps.callback(process.end, recorded.device)
        if recorded.admin_socket is not None:
            steps.callback(_unregister, recorded)
        steps.callback(_destroy, recorded.name)


def _destroy(name: str) -> None:
    with contextlib.suppress(OperatorError), libvirtd.connection() as connection:
        found = libvirtd.find(connection, name)
        if found is not None:
            with contextlib.suppress(libvirt.libvirtError):  # it ended by itself just now
                found.destroy()


def _unregister(recorded: VmState) -> None:
    # A tmemd that is gone has forgotten the VM, or forgets it when it starts without it in its configuration.
    with contextlib.suppress(OperatorError), Client(Path(recorded.admin_socket or "")) as client:
        client.remove_vm(recorded.name)
