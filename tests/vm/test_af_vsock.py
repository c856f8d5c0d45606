"""AF_VSOCK for real: a guest that loads `vsock_loopback` is host and guest in one, and serves itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator

import pytest
from framework.daemon import ROOT
from framework.vms import COMMAND_S, Vms
from tmem_host.errors import OperatorError
from tmem_host.vm.ssh import GuestShell

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

_PROGRAM = "/usr/bin/tmem-bench"
_LOOPBACK = "vsock:1:29805"


@pytest.fixture(scope="module")
def shell(module_vms: Vms, built: Callable[[str], None]) -> Iterator[GuestShell]:
    """A shell in a guest where an engine listens on AF_VSOCK for the peer with CID 1: the guest itself."""
    built("mini")
    build = ["cargo", "build", "--quiet", "--release", "-j2", "-p", "tmem-bench"]
    subprocess.run(build, cwd=ROOT, check=True)
    program = (ROOT / "target/release/tmem-bench").read_bytes()
    guest = module_vms.up(memory_bytes=384 << 20, files={_PROGRAM: program})
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


@pytest.mark.parametrize("batch", [1, 32, 256])
def test_pages_come_back_as_they_were_put(shell: GuestShell, batch: int) -> None:
    load = f"{_PROGRAM} load {_LOOPBACK} --verify --pages 600 --batch {batch} --in-flight 2 --count 60"
    report = json.loads(shell.check(load, deadline_s=COMMAND_S).splitlines()[-1])
    assert report["batch"] == batch
    assert report["pages_per_s"] > 0


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
