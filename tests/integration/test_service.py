"""The life of the daemon: start, restart, kill -9, stop; and the admin API against the real one."""

from __future__ import annotations

import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable

import httpx
import pytest
from framework.client import (
    PAGE_BYTES,
    ClosedError,
    Encoding,
    Op,
    Put,
    RefusedError,
    Role,
    Status,
    key,
)
from framework.daemon import MIB, Tmemd
from tmem_host.api.types import Cid, Policy, PoolId, VmChange, VmSpec
from tmem_host.errors import ExitCode, OperatorError


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE_BYTES)


# Restart


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_persistent_pages_outlive_the_daemon(tmemd: Tmemd, kill: bool) -> None:
    pages = [(key(1, index), noise(index)) for index in range(200)]
    keys = [page_key for page_key, _ in pages]
    with tmemd.guest("a") as guest:
        pool = guest.create_pool("swap", persistent=True)
        guest.put(pool, pages)
        guest.put(pool, [(key(2), bytes(PAGE_BYTES))], Encoding.SAME_FILLED)
        guest.flush_page(pool, keys[:50])
        tmemd.restart(kill=kill)
        # The VM's socket is there again without anybody registering it.
        with tmemd.guest("a") as again:
            assert again.create_pool("swap", persistent=True) == pool
            assert again.get(pool, keys) == [None] * 50 + [data for _, data in pages[50:]]
            assert again.get(pool, [key(2)]) == [bytes(PAGE_BYTES)]
    with tmemd.admin() as admin:
        assert admin.status().recovery.pages == 151
        assert admin.vm("a").persistent_pages == 151


def test_a_new_boot_after_a_restart_gets_fresh_pools(tmemd: Tmemd) -> None:
    with tmemd.guest("a", boot=1) as guest:
        pool = guest.create_pool("swap", persistent=True)
        guest.put(pool, [(key(1), noise(1))])
    tmemd.restart(kill=True)
    with tmemd.guest("a", boot=2) as rebooted:
        with pytest.raises(RefusedError) as gone:
            rebooted.get(pool, [key(1)])
        assert gone.value.status is Status.NO_SUCH_POOL


def test_settings_outlive_the_daemon(tmemd: Tmemd) -> None:
    shared = uuid.uuid4()
    with tmemd.admin() as admin:
        change = VmChange(quota_bytes=3 * MIB, min_bytes=MIB, weight=7, frozen=True, pinned=True)
        before = admin.change_vm("a", change)
        admin.grant_shared(str(shared), "a")
        admin.set_policy(Policy(name="smart-alloc", parameters={"P": 2.0}))
        # As the controller would; the administrator's pin holds.
        assert admin.change_vm("a", VmChange(quota_bytes=MIB, unless_pinned=True)) == before
    tmemd.restart(kill=True)
    with tmemd.admin() as admin, tmemd.guest("a") as guest:
        after = admin.vm("a")
        for name in ("spec", "quota_bytes", "min_bytes", "weight", "frozen", "pinned", "quota_changes"):
            assert getattr(after, name) == getattr(before, name), name
        assert admin.policy() == Policy(name="smart-alloc", parameters={"P": 2.0})
        pool = guest.create_pool("s", shared=shared)
        assert guest.put(pool, [(key(1), noise(1))]) == [Put.FROZEN]


def test_puts_acknowledged_before_kill_9_are_there_after(tmemd: Tmemd) -> None:
    """A writer at full speed when the daemon dies: what was acknowledged is there, byte-exact."""
    acknowledged: dict[int, bytes] = {}
    for round_number in range(3):
        guest = tmemd.guest("a")
        pool = guest.create_pool("swap", persistent=True)
        killer = threading.Timer(0.2 + 0.1 * round_number, tmemd.kill)
        killer.start()
        try:
            while True:
                batch = {random.randrange(2000): noise(random.randrange(1 << 30)) for _ in range(16)}
                for index in batch:
                    acknowledged.pop(index, None)  # either version may survive until it is acknowledged
                statuses = guest.put(pool, [(key(1, index), data) for index, data in batch.items()])
                assert set(statuses) == {Put.STORED}
                acknowledged |= batch
        except (ClosedError, BrokenPipeError, ConnectionResetError):
            killer.join()
        guest.close()
        tmemd.start()
        with tmemd.guest("a") as again:
            for index, data in acknowledged.items():
                assert again.get(pool, [key(1, index)]) == [data]
    assert acknowledged


