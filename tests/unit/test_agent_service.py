"""Supervision, with real processes: start, readiness, restart with back-off, stop, adoption, logs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from tmem_guest import jsonline
from tmem_guest.child import Child, start_time
from tmem_guest.errors import AgentError, ExitCode
from tmem_guest.service import Service, State

DEADLINE_S = 10.0
SERVE = """
import pathlib, sys, time
print('tmem-guest: info: serving', flush=True)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""


class Served(Service):
    """A process that is ready once it has made a file."""

    def __init__(self, directory: Path, script: str = SERVE, *, name: str = "served") -> None:
        super().__init__(name, directory, ready_timeout_s=DEADLINE_S)
        self.ready_file = directory / f"{name}.ready"
        self.script = script
        self.activations = 0
        self.cleanings = 0
        self.refusal: AgentError | None = None
        self.may_end = True
        self.leave_ended = ""

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.script, str(self.ready_file)]

    def is_ready(self) -> bool:
        return self.ready_file.exists()

    def activate(self) -> None:
        self.activations += 1

    def release(self, *, lazily: bool) -> bool:
        if self.refusal is not None and not lazily:
            raise self.refusal
        return self.may_end

    def clean(self) -> None:
        self.cleanings += 1
        self.ready_file.unlink(missing_ok=True)

    def given_up(self, *, success: bool) -> str:
        return self.leave_ended if success else ""


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def services() -> Iterator[list[Served]]:
    """Services to be ended when the test ends."""
    started: list[Served] = []
    yield started
    for service in started:
        service.refusal = None
        service.request_stop()
        assert service.wait_stopped(DEADLINE_S)


def up(service: Served, services: list[Served]) -> Served:
    services.append(service)
    service.start()
    service.wait_settled(DEADLINE_S)
    return service


def test_a_service_comes_up_and_ends(tmp_path: Path) -> None:
    service = up(Served(tmp_path), [])
    pid = service.pid
    assert (service.state, service.starts, service.activations) == (State.UP, 1, 1)
    # systemd's last sweep at shutdown spares names with an "@".
    assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"@python")
    service.request_stop()
    assert service.wait_stopped(DEADLINE_S)
    assert service.state is State.ENDED
    assert gone(pid)
    assert not (tmp_path / "served.log").exists()


def test_a_killed_process_is_started_again(tmp_path: Path, services: list[Served]) -> None:
    service = up(Served(tmp_path), services)
    first = service.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: service.state is State.UP and service.pid not in (0, first), "it is up again")
    assert service.starts == 2
    assert service.activations == 2
    assert service.last_error == ""


def test_what_a_process_said_last_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    service = Served(
        tmp_path, "import sys; print('tmem-guest: error: the disk is full', file=sys.stderr); sys.exit(3)"
    )
    service.start()
    with pytest.raises(AgentError, match=r"served: tmem-guest exited with status 3: the disk is full"):
        service.wait_settled(DEADLINE_S)
    service.request_stop()
    assert service.wait_stopped(DEADLINE_S)
    assert "error: served: the disk is full" in capfd.readouterr().err


def test_back_off_grows(tmp_path: Path) -> None:
    service = Served(tmp_path, "raise SystemExit(1)")
    moments: list[float] = []
    service.on_change = lambda: moments.append(time.monotonic()) if service.state is State.STARTING else None
    service.start()
    until(lambda: service.starts == 4, "it was started four times")
    service.request_stop()
    assert service.wait_stopped(DEADLINE_S)
    # Two changes a start: entering the state, and the pid.
    starts = moments[::2]
    gaps = [after - before for before, after in pairwise(starts)]
    assert gaps[0] >= 0.2
    assert gaps[1] >= 0.4
    assert gaps[2] >= 0.8


def test_a_release_that_is_refused_leaves_the_service_up(tmp_path: Path, services: list[Served]) -> None:
    service = up(Served(tmp_path), services)
    service.refusal = AgentError("in use", code=ExitCode.CONFLICT)
    service.request_stop()
    with pytest.raises(AgentError, match="in use"):
        service.wait_stopped(DEADLINE_S)
    assert service.state is State.UP
    assert not gone(service.pid)
    # And it is still supervised.
    first = service.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: service.state is State.UP and service.pid not in (0, first), "it is up again")


def test_stopping_while_it_starts(tmp_path: Path) -> None:
    service = Served(tmp_path, "import time; time.sleep(600)")
    service.start()
    until(lambda: service.pid != 0, "it has a process")
    pid = service.pid
    service.request_stop()
    assert service.wait_stopped(DEADLINE_S)
    assert gone(pid)


def test_stopping_while_it_waits(tmp_path: Path) -> None:
    service = Served(tmp_path, "raise SystemExit(1)")
    service.start()
    until(lambda: service.starts == 4 and service.state is State.WAITING, "it backs off")
    began = time.monotonic()
    service.request_stop()
    assert service.wait_stopped(DEADLINE_S)
    assert time.monotonic() - began < 1


def test_a_process_that_is_never_ready_is_replaced(tmp_path: Path) -> None:
    service = Served(tmp_path, "import time; time.sleep(600)")
    service.ready_timeout_s = 0.3
    service.start()
    with pytest.raises(AgentError, match=r"not ready within 0\.3 s") as caught:
        service.wait_settled(DEADLINE_S)
    assert caught.value.code == ExitCode.TIMEOUT
    service.request_stop()
    assert service.wait_stopped(DEADLINE_S)


