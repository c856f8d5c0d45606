"""`tmemd`: the daemon that lends memory to guests.

```
main ── options, configuration ── daemon ─┬─ lender ── tmem_native.Engine (Rust: listeners, sessions, store)
                                          ├─ registry (VMs, grants, policy: kept in state.json)
                                          ├─ tmem_host.api.server (admin API, /metrics)
                                          └─ reclaim (asks guests for pages back, once a second)
```

| module | holds |
|---|---|
| `main` | command line, exit codes |
| `daemon` | start, signals, the once-a-second work, clean stop |
| `lender` | every operation of the admin API on engine and registry, with its checks and errors |
| `registry` | what outlives a restart |
| `reclaim` | when to ask a guest for how many persistent pages |
| `sockets` | the admin socket and who may use it |
| `notify` | readiness and watchdog of systemd |
| `log` | one line an event |
"""
