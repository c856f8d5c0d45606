"""tmemd's own vsock device under real guests: SSH and tmem over it, and all that can end under a stream."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from framework.vms import BOOT_S, COMMAND_S, Vms, answers
from tmem_host.errors import OperatorError
from tmem_host.vm.machine import Machine

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

_RECONNECT_S = 2.0
_POLL_S = 0.05
_MOUNT = "mkdir -p /data/low /mnt; tmem-guest fs --lower /data/low --mount /mnt > /run/fs.log 2>&1 &"


def _until(what: str, true: Callable[[], bool], deadline_s: float = 30.0) -> float:
    """Wait until it is true; returns how long that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < deadline_s, f"not within {deadline_s:g} s: {what}"
        time.sleep(_POLL_S)
    return time.monotonic() - began


def _connections(vms: Vms, name: str) -> int:
    with vms.admin() as admin:
        return admin.vm(name).connections


@pytest.fixture(scope="module")
def guest(module_vms: Vms) -> Machine:
    machine = module_vms.up(registered=True, transport="vhost-user")
    _until("SSH answers", lambda: answers(machine))
    return machine


def test_many_streams_at_once_both_ways(guest: Machine) -> None:
    with guest.ssh() as shell:
        # As many as connect at once must fit into its backlog.
        listen = "VSOCK-LISTEN:5000,fork,reuseaddr,backlog=64"
        shell.check(f"socat {listen} EXEC:sha256sum > /dev/null 2>&1 &", deadline_s=COMMAND_S)
    data = bytes(range(256)) * 8192  # 2 MiB: far more than any buffer

    def hash_of(number: int) -> str:
        stream = guest.transport.connect(5000, COMMAND_S)
        with stream:
            stream.settimeout(COMMAND_S)
            stream.sendall(bytes([number]) + data)
            stream.shutdown(socket.SHUT_WR)
            return stream.makefile().read().split()[0]

    def listens() -> bool:
        try:
            return hash_of(0) != ""
        except OperatorError:
            return False

    _until("socat listens", listens)
    with ThreadPoolExecutor(12) as pool:
        hashes = list(pool.map(hash_of, range(24)))
    assert hashes == [hashlib.sha256(bytes([number]) + data).hexdigest() for number in range(24)]


def test_the_guest_reaches_programs_of_the_host(guest: Machine) -> None:
    received = hashlib.sha256()

    def receive(listener: socket.socket) -> None:
        stream, _ = listener.accept()
        with stream:
            while part := stream.recv(65536):
                received.update(part)

    with guest.transport.listen(6000) as listener, guest.ssh() as shell:
        thread = threading.Thread(target=receive, args=(listener,))
        thread.start()
        sent = shell.check(
            "head -c 3000000 /dev/urandom > /tmp/r; sha256sum /tmp/r; socat -u /tmp/r VSOCK-CONNECT:2:6000",
            deadline_s=COMMAND_S,
        )
        thread.join(COMMAND_S)
    assert received.hexdigest() == sent.split()[0]
    with guest.ssh() as shell, pytest.raises(OperatorError, match=r"reset|refused"):
        shell.check("socat -u /tmp/r VSOCK-CONNECT:2:6001", deadline_s=COMMAND_S)


def test_tmem_is_used_and_outlives_a_killed_tmemd(guest: Machine, module_vms: Vms) -> None:
    with guest.ssh() as shell:
        shell.check(_MOUNT, deadline_s=COMMAND_S)
        shell.check(
            "for i in $(seq 50); do mountpoint -q /mnt && break; sleep 0.1; done;"
            "head -c 8000000 /dev/urandom > /data/low/file; sha256sum < /mnt/file > /tmp/sum",
            deadline_s=COMMAND_S,
        )
    _until("the file cache is connected", lambda: _connections(module_vms, guest.name) > 0)
    module_vms.tmemd.kill()
    began = time.monotonic()
    module_vms.tmemd.start()
    started = time.monotonic()
    _until("the guest reconnects", lambda: _connections(module_vms, guest.name) > 0)
    assert time.monotonic() - started < _RECONNECT_S + _POLL_S, f"tmemd itself: {started - began:.1f} s"
    # SSH works again, and the mount still tells the truth.
    with guest.ssh() as shell:
        shell.check(
            "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /mnt/file | cmp - /tmp/sum", deadline_s=COMMAND_S
        )


def test_a_clean_restart_of_tmemd(guest: Machine, module_vms: Vms) -> None:
    with guest.ssh() as shell:
        assert shell.check("echo before", deadline_s=COMMAND_S) == "before\n"
    module_vms.tmemd.restart()
    with guest.ssh() as shell:
        assert shell.check("echo after", deadline_s=COMMAND_S) == "after\n"


def test_the_driver_may_be_loaded_again(guest: Machine) -> None:
    # The shell is gone with the driver: everything that uses vsock is ended first, and SSH started again.
    reload = (
        "killall tmem-guest socat; sleep 0.5; rmmod vmw_vsock_virtio_transport && "
        "modprobe vmw_vsock_virtio_transport; socat VSOCK-LISTEN:22,fork EXEC:'dropbear -i -R -s' &"
    )
    with guest.ssh() as shell:
        shell.check(f"(sleep 0.3; {reload}) > /dev/null 2>&1 &", deadline_s=COMMAND_S)
    time.sleep(1.0)
    _until("SSH answers again", lambda: answers(guest), 60.0)


def test_a_guest_that_reboots_has_fresh_streams(vms: Vms) -> None:
    guest = vms.up(registered=True, transport="vhost-user", name="reboots")
    _until("SSH answers", lambda: answers(guest))
    with guest.ssh() as shell:
        shell.check(_MOUNT, deadline_s=COMMAND_S)
        _until("the file cache is connected", lambda: _connections(vms, guest.name) > 0)
        before = shell.check("cat /proc/sys/kernel/random/boot_id", deadline_s=COMMAND_S)
        shell.check("(sleep 0.2; reboot -f) > /dev/null 2>&1 &", deadline_s=COMMAND_S)

    def boot() -> str:
        try:
            with guest.ssh() as shell:
                return shell.check("cat /proc/sys/kernel/random/boot_id", deadline_s=COMMAND_S)
        except OperatorError:
            return before

    _until("the guest is up again", lambda: boot() != before, BOOT_S)
    assert _connections(vms, guest.name) == 0, "streams of the boot before are gone"
