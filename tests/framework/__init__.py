"""What tests stand on.

| module | holds |
|---|---|
| `client` | a guest's end of the wire protocol, written from docs/protocol.md alone |
| `daemon` | a real `tmemd` on sockets in a temporary directory |
| `fixtures` | both as pytest fixtures |
| `vms` | VMs as pytest fixtures (tests/vm) |
"""
