"""`static`: every VM has its weighted share, whether it uses it or not."""

from __future__ import annotations

from dataclasses import dataclass

from tmem_host.policies.share import Claim, by_weight
from tmem_host.policies.snapshot import Decision, Snapshot, Target


@dataclass(frozen=True, slots=True)
class Static:
    """Divide what pinned VMs leave by weight, within guaranteed minimum and cap."""

    def decide(self, snapshot: Snapshot) -> Decision:
        """Weighted shares; they change only when VMs come, go or change their limits."""
        vms = snapshot.unpinned()
        shares = by_weight(
            snapshot.free_to_divide_bytes(), [Claim(vm.weight, vm.min_bytes, vm.cap_bytes) for vm in vms]
        )
        weights = sum(vm.weight for vm in vms)
        return Decision(
            tuple(
                Target(vm.name, share, f"weight {vm.weight} of {weights}")
                for vm, share in zip(vms, shares, strict=True)
            )
        )
