"""VMs through libvirt: booting, commands over vsock, names and CIDs, failures, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from framework.agent_guest import until
from framework.daemon import AS_NOBODY, NOBODY, Unprivileged
from framework.vms import BOOT_S, COMMAND_S, MIB, Vms, answers
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.service import keeper
from tmem_host.vm import console, disks, machine, state
from tmem_host.vm.domain import DiskLimits
from tmem_host.vm.machine import Machine
from tmem_host.vm.request import Registration, VmRequest
from tmem_host.vm.ssh import GuestShell

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def mini(module_vms: Vms) -> Machine:
    return module_vms.up()


@pytest.fixture(scope="module")
def shell(mini: Machine) -> Iterator[GuestShell]:
    with mini.ssh() as opened:
        yield opened


def test_a_command_has_output_and_exit_code(shell: GuestShell) -> None:
    result = shell.output("echo out; echo err >&2; exit 3", deadline_s=COMMAND_S)
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"out\n", b"err\n")


def test_an_argument_vector_is_passed_as_it_is(shell: GuestShell) -> None:
    words = ["printf", "%s|", "a b", "$HOME", "it's", "*"]
    assert shell.check(words, deadline_s=COMMAND_S) == "a b|$HOME|it's|*|"


def test_output_comes_live(shell: GuestShell) -> None:
    arrivals: list[float] = []
    code = shell.run(
        "echo first; sleep 2; echo second",
        deadline_s=COMMAND_S,
        on_output=lambda _name, _data: arrivals.append(time.monotonic()),
    )
    assert code == 0
    assert arrivals[-1] - arrivals[0] > 1.0


def test_a_command_that_takes_too_long_is_ended_in_the_guest_too(shell: GuestShell) -> None:
    started = time.monotonic()
    with pytest.raises(OperatorError, match="not done within 2 s") as caught:
        shell.run("exec sleep 777", deadline_s=2)
    assert caught.value.code is ExitCode.TIMEOUT
    assert time.monotonic() - started < 20
    # `pgrep` would find its own shell by the pattern.
    wait = "for i in $(seq 40); do ps | grep -q '[s]leep 777' || exit 0; sleep 0.5; done; exit 1"
    assert shell.run(wait, deadline_s=COMMAND_S) == 0


def test_files_go_both_ways(shell: GuestShell) -> None:
    data = bytes(range(256)) * 2000  # half a MiB: many packets each way
    shell.put(data, "/tmp/new/file")
    assert shell.get("/tmp/new/file") == data


def test_many_commands_at_once_on_one_connection(shell: GuestShell) -> None:
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda n: shell.check(f"sleep 0.2; echo {n}", deadline_s=COMMAND_S), range(4))
    assert list(answers) == ["0\n", "1\n", "2\n", "3\n"]


def test_the_guest_has_what_tests_need(shell: GuestShell) -> None:
    assert shell.check("tmem-guest --version", deadline_s=COMMAND_S).startswith("tmem-guest ")
    assert shell.run("modprobe ublk_drv && modprobe nbd && modprobe zram", deadline_s=COMMAND_S) == 0
    assert shell.run("test -c /dev/fuse && test -c /dev/ublk-control", deadline_s=COMMAND_S) == 0
    assert "/data ext4" in shell.check("cat /proc/mounts", deadline_s=COMMAND_S)


def test_sectors_are_counted(mini: Machine, shell: GuestShell) -> None:
    before = mini.block_stats()
    shell.check("dd if=/dev/zero of=/data/x bs=1M count=4 conv=fsync", deadline_s=COMMAND_S)
    shell.check("dd if=/data/x of=/dev/null bs=1M iflag=direct", deadline_s=COMMAND_S)
    after = mini.block_stats()
    assert after.sectors_written - before.sectors_written >= 4 * MIB // 512
    assert after.sectors_read - before.sectors_read >= 4 * MIB // 512


def test_a_disk_limit_holds_at_once(mini: Machine, shell: GuestShell) -> None:
    shell.check("dd if=/dev/zero of=/data/y bs=1M count=4 conv=fsync", deadline_s=COMMAND_S)
    mini.set_disk_limits(DiskLimits(read_bytes=1 * MIB))
    try:
        started = time.monotonic()
        shell.check("dd if=/data/y of=/dev/null bs=64k iflag=direct", deadline_s=COMMAND_S)
        assert time.monotonic() - started > 2.0
    finally:
        mini.set_disk_limits(DiskLimits())


def test_a_name_or_cid_is_taken_once(module_vms: Vms, mini: Machine) -> None:
    with pytest.raises(OperatorError, match="there is a VM of that name") as caught:
        module_vms.up(name=mini.name)
    assert caught.value.code is ExitCode.CONFLICT
    with pytest.raises(OperatorError, match=f"CID {mini.state.cid} is taken by VM '{mini.name}'") as caught:
        module_vms.up(cid=mini.state.cid)
    assert caught.value.code is ExitCode.CONFLICT
    assert mini.running()
    assert [info.state.name for info in machine.list_machines()] == [mini.name]


def test_another_process_finds_lists_and_enters_it(mini: Machine) -> None:
    program = (
        "from tmem_host.vm import machine\n"
        f"with machine.get({mini.name!r}).ssh() as shell:\n"
        "    print(shell.check('hostname', deadline_s=60), end='')\n"
        "print([(each.state.name, each.running) for each in machine.list_machines()])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"{mini.name}\n[('{mini.name}', True)]\n"


def test_a_shell_for_people(mini: Machine) -> None:
    argv = mini.ssh_command("echo", "hello")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr


def test_a_guest_that_goes_down_ends_its_commands(vms: Vms) -> None:
    guest = vms.up()
    with guest.ssh() as shell, pytest.raises(OperatorError, match=r"connection broke|ended with"):
        shell.check("poweroff -f; sleep 60", deadline_s=COMMAND_S)
    guest.wait_until_down(COMMAND_S)
    assert [info.running for info in machine.list_machines()] == [False]
    machine.down(guest.name)
    with pytest.raises(OperatorError, match="there is no such VM") as caught:
        machine.down(guest.name)
    assert caught.value.code is ExitCode.NOT_FOUND


def test_memory_that_runs_out_does_not_lock_us_out(vms: Vms) -> None:
    """The kernel ends the programs of those who came in, not who lets others in."""
    up = vms.up()
    for _ in range(4):
        with up.ssh() as shell, suppress(OperatorError):
            # A shell that the OOM killer has ended answers no more.
            shell.run("echo f > /proc/sysrq-trigger; sleep 5", deadline_s=COMMAND_S)
    with up.ssh() as shell:
        assert "Out of memory" in shell.check("dmesg", deadline_s=COMMAND_S)
        # Nor is it the end if it ends otherwise, and the connection with it.
        with suppress(OperatorError):
            shell.run("kill -9 $(pidof socat)", deadline_s=COMMAND_S)
    until(lambda: answers(up), "somebody listens again")


def test_a_panic_is_told_with_the_console(vms: Vms) -> None:
    with pytest.raises(OperatorError, match="kernel panicked") as caught:
        vms.up(name="panics", cmdline="rdinit=/nowhere root=/dev/none")
    assert "Kernel panic - not syncing" in caught.value.message
    _assert_gone("panics")


def test_a_guest_that_is_never_ready_is_told_with_the_console(vms: Vms) -> None:
    # A shell as the first process: it never tells the host that it is ready.
    with pytest.raises(OperatorError, match="did not become ready in time") as caught:
        vms.up(name="silent", cmdline="rdinit=/bin/sh", deadline_s=60.0)
    assert caught.value.code is ExitCode.TIMEOUT
    assert "last lines of its console" in caught.value.message
    _assert_gone("silent")


def test_an_interrupted_start_leaves_nothing(vms: Vms) -> None:
    program = (
        "import pathlib\n"
        "from tmem_host.vm import machine\n"
        "from tmem_host.vm.request import Registration, VmRequest\n"
        f"register = Registration(pathlib.Path({str(vms.tmemd.admin_socket)!r}))\n"
        "request = VmRequest('stopped', image='mini', register=register, cmdline='rdinit=/bin/sh')\n"
        "machine.up(request, lambda line: print(line, flush=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as starting:
        assert starting.stdout is not None
        assert b"starting on" in starting.stdout.readline()
        starting.send_signal(signal.SIGINT)
        starting.wait(COMMAND_S)
    _assert_gone("stopped")
    with vms.admin() as admin:
        assert admin.vms() == []


def test_what_is_not_there_is_said(vms: Vms) -> None:
    with pytest.raises(OperatorError, match="no image 'nowhere'") as caught:
        vms.up("nowhere")
    assert caught.value.code is ExitCode.NOT_FOUND
    with pytest.raises(OperatorError, match="not a VM name") as caught:
        vms.up(name="../x")
    assert caught.value.code is ExitCode.USAGE
    request = VmRequest("lonely", image="mini", memory_bytes=256 * MIB)
    with pytest.raises(OperatorError, match="tmemd is not running") as caught:
        machine.up(request)
    assert caught.value.code is ExitCode.UNAVAILABLE
    _assert_gone("lonely")


def test_debian_is_ready_with_its_agent(vms: Vms, built: Callable[[str], None]) -> None:
    built("debian")
    started = time.monotonic()
    guest = vms.up("debian", memory_bytes=384 * MIB, files={"/etc/greeting": b"hello\n"})
    seconds = time.monotonic() - started
    print(f"debian was ready after {seconds:.1f} s")
    assert seconds < BOOT_S
    with vms.admin() as admin:
        known = admin.vm(guest.name)
        assert known.report is not None
        assert known.report.mem_total_bytes > 256 * MIB
    with guest.ssh() as shell:
        assert shell.check("cat /etc/greeting", deadline_s=COMMAND_S) == "hello\n"
        assert shell.check("systemctl is-active tmem-agent", deadline_s=COMMAND_S) == "active\n"
        assert shell.check("systemctl --failed --quiet", deadline_s=COMMAND_S) == ""
        assert shell.check("fio --version", deadline_s=COMMAND_S).startswith("fio-")
        assert shell.run("test -e /data/linux/Makefile && gcc --version", deadline_s=COMMAND_S) == 0
    name = guest.name
    guest.down()
    with vms.admin() as admin, pytest.raises(OperatorError) as caught:
        admin.vm(name)
    assert caught.value.code is ExitCode.NOT_FOUND
    _assert_gone(name)
    assert not (vms.tmemd.directory / "vm" / name).exists()


def test_root_brings_a_vm_up_with_a_tmemd_that_has_no_privileges(vms: Vms) -> None:
    vms.directory.chmod(0o711)
    home = vms.directory / "unprivileged"
    home.mkdir()
    with Unprivileged(home, capacity="64M") as tmemd, _keeper(tmemd):
        register = Registration(tmemd.admin_socket, quota_bytes=16 * MIB)
        guest = vms.up(register=register, transport="vhost-user")
        sockets = home / "vm" / guest.name
        # That the guest said it is ready proves that tmemd could open what root listens on.
        assert {path.stat().st_uid for path in (sockets, *sockets.iterdir())} == {NOBODY}
        assert {path.stat().st_uid for path in (guest.directory, *guest.directory.iterdir())} == {0}
        with guest.ssh() as shell:
            assert shell.check("echo reached", deadline_s=COMMAND_S) == "reached\n"
        guest.down()
        _assert_gone(guest.name)
        assert not sockets.exists()


@contextmanager
def _keeper(tmemd: Unprivileged) -> Iterator[None]:
    """A keeper of the same user, started by itself as systemd does: that user may not reach this Python."""
    path = tmemd.admin_socket.with_name("keeper.sock")
    argv = [*AS_NOBODY, sys.executable, "-m", "tmem_host.service.keeper", str(path), "--stay"]
    process = subprocess.Popen(argv, env=os.environ | dict(tmemd.environment()))
    try:
        until(lambda: keeper.is_running(path), "the keeper runs")
        yield
    finally:
        process.terminate()
        process.wait()


def _assert_gone(name: str) -> None:
    assert not state.directory(name).exists()
    assert not disks.directory(name).exists()
    assert console.last_lines(state.directory(name)) == []
    assert name not in [info.state.name for info in machine.list_machines()]
