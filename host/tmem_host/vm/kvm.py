"""Whether this host can run stock guests on KVM."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Virt = Literal["kvm", "tcg"]

_GET_API_VERSION = 0xAE00
"""KVM_GET_API_VERSION of <linux/kvm.h>; 12 for ever."""
_API_VERSION = 12


@dataclass(frozen=True)
class Probe:
    """What to run guests on, and why."""

    virt: Virt
    reason: str


def probe(device: Path = Path("/dev/kvm"), cpuinfo: Path = Path("/proc/cpuinfo")) -> Probe:
    """Find out what guests can run on.

    A `/dev/kvm` alone proves nothing: without the CPU's virtualisation extension (flag `vmx` or `svm`), stock
    guests hang at boot. So both are asked for, and KVM must answer.
    """
    flags = _cpu_flags(cpuinfo)
    if not flags & {"vmx", "svm"}:
        there = f"{device} exists, but " if device.exists() else ""
        return Probe("tcg", f"{there}the CPU offers neither vmx nor svm, so guests are emulated")
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return Probe("tcg", f"{device}: {error.strerror}, so guests are emulated")
    try:
        version = fcntl.ioctl(descriptor, _GET_API_VERSION)
    except OSError as error:
        return Probe("tcg", f"{device} does not answer ({error.strerror}), so guests are emulated")
    finally:
        os.close(descriptor)
    if version != _API_VERSION:
        return Probe(
            "tcg", f"{device} speaks API version {version}, not {_API_VERSION}, so guests are emulated"
        )
    return Probe("kvm", f"{device} works")


def _cpu_flags(cpuinfo: Path) -> set[str]:
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()
