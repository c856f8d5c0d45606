"""`greedy`: no targets. First come, first served, as in Xen without a memory manager."""

from __future__ import annotations

from dataclasses import dataclass

from tmem_host.policies.snapshot import Decision, Snapshot, Target


@dataclass(frozen=True, slots=True)
class Greedy:
    """Every VM may use the whole total (up to its cap); the store refuses puts when the total is used up."""

    def decide(self, snapshot: Snapshot) -> Decision:
        """The same for every VM; the sum exceeds the total on purpose."""
        total_bytes = snapshot.total_bytes
        return Decision(
            tuple(
                Target(
                    vm.name,
                    total_bytes if vm.cap_bytes is None else min(total_bytes, vm.cap_bytes),
                    "may use the total",
                )
                for vm in snapshot.unpinned()
            )
        )
