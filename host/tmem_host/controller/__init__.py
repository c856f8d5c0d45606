"""`tmem-controller`: follows libvirt and tmemd, and moves quota between running VMs once a second.

| module | what |
|---|---|
| `main` | the program: options, signals, readiness, the one-line log |
| `loop` | one round: collect → decide → apply, and what happens when a part of it fails |
| `domains` | which domains run, from libvirt's events and statistics, in a thread of its own |
| `metadata` | what a domain's XML says about tmem |
| `registrar` | registers running domains with tmemd, releases the pages of stopped ones |
| `sampler` | tmemd's counters → `policies.Snapshot` |
| `applier` | `policies.Decision` → changed quotas |

The data path is `domains` + tmemd → `sampler` → `tmem_host.policies` → `applier`. A part that fails changes
nothing: the quotas of the last round that worked stay in force.
"""