# Stop


def test_stopping_tells_the_guests_answers_and_closes(tmemd: Tmemd) -> None:
    with tmemd.guest("a", role=Role.CONTROL) as agent, tmemd.guest("a") as guest:
        pool = guest.create_pool("p", persistent=True)
        tags = [guest.send(Op.GET, key(1).object + bytes(4), pool=pool, count=1) for _ in range(200)]
        tmemd.signal(signal.SIGTERM)
        assert agent.next_notice() == (Op.SHUTDOWN, 0, 0)
        with pytest.raises(ClosedError):
            agent.receive()
        answered = 0
        with pytest.raises(ClosedError):
            for tag in tags:
                guest.answer(tag, Op.GET)
                answered += 1
            guest.receive()
        assert tmemd.wait() == 0
    assert not tmemd.admin_socket.exists()
    assert not tmemd.vm_socket("a").exists()
    lines = [line for line in tmemd.log.splitlines() if "Traceback" in line or " ERROR " in line]
    assert lines == []


def test_a_second_signal_ends_it_at_once(start_tmemd: Callable[..., Tmemd]) -> None:
    tmemd = start_tmemd(config="[limits]\ndrain_timeout_s = 30\nstall_timeout_s = 30\n")
    tmemd.add_vm("a")
    with tmemd.guest("a") as stuck:
        pool = stuck.create_pool("p", persistent=True)
        stuck.put(pool, [(key(1, index), noise(index)) for index in range(256)])
        body = b"".join(key(1, index).object + index.to_bytes(4, "little") for index in range(256))
        for _ in range(4):
            stuck.send(Op.GET, body, pool=pool, count=256)
        time.sleep(0.2)
        tmemd.signal(signal.SIGTERM)
        time.sleep(0.3)
        start = time.monotonic()
        tmemd.signal(signal.SIGTERM)
        assert tmemd.wait() == ExitCode.FAILED
        assert time.monotonic() - start < 3


def test_sigint_stops_it_too(tmemd: Tmemd) -> None:
    tmemd.signal(signal.SIGINT)
    assert tmemd.wait() == 0


# Start


def run_tmemd(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tmem_host.service.main", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stderr + done.stdout


def test_a_second_daemon_is_refused(tmemd: Tmemd, start_tmemd: Callable[..., Tmemd]) -> None:
    code, message = run_tmemd(*tmemd.arguments())
    assert code == ExitCode.CONFLICT
    assert "another tmemd listens on" in message
    assert message.count("\n") == 1
    # The same arena under another admin socket.
    with pytest.raises(AssertionError, match=r"in use by another process"):
        start_tmemd(arena=tmemd.arena)
    with tmemd.guest("a") as guest:
        guest.ping()


def test_leftovers_of_a_killed_daemon_do_not_stop_the_next(tmemd: Tmemd) -> None:
    tmemd.kill()
    assert tmemd.admin_socket.exists()
    assert tmemd.vm_socket("a").exists()
    tmemd.start()
    with tmemd.guest("a") as guest:
        guest.ping()


def test_a_vm_whose_socket_is_taken_is_served_once_it_is_free(tmemd: Tmemd) -> None:
    tmemd.add_vm("b")
    tmemd.kill()
    path = tmemd.vm_socket("a")
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as squatter:
        squatter.bind(str(path))
        squatter.listen()
        tmemd.start()
        with tmemd.guest("b") as other:
            other.ping()
        with tmemd.admin() as admin:
            assert [vm.name for vm in admin.vms()] == ["b"]
            with pytest.raises(OperatorError, match="in use by another process") as closed:
                admin.vm("a")
            assert closed.value.code is ExitCode.UNAVAILABLE
    deadline = time.monotonic() + 10
    while True:
        try:
            with tmemd.guest("a") as guest:
                guest.ping()
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, tmemd.log
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        ("[arena]\ncapcity = '1G'\n", ["arena.capcity", "did you mean 'arena.capacity'?"]),
        ("[arena]\ncapacity = 5\n", ["arena.capacity", "Expected `str`, got `int`"]),
        ("[arena]\ncapacity = 'lots'\n", ["arena", "'lots' is not a size"]),
        ("[sokets]\n", ["sokets", "did you mean 'sockets'?"]),
        ("[limits\n", ["not valid TOML", "line 1"]),
        ("[sockets]\ngroup = 'no such group'\n", ["no group 'no such group'"]),
    ],
)
def test_a_wrong_configuration_is_one_clear_line(
    start_tmemd: Callable[..., Tmemd], config: str, messages: list[str]
) -> None:
    with pytest.raises(AssertionError) as refused:
        start_tmemd(config=config)
    text = str(refused.value)
    assert f"ended with {ExitCode.USAGE.value}" in text
    for message in messages:
        assert message in text
    assert "Traceback" not in text


