"""`tmemctl`, the operator's command line.

| module | what |
|---|---|
| `main` | the program: lazily loaded commands, errors as one line and an exit code |
| `context`, `options`, `output` | what every command shares: whom to ask, common options, JSON or tables |
| `quota`, `pool`, `stats`, `policy`, `control` | ask and change a running tmemd |
| `image`, `vm`, `run` | test VMs: images, life cycle, SSH, workloads in them |
| `doctor`, `checks` | what this host can do, and what it lacks |

Only `main` is imported at start-up; each command's module is imported when it is used.
"""
