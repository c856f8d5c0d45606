"""tmemctl and the workloads in one real guest of the image that has them."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from framework.vms import Vms
from tmem_host.cli.main import run
from tmem_host.errors import ExitCode
from tmem_host.vm.machine import Machine
from tmem_host.workloads import memory

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]

MIB = 1 << 20


@pytest.fixture(scope="module")
def guest(module_vms: Vms, built: Callable[[str], None]) -> Machine:
    built("debian")
    return module_vms.up("debian")


def test_ssh_hands_output_and_exit_code_on(guest: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    code = run(["vm", "ssh", guest.name, "--", "sh", "-c", "echo out; echo err >&2; exit 7"])
    captured = capfd.readouterr()
    assert (code, captured.out, captured.err) == (7, "out\n", "err\n")
    assert run(["vm", "ssh", guest.name, "--json", "--", "uname", "-s"]) == 0
    assert json.loads(capfd.readouterr().out) == {"exit_code": 0, "stdout": "Linux\n", "stderr": ""}


def test_a_deadline_ends_the_command_in_the_guest(guest: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["vm", "ssh", guest.name, "--deadline", "2", "--", "sleep", "1234"]) == ExitCode.TIMEOUT
    assert "was not done within 2 s" in capfd.readouterr().err
    with guest.ssh() as shell:
        command = "for _ in $(seq 100); do pgrep -f 'sleep 123[4]' || exit 0; sleep 0.1; done; exit 1"
        assert shell.run(command, deadline_s=60) == 0, "the command outlived its deadline"


def test_fio_verifies_on_the_tmem_backed_mount(
    module_vms: Vms, guest: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", "fio", guest.name, "--profile", "verify", "--size", "4M", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["errors"], result["write_bytes"]) == (0, 4 * MIB)
    with module_vms.admin() as client:
        assert any(pool.kind == "ephemeral" for pool in client.pools(guest.name))


def test_a_kernel_build_compiles_and_its_failure_is_handed_on(
    guest: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", "kernel-build", guest.name, "--target", "kernel/locking/", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["objects"] >= 3
    assert "CC      kernel/locking/" in captured.err, "output is shown as it comes"
    with guest.ssh() as shell:
        shell.check(
            "echo '#error broken on purpose' >> /mnt/tmem/linux/kernel/locking/mutex.c", deadline_s=60
        )
    assert run(["run", "kernel-build", guest.name, "--target", "kernel/locking/"]) == 2
    assert "broken on purpose" in capfd.readouterr().err


def test_memory_swapped_through_tmem_comes_back_intact(module_vms: Vms, guest: Machine) -> None:
    with guest.ssh() as shell, module_vms.admin() as client:
        shell.check("tmem-agent swap on --size 256M", deadline_s=120)
        memory.prepare(shell)
        result = memory.run(shell, size_bytes=256 * MIB, seconds=1, pause_ms=0, deadline_s=900)
        assert result.pages == 256 * 256
        swapped = client.vm(guest.name)
    assert swapped.puts_accepted > 0
    assert swapped.gets_hit > 0
