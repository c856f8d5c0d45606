"""AF_VSOCK for real: a guest that loads `vsock_loopback` is host and guest in one, and serves itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.vms import COMMAND_S, Vms
from tmem_host.errors import OperatorError
from tmem_host.vm.ssh import GuestShell

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

_PROGRAM = "/usr/bin/tmem-bench"
_LOOPBACK = "vsock:1:29805"


@pytest.fixture(scope="module")
def shell(module_vms: Vms, bench_program: Path) -> Iterator[GuestShell]:
    """A shell in a guest where an engine listens on AF_VSOCK for the peer with CID 1: the guest itself."""
    guest = module_vms.up(memory_bytes=384 << 20, files={_PROGRAM: bench_program.read_bytes()})
    with guest.ssh() as connected:
        connected.check(f"chmod 755 {_PROGRAM}; modprobe vsock_loopback", deadline_s=COMMAND_S)
        serve = f"{_PROGRAM} serve --dir /run/s --vm local --vsock-cid 1 --capacity-mib 96"
        connected.check(
            f"mkdir -p /run/s; (sleep 600 | RUST_LOG=info {serve}) > /run/serve.log 2>&1 &"
            " for i in $(seq 100); do grep -q ready /run/serve.log && break; sleep 0.1; done;"
            " grep ready /run/serve.log",
            deadline_s=COMMAND_S,
        )
        yield connected


def test_it_carries_everything_unharmed(shell: GuestShell) -> None:
    told = shell.check(f"{_PROGRAM} check {_LOOPBACK}", deadline_s=COMMAND_S)
    assert told.count('"result": "ok"') == 8


def test_the_guest_s_own_program_finds_the_host(shell: GuestShell) -> None:
    told = shell.check(f"tmem-guest ping --endpoint {_LOOPBACK}", deadline_s=COMMAND_S)
    assert "version=1 lz4=true checksums=true" in told
    assert "vm=local" in shell.check("cat /run/serve.log", deadline_s=COMMAND_S)


def test_the_device_s_port_and_the_loopback_s_are_two(shell: GuestShell) -> None:
    # Over its vsock device the guest reaches the tmemd of its host, not the engine beside it.
    assert "quota_bytes=67108864" in shell.check(
        "tmem-guest ping --endpoint vsock:2:29805", deadline_s=COMMAND_S
    )
    with pytest.raises(OperatorError):
        shell.check("tmem-guest ping --timeout-s 2 --endpoint vsock:1:29806", deadline_s=COMMAND_S)
    # The port has an owner already, which a second engine is told.
    second = f"{_PROGRAM} serve --dir /run/t --vm other --vsock-cid 1 --capacity-mib 64 < /dev/null"
    with pytest.raises(OperatorError, match="listening on vsock port 29805"):
        shell.check(f"mkdir -p /run/t; {second} 2>&1", deadline_s=COMMAND_S)
