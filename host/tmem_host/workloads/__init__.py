"""What runs in guests: fio, kernel builds, and a program that fills memory and verifies it.

| module | what |
|---|---|
| `shell` | the little a workload needs of a guest: run a command, with a deadline and live output |
| `fio` | fio profiles, and fio's JSON read into a struct |
| `kernel` | a part of the Linux kernel, compiled on the tmem-backed mount |
| `memory`, `memory.c` | fills more than the free RAM with a pattern, so that it is swapped, and checks it |

Each runs through SSH in one guest and returns a struct with what it measured; a workload that fails raises
`WorkloadError` with the guest's own exit code.
"""
