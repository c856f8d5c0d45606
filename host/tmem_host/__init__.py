"""The Python of the host.

| package | program | what it does |
|---|---|---|
| `service` | `tmemd` | runs the native engine, the registry of VMs, the admin API and metrics |
| `api` | | types, server and client of the admin API (HTTP/JSON on a unix socket) |
| `controller`, `policies` | `tmem-controller` | libvirt events and counters → policy → quotas |
| `vm` | | images, libvirt domains, transports and SSH of test VMs |
| `workloads` | | fio and kernel builds in guests |
| `cli` | `tmemctl` | the operator's command line, the demo among its commands |

Page data never passes through here: it stays in the native engine (`tmem_native`).
"""
