"""Quota policies: pure functions of a snapshot, without I/O and without a clock.

| module | what |
|---|---|
| `snapshot` | what a policy sees (`Snapshot`, `VmSample`) and answers (`Decision`), the `Policy` protocol |
| `share` | dividing bytes: by weight, or scaled in proportion, within floors and caps |
| `static`, `greedy`, `smart_alloc` | the policies |
| `catalogue` | names and parameters as operators write them → a policy |
| `replay` | runs a policy over a recorded or made-up trace of demands |

Every policy leaves pinned VMs alone; all but `greedy` keep the sum of quotas within the total.
"""

from tmem_host.policies.catalogue import PolicyError, describe, make, names
from tmem_host.policies.snapshot import Decision, Policy, Snapshot, Target, VmSample

__all__ = ["Decision", "Policy", "PolicyError", "Snapshot", "Target", "VmSample", "describe", "make", "names"]
