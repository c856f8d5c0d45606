"""The admin API: HTTP/1.1 with JSON bodies on the unix socket `/run/tmem/admin.sock` (docs/architecture.md).

| module | holds |
|---|---|
| `types` | what is sent and answered, as frozen structs |
| `client` | the synchronous client that `tmemctl` and the controller use |
| `server` | the HTTP server inside `tmemd` |
| `metrics` | the counters in Prometheus' text format |
"""