def test_sockets_are_private(tmemd: Tmemd) -> None:
    assert stat.S_IMODE(tmemd.admin_socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(tmemd.vm_socket("a").stat().st_mode) == 0o660


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_may_not_administer(tmemd: Tmemd) -> None:
    tmemd.admin_socket.chmod(0o666)
    script = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "s.sendall(b'GET /v1/status HTTP/1.1\\r\\nHost: t\\r\\n\\r\\n'); print(s.recv(4096).decode())"
    )
    tmemd.directory.chmod(0o755)
    tmemd.directory.parent.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmemd.admin_socket)],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert "403" in done.stdout
    assert "may administer" in done.stdout


# The admin API


def test_unknown_things_are_404(tmemd: Tmemd) -> None:
    with tmemd.admin() as admin:
        for call in (
            lambda: admin.vm("nobody"),
            lambda: admin.change_vm("nobody", VmChange(weight=1)),
            lambda: admin.remove_vm("nobody"),
            lambda: admin.pools("nobody"),
            lambda: admin.flush("nobody"),
            lambda: admin.reclaim("nobody", 1),
            lambda: admin.destroy_pool("a", PoolId(12345)),
            lambda: admin.grant_shared(str(uuid.uuid4()), "nobody"),
        ):
            with pytest.raises(OperatorError) as unknown:
                call()
            assert unknown.value.code is ExitCode.NOT_FOUND


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (VmChange(quota_bytes=-1), "negative"),
        (VmChange(quota_bytes=1 << 60), "over the host's memory"),
        (VmChange(quota_bytes=65 * MIB), "over tmemd's capacity, 64 MiB"),
        (VmChange(quota_bytes=MIB, min_bytes=2 * MIB), "minimum"),
        (VmChange(min_bytes=-1), "minimum"),
        (VmChange(weight=0), "weight"),
        (VmChange(weight=10_001), "weight"),
    ],
)
def test_limits_that_make_no_sense_change_nothing(tmemd: Tmemd, change: VmChange, message: str) -> None:
    with tmemd.admin() as admin:
        before = admin.vm("a")
        with pytest.raises(OperatorError, match=message) as refused:
            admin.change_vm("a", change)
        assert (refused.value.code, refused.value.vm) == (ExitCode.USAGE, "a")
        assert admin.vm("a") == before


def test_registering_is_idempotent_and_conflicts_are_refused(tmemd: Tmemd) -> None:
    with tmemd.admin() as admin:
        admin.change_vm("a", VmChange(quota_bytes=MIB))
        assert admin.add_vm("a", VmSpec()).quota_bytes == MIB
        admin.add_vm("b", VmSpec(cid=Cid(77), quota_bytes=5 * MIB, min_bytes=MIB, weight=3, pinned=True))
        registered = admin.vm("b")
        assert (registered.quota_bytes, registered.min_bytes, registered.weight) == (5 * MIB, MIB, 3)
        assert registered.pinned
        taken = str(tmemd.vm_socket("a")).removesuffix("_29805")
        for name, spec, message in (
            ("a", VmSpec(cid=Cid(9)), "registered with other sockets"),
            ("c", VmSpec(cid=Cid(77)), "CID 77 belongs to VM 'b'"),
            ("c", VmSpec(hybrid_socket=taken), "belongs to VM 'a'"),
        ):
            with pytest.raises(OperatorError, match=message) as conflict:
                admin.add_vm(name, spec)
            assert conflict.value.code is ExitCode.CONFLICT
        for name, spec in (
            ("../x", VmSpec()),
            ("x" * 64, VmSpec()),
            ("c", VmSpec(cid=Cid(2))),
            ("c", VmSpec(hybrid_socket="relative")),
            ("c", VmSpec(quota_bytes=-5)),
        ):
            with pytest.raises(OperatorError) as wrong:
                admin.add_vm(name, spec)
            assert wrong.value.code in (ExitCode.USAGE, ExitCode.NOT_FOUND)
        assert [vm.name for vm in admin.vms()] == ["a", "b"]
        # What was refused left nothing behind.
        admin.add_vm("c", VmSpec())


