"""What a policy sees and what it answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class VmSample:
    """One VM during the last interval. Byte counts are bytes of host memory."""

    name: str
    quota_bytes: int
    used_bytes: int
    puts_accepted: int = 0
    """Pages taken since the last snapshot."""
    puts_refused: int = 0
    """Pages refused since the last snapshot, for whatever reason."""
    weight: int = 1
    """Its share relative to other VMs; 0 gets the guaranteed minimum only."""
    min_bytes: int = 0
    """Guaranteed: no policy goes below it while the total allows."""
    cap_bytes: int | None = None
    """No policy goes above it."""
    pinned: bool = False
    """An administrator set its quota: policies leave it alone."""
    frozen: bool = False
    """Its puts are refused whatever its quota: a refusal says nothing about need."""
    pressure: float = 0.0
    """Percent of time some task of the guest waited for memory (PSI, 10 s), as the guest says."""
    memory_bytes: int = 0
    """The guest's own memory, as libvirt says; 0 if it is not libvirt's."""
    disk_bytes: int = 0
    """Read and written by all its disks since the last snapshot, as libvirt says."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All VMs registered with tmemd, as seen at one moment."""

    total_bytes: int
    """Host memory that tmemd may use for pages."""
    vms: tuple[VmSample, ...]
    interval_s: float = 1.0
    """Seconds since the snapshot before this one: what the VMs' put counts cover."""

    def free_to_divide_bytes(self) -> int:
        """What is left of the total for VMs that are not pinned."""
        return max(0, self.total_bytes - sum(vm.quota_bytes for vm in self.vms if vm.pinned))

    def unpinned(self) -> tuple[VmSample, ...]:
        """The VMs a policy may decide about."""
        return tuple(vm for vm in self.vms if not vm.pinned)


@dataclass(frozen=True, slots=True)
class Target:
    """The quota a VM should have from now on, and why."""

    vm: str
    quota_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """One target for each VM of the snapshot that is not pinned."""

    targets: tuple[Target, ...]

    def __iter__(self) -> Iterator[Target]:
        return iter(self.targets)

    def quotas(self) -> dict[str, int]:
        """Quota in bytes by VM name."""
        return {target.vm: target.quota_bytes for target in self.targets}


class Policy(Protocol):
    """A pure function of a snapshot; equal snapshots give equal decisions."""

    def decide(self, snapshot: Snapshot) -> Decision:
        """The quotas to have until the next snapshot."""
        ...
