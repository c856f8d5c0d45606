"""What `tmemctl doctor` looks at. Every check returns a result; none raises, none changes anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from tmem_host.cli.context import Context
from tmem_host.errors import OperatorError
from tmem_host.units import format_size

_GIB = 1 << 30
_QEMU = "qemu-system-x86_64"


class Result(msgspec.Struct, frozen=True):
    """What a check found."""

    state: Literal["ok", "warn", "fail"]
    name: str
    found: str
    hint: str = ""


Check = Callable[[Context], Result]


def run_all(context: Context) -> list[Result]:
    """All checks, in the order in which their subjects are needed."""
    return [_guarded(name, check, context) for name, check in CHECKS.items()]


def _guarded(name: str, check: Check, context: Context) -> Result:
    try:
        return check(context)
    except OperatorError as error:
        return Result("fail", name, error.message, error.hint)
    except OSError as error:
        return Result("fail", name, str(error))


def _root(context: Context) -> Result:
    del context
    if os.geteuid() == 0:
        return Result("ok", "root", "yes")
    return Result(
        "fail", "root", f"no, user {os.geteuid()}", "sudo: VMs, images and the admin socket need root"
    )


def _virtualization(context: Context) -> Result:
    from tmem_host.vm import kvm  # noqa: PLC0415

    del context
    probed = kvm.probe()
    if probed.virt == "kvm":
        return Result("ok", "virtualization", f"KVM: {probed.reason}")
    return Result(
        "warn",
        "virtualization",
        f"TCG: {probed.reason}, about ten times slower",
        "a host, or a VM with nested virtualization, that has KVM",
    )


def _vsock(context: Context) -> Result:
    from tmem_host.vm import transport  # noqa: PLC0415

    del context
    name, reason = transport.choose("auto")
    if name == "vhost-device-vsock":
        program = transport.find_program()
        return Result(
            "ok", "vsock", f"{name} ({program}): {reason}", "modprobe vhost_vsock, if the kernel has it"
        )
    return Result("ok", "vsock", f"{name}: {reason}")


def _qemu(context: Context) -> Result:
    del context
    if shutil.which(_QEMU) is None:
        return Result("fail", "qemu", f"no {_QEMU}", "apt-get install qemu-system-x86 qemu-utils")
    version = subprocess.run([_QEMU, "--version"], capture_output=True, text=True, check=False, timeout=20)
    lines = version.stdout.splitlines()
    return Result("ok", "qemu", lines[0] if lines else "does not tell its version")


def _libvirt(context: Context) -> Result:
    import libvirt  # noqa: PLC0415

    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # what is raised is not printed as well
    try:
        connection = libvirt.open(context.libvirt_uri)
    except libvirt.libvirtError as error:
        if shutil.which("libvirtd") is None and shutil.which("virtqemud") is None:
            return Result("fail", "libvirt", "not installed", "apt-get install libvirt-daemon-system")
        return Result(
            "warn",
            "libvirt",
            f"not running: {' '.join(str(error.get_error_message()).split())}",
            "systemctl start libvirtd; `tmemctl vm up` and the demo start it where no init system does",
        )
    version = connection.getLibVersion()
    number = f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"
    found = f"{number} on {context.libvirt_uri}, {connection.numOfDomains()} domains run"
    connection.close()
    return Result("ok", "libvirt", found)


def _fuse(context: Context) -> Result:
    del context
    if not Path("/dev/fuse").exists():
        return Result(
            "warn", "fuse", "no /dev/fuse", "modprobe fuse; only tests without VMs need it on the host"
        )
    return Result("ok", "fuse", "/dev/fuse")


def _images(context: Context) -> Result:
    from tmem_host.vm import images  # noqa: PLC0415

    del context
    found = images.list_images()
    line = ", ".join(f"{each.name} {'built' if each.built else 'not built'}" for each in found)
    line = f"{line} in {images.cache_directory()}"
    if any(each.built for each in found):
        return Result("ok", "images", line)
    return Result("warn", "images", line, "tmemctl image build debian")


def _tmemd(context: Context) -> Result:
    with context.client() as client:
        try:
            status = client.status()
        except OperatorError as error:
            return Result("warn", "tmemd", error.message, error.hint)
    return Result(
        "ok",
        "tmemd",
        f"{status.version}, {format_size(status.used_bytes)} of {format_size(status.capacity_bytes)} lent "
        f"to {status.vms} VMs",
    )


def _disk(context: Context) -> Result:
    from tmem_host.vm import images  # noqa: PLC0415

    del context
    path = images.cache_directory()
    while not path.exists():
        path = path.parent
    free_bytes = shutil.disk_usage(path).free
    if free_bytes < 6 * _GIB:
        return Result(
            "warn", "disk", f"{format_size(free_bytes)} free at {path}", "6 GiB: images and the disks of VMs"
        )
    return Result("ok", "disk", f"{format_size(free_bytes)} free at {path}")


def _memory(context: Context) -> Result:
    import psutil  # noqa: PLC0415

    del context
    memory = psutil.virtual_memory()
    found = f"{format_size(memory.available)} of {format_size(memory.total)} available"
    if memory.available < 2 * _GIB:
        return Result("warn", "memory", found, "2 GiB: two small VMs and what they keep at the host")
    return Result("ok", "memory", found)


CHECKS: dict[str, Check] = {
    "root": _root,
    "virtualization": _virtualization,
    "vsock": _vsock,
    "qemu": _qemu,
    "libvirt": _libvirt,
    "fuse": _fuse,
    "images": _images,
    "tmemd": _tmemd,
    "disk": _disk,
    "memory": _memory,
}
