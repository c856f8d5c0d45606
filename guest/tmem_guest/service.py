"""Supervision: one thread keeps one `tmem-guest` process, and what it provides, up.

    starting ──ready──► up ──process ends──► waiting ──back-off──► starting …
        └──────fails──────────────────────────►┘
    up ──stop──► stopping ──released──► ended          (a release that fails leads back to up)

A subclass says what to run, when it is ready, what to do then (mkswap, swapon), and how to give it up again
(swapoff, umount).
"""

from __future__ import annotations

import abc
import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from tmem_guest import log
from tmem_guest.child import Child, open_output, start_time
from tmem_guest.errors import AgentError, ExitCode

FIRST_DELAY_S = 0.2
MAX_DELAY_S = 30.0
STEADY_S = 10.0  # up for this long: the back-off starts over
POLL_S = 0.05
END_TIMEOUT_S = 10.0
TOOL_TIMEOUT_S = 60.0
_KEPT_LINES = 8


class State(StrEnum):
    """Where a service is."""

    STARTING = "starting"
    UP = "up"
    WAITING = "waiting"
    STOPPING = "stopping"
    ENDED = "ended"


class _Stop(Exception):  # noqa: N818 - not an error
    """A stop was asked for while the service was starting or waiting."""


class Service(threading.Thread, abc.ABC):
    """A supervised process. Attributes without an underscore are a snapshot for status displays."""

    def __init__(self, name: str, runtime_directory: Path, *, ready_timeout_s: float) -> None:
        super().__init__(name=name, daemon=True)
        self.state = State.STARTING
        self.last_error = ""
        self.starts = 0
        self.pid = 0
        self.began = 0
        self.on_change: Callable[[], None] = lambda: None
        self.runtime_directory = runtime_directory
        self.ready_timeout_s = ready_timeout_s
        self._child: Child | None = None
        self._output_path = runtime_directory / f"{name}.log"
        self._output = -1
        self._partial = b""
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._settled = threading.Event()
        self._first_error: AgentError | None = None
        self._left = False
        self._stop_wanted = False
        self._stop_lazily = False
        self._stop_done = threading.Event()
        self._stop_error: AgentError | None = None

    # What a subclass provides. All run in the service's thread.

    @abc.abstractmethod
    def command(self) -> list[str]:
        """The program, as a path, and its arguments."""

    @abc.abstractmethod
    def is_ready(self) -> bool:
        """Whether the process serves."""

    @abc.abstractmethod
    def activate(self) -> None:
        """Put a process that is ready to use; must be harmless if it is in use already. Raises AgentError."""

    @abc.abstractmethod
    def release(self, *, lazily: bool) -> bool:
        """Take the process out of use. Raises AgentError if that cannot be done: it then stays up.

        Returns whether the process may end now. With `lazily`, the answer may be no instead of an error: the
        process then serves those who still use it for as long as they do, unsupervised.
        """

    @abc.abstractmethod
    def clean(self) -> None:
        """Clear away what a dead process left, before the next is started. Raises AgentError."""

    def given_up(self, *, success: bool) -> str:
        """Why a process that ended by itself (`success`: with status 0) stays so; empty to restart it."""
        del success
        return ""

    def orphan(self) -> int:
        """Pid of a process that serves already although no agent knows it; 0 if there is none."""
        return 0

    def is_vital(self) -> bool:
        """Whether ending the process now would take something from the guest that it cannot do without."""
        return False

    # For the daemon's threads.

    def adopt(self, pid: int, began: int) -> bool:
        """Before `start()`: take over a process of an earlier agent. Returns whether it was still there."""
        self._child = Child.adopt(pid, began)
        return self._child is not None

    def wait_settled(self, timeout_s: float) -> None:
        """Wait until the first start has come to something. Raises AgentError with what went wrong."""
        if not self._settled.wait(timeout_s):
            raise AgentError(f"{self.name} did not come up within {timeout_s:g} s", code=ExitCode.TIMEOUT)
        if self._first_error is not None:
            raise self._first_error

    def request_stop(self, *, lazily: bool = False) -> None:
        """Ask the service to end; `wait_stopped` tells what came of it."""
        self._stop_error = None
        self._stop_done.clear()
        self._stop_lazily = lazily
        self._stop_wanted = True
        if self.is_alive():
            os.eventfd_write(self._wake, 1)
        else:
            self._stop_done.set()

    def wait_stopped(self, timeout_s: float) -> bool:
        """Whether the service ended in time. Raises AgentError if it could not be released and stays."""
        if not self._stop_done.wait(timeout_s):
            return False
        if self._stop_error is not None:
            raise self._stop_error
        self.join()
        return True

    # The thread.

    def run(self) -> None:
        """Keep the process up until stopped."""
        delay_s = FIRST_DELAY_S
        try:
            self._output = open_output(self._output_path)
            while self.state is not State.ENDED:
                try:
                    self._bring_up()
                    up_since = time.monotonic()
                    self._watch()
                except _Stop:
                    if not self._left:
                        self._end_child()
                        self.clean()
                    self._change(State.ENDED)
                except AgentError as error:
                    if self.state is State.UP and time.monotonic() - up_since > STEADY_S:
                        delay_s = FIRST_DELAY_S
                    self._recover(error, delay_s)
                    delay_s = min(delay_s * 2, MAX_DELAY_S)
        except _Stop:  # while waiting for the next attempt; all is clean
            self._change(State.ENDED)
        except (AgentError, OSError) as error:
            log.error(f"{self.name}: supervision failed: {error}")
            self._first_error = error if isinstance(error, AgentError) else AgentError(str(error))
            self._change(State.ENDED)
        finally:
            if self._output >= 0:
                os.close(self._output)
            if not self._left:
                self._output_path.unlink(missing_ok=True)
            self._settled.set()
            self._stop_done.set()

    def _change(self, state: State) -> None:
        self.state = state
        self.on_change()

    def _bring_up(self) -> None:
        """Start or adopt the process, wait until it is ready, put it to use. Raises AgentError."""
        self._change(State.STARTING)
        if self._child is None and (orphan := self.orphan()):
            log.warning(f"{self.name}: pid {orphan} serves already and is taken over")
            with contextlib.suppress(OSError):  # it ended just now
                self._child = Child.adopt(orphan, start_time(orphan))
        if self._child is None:
            self.clean()
            argv = self.command()
            self.starts += 1
            self._lines.clear()
            # systemd's last sweep at shutdown spares names that begin with "@": swapping must go on.
            self._child = Child.spawn(argv, shown_as=f"@{Path(argv[0]).name}", output=self._output)
        self.pid, self.began = self._child.pid, self._child.began
        self.on_change()
        deadline = time.monotonic() + self.ready_timeout_s
        while not self.is_ready():
            if time.monotonic() > deadline:
                raise AgentError(
                    f"{self.name} was not ready within {self.ready_timeout_s:g} s", code=ExitCode.TIMEOUT
                )
            self._pump(POLL_S)
            self._check_child()
            if self._stop_wanted:
                raise _Stop
        self.activate()
        self.last_error = ""
        self._change(State.UP)
        self._settled.set()

    def _watch(self) -> None:
        """Until the process ends (AgentError) or is stopped."""
        while True:
            self._pump(None)
            self._check_child()
            if self._stop_wanted:
                self._change(State.STOPPING)
                try:
                    may_end = self.release(lazily=self._stop_lazily)
                except AgentError as error:
                    self._stop_wanted = False
                    self._change(State.UP)
                    self._stop_error = error
                    self._stop_done.set()
                    continue
                if not may_end:
                    self._leave_child()
                raise _Stop

    def _leave_child(self) -> None:
        """Let the process go on by itself. Its log stays: another agent may take it over."""
        self._left = True
        if self._child is not None:
            self._child.close()
            self._child = None
            self.pid = 0

    def _check_child(self) -> None:
        """Raise AgentError if the process has ended."""
        child = self._child
        if child is None or not select.select([child], [], [], 0)[0]:
            return
        self._drain()
        how, success = child.ending()
        child.close()
        self._child = None
        self.pid = 0
        said = self._last_words()
        reason = self.given_up(success=success)
        if reason:
            log.warning(f"{self.name}: {reason}")
            self.last_error = reason
            raise _Stop
        raise AgentError(f"{self.name}: tmem-guest {how}" + (f": {said}" if said else ""))

    def _last_words(self) -> str:
        """What the process said that may be why it ended: its errors, or else its warnings."""
        for level in ("error: ", "warn: "):
            said = [line.removeprefix(level) for line in self._lines if line.startswith(level)]
            if said:
                return "; ".join(said)
        return ""

    def _recover(self, error: AgentError, delay_s: float) -> None:
        """After a failure: clean up and wait for the next attempt."""
        self.last_error = str(error)
        log.error(f"{error}; trying again in {delay_s:g} s")
        if self._child is None or not self.is_vital():
            self._end_child()
            try:
                self.clean()
            except AgentError as left:
                log.error(f"{self.name}: {left}")
        if not self._settled.is_set():
            self._first_error = error
        self._change(State.WAITING)
        self._settled.set()
        deadline = time.monotonic() + delay_s
        while (left_s := deadline - time.monotonic()) > 0:
            self._pump(left_s)
            if self._stop_wanted:
                raise _Stop

    def _end_child(self) -> None:
        """Make sure the process is gone: ask, then force; but leave it where it is vital."""
        child = self._child
        if child is None:
            return
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if number is signal.SIGKILL and self.is_vital():
                log.error(f"{self.name}: pid {child.pid} does not end and is left running, for it is in use")
                self._leave_child()
                return
            child.signal(number)
            deadline = time.monotonic() + END_TIMEOUT_S
            while (left_s := deadline - time.monotonic()) > 0 and not select.select([child], [], [], 0)[0]:
                self._pump(min(left_s, 1.0))
        self._drain()
        child.ending()
        child.close()
        self._child = None
        self.pid = 0

    def run_tool(self, argv: list[str], timeout_s: float = TOOL_TIMEOUT_S) -> tuple[int, str]:
        """Run a short-lived program beside the process; returns its status and output. Raises AgentError."""
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise AgentError(f"cannot run {argv[0]}: {error}", code=ExitCode.UNAVAILABLE) from error
        with process:
            deadline = time.monotonic() + timeout_s
            while process.poll() is None:
                if time.monotonic() > deadline:
                    process.kill()
                    raise AgentError(
                        f"{' '.join(argv)} did not end in {timeout_s:g} s", code=ExitCode.TIMEOUT
                    )
                self._pump(POLL_S, heed_wake=False)
            output = process.stdout.read() if process.stdout else b""
            return process.returncode, output.decode(errors="replace").strip()

    def _pump(self, timeout_s: float | None, *, heed_wake: bool = True) -> None:
        """Relay what the process logs until something happens or the time is over."""
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        if heed_wake:
            poll.register(self._wake, select.POLLIN)
            if self._child is not None:
                poll.register(self._child, select.POLLIN)
        poll.poll(None if timeout_s is None else max(1, timeout_s * 1000))
        self._drain()
        if heed_wake:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)

    def _drain(self) -> None:
        try:
            while chunk := os.read(self._output, 65536):
                *lines, self._partial = (self._partial + chunk).split(b"\n")
                self._partial = self._partial[-4096:]
                for raw in lines:
                    line = raw.decode(errors="replace")
                    self._lines.append(line.removeprefix("tmem-guest: "))
                    log.relay(self.name, line)
        except BlockingIOError:
            return