def test_a_process_that_ended_on_purpose_is_left_ended(tmp_path: Path) -> None:
    service = Served(tmp_path, f"{SERVE.replace('time.sleep(600)', 'time.sleep(0.5)')}")
    service.leave_ended = "someone unmounted it"
    service.start()
    service.wait_settled(DEADLINE_S)
    until(lambda: service.state is State.ENDED, "it is ended")
    assert service.starts == 1
    assert service.last_error == "someone unmounted it"


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    service = Served(tmp_path)
    service.command = lambda: ["/nowhere/tmem-guest"]  # type: ignore[method-assign]
    service.start()
    with pytest.raises(AgentError, match="/nowhere/tmem-guest is not there"):
        service.wait_settled(DEADLINE_S)
    service.request_stop()
    assert service.wait_stopped(DEADLINE_S)


def test_a_process_left_behind_goes_on(tmp_path: Path) -> None:
    service = up(Served(tmp_path), [])
    pid = service.pid
    service.may_end = False
    service.request_stop(lazily=True)
    assert service.wait_stopped(DEADLINE_S)
    try:
        assert not gone(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_next_supervisor_adopts_the_process_and_reads_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], services: list[Served]
) -> None:
    script = SERVE.replace(
        "time.sleep(600)", "while True: print('tmem-guest: info: tick', flush=True); time.sleep(0.05)"
    )
    service = up(Served(tmp_path, script), [])
    pid, began = service.pid, service.began
    service.may_end = False
    service.request_stop(lazily=True)
    assert service.wait_stopped(DEADLINE_S)
    assert (tmp_path / "served.log").exists(), "the log goes with the process, not with its supervisor"
    capfd.readouterr()

    heir = Served(tmp_path, script)
    assert heir.adopt(pid, began)
    up(heir, services)
    assert (heir.pid, heir.starts, heir.activations) == (pid, 0, 1)
    ticks = ""

    def ticked() -> bool:
        nonlocal ticks
        ticks += capfd.readouterr().err
        return "info: served: tick" in ticks

    until(ticked, "its log is read")
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # reaped by the next spawn, as it is a child of this process
        os.waitpid(pid, 0)
    until(lambda: heir.state is State.UP and heir.starts == 1, "the heir has started its own")


def test_only_the_very_same_process_is_adopted() -> None:
    me = os.getpid()
    assert Child.adopt(me, start_time(me) + 1) is None
    gone_pid = os.posix_spawn("/bin/true", ["true"], {})
    began = start_time(gone_pid)
    os.waitpid(gone_pid, 0)
    assert Child.adopt(gone_pid, began) is None


def test_tools_run_beside_the_process(tmp_path: Path, services: list[Served]) -> None:
    service = up(Served(tmp_path), services)
    assert service.run_tool(["/bin/sh", "-c", "echo out; echo err >&2; exit 4"]) == (4, "out\nerr")
    with pytest.raises(AgentError, match=r"did not end in 0\.2 s"):
        service.run_tool(["/bin/sleep", "60"], 0.2)
    with pytest.raises(AgentError, match="cannot run /nowhere"):
        service.run_tool(["/nowhere"])


def test_supervision_survives_a_storm_of_kills(tmp_path: Path, services: list[Served]) -> None:
    service = up(Served(tmp_path), services)
    stop = threading.Event()

    def storm() -> None:
        while not stop.wait(0.03):
            if service.pid:
                with_pid = service.pid
                try:
                    os.kill(with_pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    thread = threading.Thread(target=storm)
    thread.start()
    until(lambda: service.starts >= 3, "it was started three times")
    stop.set()
    thread.join()
    until(lambda: service.state is State.UP, "it is up")


class Orphaned(Served):
    """A service that finds a process of its own already serving."""

    found = 0

    def orphan(self) -> int:
        return self.found


def test_a_process_that_serves_already_is_taken_over(tmp_path: Path, services: list[Served]) -> None:
    (tmp_path / "served.ready").touch()
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        service = Orphaned(tmp_path)
        service.found = process.pid
        up(service, services)
        assert (service.pid, service.starts) == (process.pid, 0)
        service.found = 0
        process.kill()
    until(lambda: service.state is State.UP and service.starts == 1, "it has a process of its own")


def test_a_vital_process_is_not_killed_for_being_slow(tmp_path: Path, services: list[Served]) -> None:
    service = Served(tmp_path, "import time; time.sleep(600)")
    service.ready_timeout_s = 0.2
    service.is_vital = lambda: True  # type: ignore[method-assign]
    services.append(service)
    service.start()
    with pytest.raises(AgentError, match="not ready within"):
        service.wait_settled(DEADLINE_S)
    pid = service.pid
    until(lambda: service.state is State.STARTING, "it is waited for again")
    service.ready_file.touch()
    until(lambda: service.state is State.UP, "it is up")
    assert (service.pid, service.starts) == (pid, 1)
    service.is_vital = lambda: False  # type: ignore[method-assign]


def test_the_listener_of_a_socket_is_known(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        assert jsonline.listener(tmp_path / "s") == os.getpid()
    with pytest.raises(OSError, match="refused"):
        jsonline.listener(tmp_path / "s")
