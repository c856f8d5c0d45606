"""Starts a VM that is recorded: key, disks, transport, registration, domain; and waits for it."""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable
from pathlib import Path

import libvirt
import msgspec

from tmem_host.api.client import Client
from tmem_host.api.types import Cid, VmSpec
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm import console, disks, domain, libvirtd, readiness, ssh, state, tsc
from tmem_host.vm.images import Image
from tmem_host.vm.initramfs import Archive
from tmem_host.vm.kvm import Virt
from tmem_host.vm.readiness import NOTIFY_PORT
from tmem_host.vm.request import Registration, VmRequest
from tmem_host.vm.state import VmState
from tmem_host.vm.transport import Transport

Progress = Callable[[str], None]

KEY_FILE = "ssh_key"
_CMDLINE = "console=ttyS0 quiet loglevel=4 audit=0 apparmor=0 selinux=0 random.trust_cpu=on"
# An emulated CPU has nothing to leak to; timers and watchdogs misfire when the emulator is scheduled away.
_CMDLINE_TCG = "mitigations=off nokaslr tsc=reliable no_timer_check nowatchdog"


def launch(
    request: VmRequest, image: Image, recorded: VmState, deadline: float, progress: Progress
) -> VmState:
    """Start the VM and wait for what the request wants, until `deadline` (of the monotonic clock).

    Returns the record, completed. Raises OperatorError; the caller tears down.
    """
    link = state.transport(recorded)
    directory = state.directory(request.name)
    public_key = ssh.make_key(directory / KEY_FILE)
    made = disks.make(request.name, image, request.data_limits, request.disk_cache)
    initrd = _make_initrd(request, image, directory)
    if request.register is not None:
        _register(request.register, link)
    recorded = msgspec.structs.replace(recorded, device=link.start())
    state.save(recorded)
    progress(f"VM {request.name}: starting on {recorded.virt.upper()} ({recorded.virt_reason}), {link.name}")
    with link.listen(NOTIFY_PORT) as notifications, libvirtd.connection() as connection:
        described = domain.Domain(
            name=request.name,
            virt=recorded.virt,
            memory_bytes=request.memory_bytes,
            cpus=request.cpus,
            kernel=image.kernel,
            initrd=initrd,
            cmdline=_cmdline(request, image, recorded.virt, public_key),
            disks=made,
            transport=link,
            console=console.path(directory),
            registered=request.register is not None,
            security_models=libvirtd.security_models(connection),
            credentials=_credentials(image, public_key),
        )
        _create(connection, described)
        wait = request.wait or ("agent" if image.has_agent else "ready")
        if wait != "nothing":
            readiness.wait_for_ready(recorded, notifications, connection, deadline)
        if wait == "agent" and request.register is not None:
            readiness.wait_for_agent(recorded, request.register.admin_socket, connection, deadline)
    return recorded


def _make_initrd(request: VmRequest, image: Image, directory: Path) -> Path:
    """The image's archive, tmem's programs, and the request's files, one after the other."""
    target = directory / "initrd"
    files = Archive()
    for path, data in request.files.items():
        files.file(path if image.root is None else f"/layer{path}", data)
    with target.open("wb") as out:
        for part in (image.initrd, image.layer):
            if part is not None:
                out.write(part.read_bytes())
        files.write(out)
    return target


def _cmdline(request: VmRequest, image: Image, virt: Virt, public_key: str) -> str:
    words = [_CMDLINE, f"tmem.hostname={request.name}"]
    if virt == "tcg":
        words.append(_CMDLINE_TCG)
        if frequency_khz := tsc.frequency_khz():
            words.append(f"tsc_early_khz={frequency_khz}")
    if image.root is None:
        encoded = base64.b64encode(public_key.encode()).decode()
        words += [f"tmem.notify_port={NOTIFY_PORT}", f"tmem.ssh_key={encoded}"]
    else:
        words.append("systemd.show_status=0")
    return " ".join([*words, request.cmdline]).strip()


def _credentials(image: Image, public_key: str) -> dict[str, str]:
    if image.root is None:
        return {}
    plain = {
        "ssh.authorized_keys.root": public_key + "\n",
        "vmm.notify_socket": f"vsock-stream:{socket.VMADDR_CID_HOST}:{NOTIFY_PORT}",
    }
    return {name: base64.b64encode(value.encode()).decode() for name, value in plain.items()}


def _register(registration: Registration, link: Transport) -> None:
    built_in = link.name == "vhost-user"
    spec = VmSpec(
        cid=Cid(link.cid) if link.name == "vhost-vsock" else None,
        hybrid_socket=str(link.hybrid_socket) if link.hybrid_socket else None,
        vhost_user_socket=str(link.vhost_user_socket) if built_in else None,
        guest_cid=Cid(link.cid) if built_in else None,
        quota_bytes=registration.quota_bytes,
        min_bytes=registration.min_bytes,
        weight=registration.weight,
        persistent_max_bytes=registration.persistent_max_bytes,
        pinned=registration.pinned,
    )
    with Client(registration.admin_socket) as client:
        client.add_vm(link.vm, spec)


def _create(connection: libvirt.virConnect, described: domain.Domain) -> None:
    try:
        connection.createXML(domain.to_xml(described), 0)
    except libvirt.libvirtError as error:
        raise OperatorError(
            f"libvirt does not start it: {error}",
            vm=described.name,
            hint=f"see /var/log/libvirt/qemu/{described.name}.log",
            code=ExitCode.FAILED,
        ) from error
