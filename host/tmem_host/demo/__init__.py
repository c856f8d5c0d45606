"""The demonstration: two real VMs, short of memory, that keep their pages on the host (`make demo`).

| module | what |
|---|---|
| `main` | the command: options, privileges, signals, the exit code |
| `stack` | libvirtd, tmemd and the controller, with directories of their own, while the demonstration runs |
| `scenario` | what each VM goes through, and what must have happened by the end |
| `progress` | the live view |
| `report` | `report.json`, the final table, and the verdict |
| `leftovers` | proof that nothing stayed behind |
"""
