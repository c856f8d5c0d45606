"""`smart-alloc(P)`: quotas follow refused puts and unused quota.

Source: Garrido, Carpenter et al., "SmarTmem: Intelligent management of transcendent memory in a virtualized
server" (RADR/IPDPSW 2019), the policy called smart-alloc.
"""

from __future__ import annotations

from dataclasses import dataclass

from tmem_host.policies.share import Claim, in_proportion
from tmem_host.policies.snapshot import Decision, Snapshot, Target, VmSample


@dataclass(frozen=True, slots=True)
class SmartAlloc:
    """Grow a VM whose puts are refused, shrink one that leaves quota unused.

    `percent` is P: growth is P % of the total, shrinking P % of the VM's own quota, each per interval.
    `threshold_percent` of the total may stay unused before a VM shrinks.
    """

    percent: float = 6.0
    threshold_percent: float = 5.0

    def decide(self, snapshot: Snapshot) -> Decision:
        """The next quotas; if their sum exceeds what there is, all are scaled down in proportion."""
        vms = snapshot.unpinned()
        wanted = [self._wanted(vm, snapshot.total_bytes) for vm in vms]
        fitted = in_proportion(
            snapshot.free_to_divide_bytes(),
            [
                Claim(quota_bytes, vm.min_bytes, vm.cap_bytes)
                for vm, (quota_bytes, _) in zip(vms, wanted, strict=True)
            ],
        )
        return Decision(
            tuple(
                Target(
                    vm.name, share, reason if share >= quota_bytes else f"{reason}; scaled to fit the total"
                )
                for vm, (quota_bytes, reason), share in zip(vms, wanted, fitted, strict=True)
            )
        )

    def _wanted(self, vm: VmSample, total_bytes: int) -> tuple[int, str]:
        if vm.puts_refused and not vm.frozen:
            step_bytes = int(total_bytes * self.percent / 100)
            return vm.quota_bytes + step_bytes, f"{vm.puts_refused} puts refused"
        unused_bytes = vm.quota_bytes - vm.used_bytes
        if unused_bytes > total_bytes * self.threshold_percent / 100:
            # Not below what it uses: what it has stored it may need, and persistent pages cannot be evicted.
            smaller_bytes = max(int(vm.quota_bytes * (1 - self.percent / 100)), vm.used_bytes)
            return smaller_bytes, "leaves quota unused"
        return vm.quota_bytes, "unchanged"
