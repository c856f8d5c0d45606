"""A VM as it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tmem_host.api.client import ADMIN_SOCKET
from tmem_host.vm.domain import DiskCache, DiskLimits
from tmem_host.vm.transport import TransportChoice

WaitFor = Literal["nothing", "ready", "agent"]
_UNLIMITED = DiskLimits()


@dataclass(frozen=True)
class Registration:
    """How the VM is made known to tmemd (see `tmem_host.api.types.VmSpec`)."""

    admin_socket: Path = ADMIN_SOCKET
    quota_bytes: int | None = None
    min_bytes: int = 0
    weight: int = 100
    persistent_max_bytes: int | None = None
    pinned: bool = False


@dataclass(frozen=True)
class VmRequest:
    """A VM as it is asked for."""

    name: str
    image: str = "debian"
    memory_bytes: int = 512 << 20
    cpus: int = 1
    cid: int | None = None
    """`None`: a free one."""
    transport: TransportChoice = "auto"
    virt: Literal["auto", "kvm", "tcg"] = "auto"
    register: Registration | None = field(default_factory=Registration)
    """`None`: tmemd does not hear of it."""
    wait: WaitFor | None = None
    """What `up` waits for; `None`: the agent if there is one and the VM is registered, else readiness."""
    deadline_s: float = 180.0
    """For all of `up`, building the image aside."""
    data_limits: DiskLimits = _UNLIMITED
    disk_cache: DiskCache | None = None
    """What the host's page cache does for all disks; `None`: nothing for the data disk, all for others."""
    cmdline: str = ""
    """More words for the kernel's command line."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files to put into the guest before it starts, by absolute path; /etc/tmem/agent.toml for instance."""
