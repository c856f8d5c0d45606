"""A VM as libvirt's XML. Pure: what goes in decides what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as Xml

from tmem_host.vm.kvm import Virt
from tmem_host.vm.transport import Transport

_QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
_TMEM_NAMESPACE = "https://tmem.invalid/vm/1"
Xml.register_namespace("qemu", _QEMU_NAMESPACE)
Xml.register_namespace("tmem", _TMEM_NAMESPACE)


@dataclass(frozen=True)
class DiskLimits:
    """What a disk may do in a second; `None` is unlimited. This is how a fast disk is made slow.

    libvirt takes either a total or one limit for each direction, not both.
    """

    read_iops: int | None = None
    write_iops: int | None = None
    read_bytes: int | None = None
    write_bytes: int | None = None
    total_iops: int | None = None
    total_bytes: int | None = None

    def iotune(self) -> dict[str, int]:
        """The limits as libvirt names them; zero is unlimited."""
        return {
            "total_bytes_sec": self.total_bytes or 0,
            "read_bytes_sec": self.read_bytes or 0,
            "write_bytes_sec": self.write_bytes or 0,
            "total_iops_sec": self.total_iops or 0,
            "read_iops_sec": self.read_iops or 0,
            "write_iops_sec": self.write_iops or 0,
        }


_DEAR_WHEN_EMULATED = ("la57", "erms", "fsrm")
"""What an emulated CPU had better not offer. A fifth level of page tables makes every TLB miss dearer. "Fast"
`rep movsb` and `stosb` make guests copy and clear memory by the byte, each of which QEMU emulates: copying a
page takes four times as long as by words."""

DiskCache = Literal["unsafe", "none", "writeback"]
"""What the host's page cache does for a disk, in QEMU's words: `unsafe` is a cache that ignores flushes, for
disks that do not outlive their VM; `none` is no cache, so that the disk costs what a disk costs."""


@dataclass(frozen=True)
class Disk:
    """A virtio-blk disk, in the order in which the guest sees them: vda, vdb, …"""

    path: Path
    format: str = "qcow2"
    cache: DiskCache = "unsafe"
    limits: DiskLimits = DiskLimits()


@dataclass(frozen=True)
class Domain:
    """Everything a domain's XML says."""

    name: str
    virt: Virt
    memory_bytes: int
    cpus: int
    kernel: Path
    initrd: Path
    cmdline: str
    disks: tuple[Disk, ...]
    transport: Transport
    console: Path
    registered: bool
    """Whether it is known to tmemd: the controller registers what its metadata calls a tmem VM."""
    security_models: tuple[str, ...] = ()
    """Those of the host's libvirt: `dac`, `apparmor`, `selinux`."""
    credentials: dict[str, str] = field(default_factory=dict)
    """systemd credentials of the guest; values are base64."""


def to_xml(domain: Domain) -> str:
    """The XML for `virDomainCreateXML`."""
    root = Xml.Element("domain", type="kvm" if domain.virt == "kvm" else "qemu")
    _add(root, "name", domain.name)
    if domain.registered:
        place = {"cid": str(domain.transport.cid)}
        if domain.transport.hybrid_socket is not None:
            place["hybrid-socket"] = str(domain.transport.hybrid_socket)
        _add(_add(root, "metadata"), f"{{{_TMEM_NAMESPACE}}}vm", **place)
    _add(root, "memory", str(domain.memory_bytes), unit="b")
    _add(root, "vcpu", str(domain.cpus))
    # vhost-user devices reach into the guest's memory, so it is a shared memfd.
    backing = _add(root, "memoryBacking")
    _add(backing, "source", type="memfd")
    _add(backing, "access", mode="shared")
    _add_boot(root, domain)
    _add_cpu(root, domain.virt)
    _add(root, "on_crash", "destroy")
    devices = _add(root, "devices")
    # Devices libvirt adds unasked, each a probe at boot.
    _add(devices, "controller", type="usb", model="none")
    _add(devices, "memballoon", model="none")
    for index, disk in enumerate(domain.disks):
        _add_disk(devices, disk, f"vd{chr(ord('a') + index)}")
    serial = _add(devices, "serial", type="file")
    _add(serial, "source", path=str(domain.console))
    _add(serial, "target", port="0")
    _add_vsock(root, devices, domain.transport)
    _add_security(root, domain.security_models)
    return Xml.tostring(root, encoding="unicode")


def _add(parent: Xml.Element, tag: str, text: str | None = None, **attributes: str) -> Xml.Element:
    element = Xml.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _add_boot(root: Xml.Element, domain: Domain) -> None:
    os = _add(root, "os")
    _add(os, "type", "hvm", arch="x86_64", machine="q35")
    _add(os, "kernel", str(domain.kernel))
    _add(os, "initrd", str(domain.initrd))
    _add(os, "cmdline", domain.cmdline)
    if domain.credentials:
        _add(os, "smbios", mode="sysinfo")
        strings = _add(_add(root, "sysinfo", type="smbios"), "oemStrings")
        for name, value in domain.credentials.items():
            _add(strings, "entry", f"io.systemd.credential.binary:{name}={value}")


def _add_cpu(root: Xml.Element, virt: Virt) -> None:
    features = _add(root, "features")
    _add(features, "acpi")
    _add(features, "apic")
    if virt == "kvm":
        _add(root, "cpu", mode="host-passthrough")
    else:
        cpu = _add(root, "cpu", mode="maximum")
        for name in _DEAR_WHEN_EMULATED:
            _add(cpu, "feature", policy="disable", name=name)
    clock = _add(root, "clock", offset="utc")
    _add(clock, "timer", name="hpet", present="no")


def _add_disk(devices: Xml.Element, disk: Disk, target: str) -> None:
    element = _add(devices, "disk", type="file", device="disk")
    cache = {"cache": disk.cache} | ({"io": "native"} if disk.cache == "none" else {})
    _add(element, "driver", name="qemu", type=disk.format, discard="unmap", **cache)
    _add(element, "source", file=str(disk.path))
    _add(element, "target", dev=target, bus="virtio")
    wanted = disk.limits.iotune()
    if any(wanted.values()):
        tune = _add(element, "iotune")
        for name, value in wanted.items():
            if value:
                _add(tune, name, str(value))


def _add_vsock(root: Xml.Element, devices: Xml.Element, transport: Transport) -> None:
    if transport.vhost_user_socket is None:
        vsock = _add(devices, "vsock", model="virtio")
        _add(vsock, "cid", auto="no", address=str(transport.cid))
        return
    # libvirt has no element for vhost-user-vsock, and does not know of the slot: one that it would use last.
    # The port of its own lets the device be unplugged.
    command = _add(root, f"{{{_QEMU_NAMESPACE}}}commandline")
    for argument in (
        "-chardev",
        f"socket,id=tmem-vsock,path={transport.vhost_user_socket}",
        "-device",
        "pcie-root-port,id=tmem-port,bus=pcie.0,addr=0x1e,chassis=64",
        "-device",
        "vhost-user-vsock-pci,id=tmem-vsock0,bus=tmem-port,chardev=tmem-vsock",
    ):
        _add(command, f"{{{_QEMU_NAMESPACE}}}arg", value=argument)


def _add_security(root: Xml.Element, models: tuple[str, ...]) -> None:
    # QEMU must reach the sockets and disks of the VM's directory, which are root's; the host's own
    # configuration of libvirt stays as it is.
    for model in models:
        if model == "dac":
            label = _add(root, "seclabel", type="static", model="dac", relabel="no")
            _add(label, "label", "+0:+0")
        elif model != "none":
            _add(root, "seclabel", type="none", model=model)
