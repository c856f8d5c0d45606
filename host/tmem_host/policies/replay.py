"""Runs a policy over a trace of demands, to compare policies without VMs.

The model of a VM is the simplest that shows a policy's behaviour: each interval it wants some number of bytes
at the host; it gets what its quota allows (and the total, first come first served), and every page beyond is
one refused put.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from tmem_host.policies.snapshot import Decision, Policy, Snapshot, VmSample

_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Step:
    """One interval: what the policy saw and what it decided."""

    snapshot: Snapshot
    decision: Decision

    def refused_puts(self) -> int:
        """Puts refused in this interval, all VMs together."""
        return sum(vm.puts_refused for vm in self.snapshot.vms)


def replay(policy: Policy, start: Snapshot, demands: Iterable[Mapping[str, int]]) -> Iterator[Step]:
    """Yield one step for each element of `demands` (bytes wanted by VM name; a VM left out wants nothing)."""
    snapshot = start
    for demand in demands:
        left_bytes = snapshot.total_bytes
        seen: list[VmSample] = []
        for vm in snapshot.vms:
            wanted_bytes = demand.get(vm.name, 0)
            used_bytes = min(wanted_bytes, vm.quota_bytes, left_bytes)
            left_bytes -= used_bytes
            accepted = max(0, used_bytes - vm.used_bytes) // _PAGE_BYTES
            refused = (wanted_bytes - used_bytes) // _PAGE_BYTES
            seen.append(replace(vm, used_bytes=used_bytes, puts_accepted=accepted, puts_refused=refused))
        snapshot = replace(snapshot, vms=tuple(seen))
        decision = policy.decide(snapshot)
        yield Step(snapshot, decision)
        quotas = decision.quotas()
        snapshot = replace(
            snapshot,
            vms=tuple(replace(vm, quota_bytes=quotas.get(vm.name, vm.quota_bytes)) for vm in seen),
        )