def test_removing_a_vm_ends_its_connections_and_frees_its_memory(tmemd: Tmemd) -> None:
    with tmemd.guest("a") as guest, tmemd.admin() as admin:
        pool = guest.create_pool("p", persistent=True)
        guest.put(pool, [(key(1, index), noise(index)) for index in range(100)])
        assert admin.status().used_bytes > 100 * PAGE_BYTES
        admin.remove_vm("a")
        with pytest.raises((ClosedError, BrokenPipeError)):
            guest.ping()
        assert not tmemd.vm_socket("a").exists()
        assert admin.status().pages == 0
        assert admin.vms() == []
        tmemd.add_vm("a")
        with tmemd.guest("a") as again, pytest.raises(RefusedError):
            again.get(pool, [key(1)])


def test_pools_are_listed_flushed_and_destroyed(tmemd: Tmemd) -> None:
    with tmemd.guest("a") as guest, tmemd.admin() as admin:
        swap = guest.create_pool("swap", persistent=True)
        cache = guest.create_pool("cache", exclusive=True)
        guest.put(swap, [(key(1, index), noise(index)) for index in range(10)])
        guest.put(cache, [(key(1, index), noise(index)) for index in range(20)])
        pools = {pool.name: pool for pool in admin.pools("a")}
        assert (pools["swap"].id, pools["swap"].kind, pools["swap"].pages) == (swap, "persistent", 10)
        assert (pools["cache"].kind, pools["cache"].exclusive, pools["cache"].pages) == (
            "ephemeral",
            True,
            20,
        )
        assert admin.flush("a") == 20
        admin.destroy_pool("a", PoolId(swap))
        assert [pool.name for pool in admin.pools("a")] == ["cache"]
        assert admin.status().pages == 0


def test_memory_is_given_back_and_capacity_changes(tmemd: Tmemd) -> None:
    with tmemd.guest("a") as guest, tmemd.admin() as admin:
        swap, cache = guest.create_pool("swap", persistent=True), guest.create_pool("cache")
        for start in range(0, 4096, 256):
            guest.put(cache, [(key(1, start + index), noise(index)) for index in range(256)])
        guest.put(swap, [(key(1, index), noise(index)) for index in range(256)])
        assert admin.free(4 * MIB) >= 4 * MIB
        status = admin.set_capacity(8 * MIB)
        assert status.capacity_bytes == 8 * MIB
        assert status.used_bytes <= 8 * MIB
        assert guest.get(swap, [key(1, index) for index in range(256)]) == [noise(i) for i in range(256)]
        for wrong in (-1, 1 << 60):
            with pytest.raises(OperatorError):
                admin.set_capacity(wrong)


def test_requests_that_are_not_right_are_refused(tmemd: Tmemd) -> None:
    transport = httpx.HTTPTransport(uds=str(tmemd.admin_socket))
    with httpx.Client(transport=transport, base_url="http://tmemd") as http:
        for method, path, body, status in (
            ("PATCH", "/v1/vms/a", b'{"quota": 5}', 400),
            ("PATCH", "/v1/vms/a", b"{", 400),
            ("PATCH", "/v1/vms/a", b'{"quota_bytes": "much"}', 400),
            ("PUT", "/v1/capacity", b"x" * 100_000, 413),
            ("GET", "/v1/nothing", b"", 404),
            ("POST", "/v1/status", b"", 405),
            ("DELETE", "/v1/vms/a/pools/x", b"", 400),
            ("PUT", "/v1/shared-pools/x/grants/a", b"", 400),
        ):
            answer = http.request(method, path, content=body)
            assert answer.status_code == status, (path, answer.text)
            assert answer.json()["error"]["message"]


def test_a_client_says_that_no_daemon_runs(tmemd: Tmemd) -> None:
    tmemd.kill()
    with tmemd.admin() as admin, pytest.raises(OperatorError, match="tmemd is not running") as gone:
        admin.status()
    assert gone.value.code is ExitCode.UNAVAILABLE
    assert "systemctl start tmemd" in gone.value.hint
