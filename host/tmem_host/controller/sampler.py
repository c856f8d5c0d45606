"""tmemd's counters and libvirt's statistics → the snapshot a policy decides on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tmem_host.api.types import Vm
from tmem_host.controller.domains import Domain
from tmem_host.policies import Snapshot, VmSample

_REPORT_FRESH_S = 10.0
"""An older report of a guest says nothing about its pressure now."""


class Sampler:
    """Remembers the counters of the last round, to turn totals into what happened since."""

    def __init__(self) -> None:
        self._vms: dict[str, Vm] = {}
        self._domains: Mapping[str, Domain] = {}
        self._at_s: float | None = None

    def sample(
        self, total_bytes: int, vms: Sequence[Vm], running: Mapping[str, Domain], now_s: float
    ) -> Snapshot:
        """The snapshot of now.

        `running` are the domains libvirt sees running. A VM takes part if its domain runs or its guest is
        connected (it need not be libvirt's); others keep their quota and are left out. A VM seen for the
        first time, or whose counters went back because tmemd restarted, counts as having done nothing.
        """
        snapshot = Snapshot(
            total_bytes,
            tuple(self._vm(vm, running.get(vm.name)) for vm in vms if vm.connections or vm.name in running),
            now_s - self._at_s if self._at_s is not None else 0.0,
        )
        self._vms = {vm.name: vm for vm in vms}
        self._domains = running
        self._at_s = now_s
        return snapshot

    def _vm(self, vm: Vm, domain: Domain | None) -> VmSample:
        before = self._vms.get(vm.name)
        domain_before = self._domains.get(vm.name)
        fresh = vm.report is not None and vm.report.age_s < _REPORT_FRESH_S
        return VmSample(
            name=vm.name,
            quota_bytes=vm.quota_bytes,
            used_bytes=vm.stored_bytes,
            puts_accepted=_since(before.puts_accepted if before else None, vm.puts_accepted),
            puts_refused=_since(before.puts_refused if before else None, vm.puts_refused),
            weight=vm.weight,
            min_bytes=vm.min_bytes,
            pinned=vm.pinned,
            frozen=vm.frozen,
            pressure=vm.report.psi_some_avg10 if vm.report and fresh else 0.0,
            memory_bytes=domain.memory_bytes if domain else 0,
            disk_bytes=_since(domain_before.disk_bytes if domain_before else None, domain.disk_bytes)
            if domain
            else 0,
        )


def _since(before: int | None, now: int) -> int:
    return now - before if before is not None and now >= before else 0
