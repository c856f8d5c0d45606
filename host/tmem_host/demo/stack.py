"""libvirtd, tmemd and the controller for the time of the demonstration, apart from any that run already.

Sockets, state, arena and the VMs' directories are in one private directory on tmpfs, which is removed at
the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tmem_host.api.client import Client
from tmem_host.demo import leftovers
from tmem_host.demo.leftovers import ENVIRONMENT_KEY
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm import libvirtd, machine

_TMPFS = Path("/dev/shm")  # noqa: S108  # the arena must be on tmpfs; the directory's name is mkdtemp's
_PREFIX = "tmem-demo-"
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.05
_LAST_LINES = 5


class Stack:
    """What runs, and how to talk to it."""

    def __init__(self, directory: Path, logs: Path) -> None:
        self.directory = directory
        self.logs = logs
        self.admin_socket = directory / "admin.sock"
        self.environment = {
            **os.environ,
            ENVIRONMENT_KEY: str(directory),
            "TMEM_ADMIN_SOCKET": str(self.admin_socket),
            "TMEM_VM_DIRECTORY": str(directory / "vm"),
            "TMEM_LIBVIRT_URI": libvirtd.URI,
            "PYTHONUNBUFFERED": "1",
        }

    def client(self) -> Client:
        """A client of this stack's tmemd."""
        return Client(self.admin_socket)

    def tmemctl(self, *arguments: str) -> str:
        """Run the CLI against this stack, as an operator would; returns what it printed. Raises
        OperatorError."""
        argv = [sys.executable, "-m", "tmem_host.cli.main", *arguments]
        done = subprocess.run(
            argv, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise OperatorError(f"tmemctl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout.strip()


@contextmanager
def running(
    logs: Path, *, capacity: str, made: Callable[[Path], None], say: Callable[[str], None]
) -> Iterator[Stack]:
    """The stack, ready; everything it started or made is gone afterwards.

    `made` is told the private directory as soon as there is one, so that its end can be checked. What an
    earlier stack that was killed could not remove itself is removed first, and said.
    """
    with ExitStack() as stack:
        stack.enter_context(libvirtd.running())
        for dead in leftovers.dead(_TMPFS, _PREFIX):
            say(f"removing what is left of a demonstration that was killed: {dead}")
            _remove(dead)
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_TMPFS))
        stack.enter_context(leftovers.alive(directory))
        made(directory)
        stack.callback(shutil.rmtree, directory)
        (directory / "vm").mkdir()
        started = Stack(directory, logs)
        # `tmem_host.vm` in this process reads the same setting as its children.
        stack.enter_context(_vm_directory(directory))
        options = {
            "--capacity": capacity,
            "--arena": directory / "arena",
            "--admin-socket": started.admin_socket,
            "--vm-directory": directory / "vm",
            "--state-directory": directory / "state",
        }
        arguments = [str(word) for option in options.items() for word in option]
        tmemd = stack.enter_context(_process(started, "tmemd", ["-m", "tmem_host.service.main", *arguments]))
        _wait_for_answer(started, tmemd)
        # Without registering: VMs that are not the demonstration's may run under the same libvirtd.
        controller = ["-m", "tmem_host.controller.main", "--no-register"]
        stack.enter_context(_process(started, "controller", controller))
        yield started


@contextmanager
def _vm_directory(directory: Path) -> Iterator[None]:
    before = os.environ.get("TMEM_VM_DIRECTORY")
    os.environ["TMEM_VM_DIRECTORY"] = str(directory / "vm")
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMEM_VM_DIRECTORY"]
        else:
            os.environ["TMEM_VM_DIRECTORY"] = before


def _remove(directory: Path) -> None:
    """Remove a stack that nobody looks after any more: its VMs, processes and files. Raises OperatorError."""
    # First, because QEMU cannot end in order without the device that its VM had from tmemd.
    for pid in leftovers.processes(directory):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    with _vm_directory(directory):
        for left in machine.list_machines():
            machine.down(left.state.name)
    shutil.rmtree(directory)
    still = leftovers.wait_until_none(directory, _STOP_TIMEOUT_S)
    if still:
        raise OperatorError(
            f"a demonstration was killed, and of it {still[0]}",
            hint="end it, and start the demonstration again",
        )


@contextmanager
def _process(stack: Stack, name: str, arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program of ours, its output in a log file; told to stop, and waited for, at the end."""
    with (stack.logs / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            # Should this process be killed, its children are not left behind.
            ["setpriv", "--pdeathsig", "TERM", sys.executable, *arguments],
            env=stack.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Ctrl-C is for this process alone: it stops the others in their order.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_answer(stack: Stack, tmemd: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + _START_TIMEOUT_S
    with stack.client() as client:
        while True:
            try:
                client.status()
            except OperatorError as error:
                ended = tmemd.poll() is not None
                if not ended and time.monotonic() < until_s:
                    time.sleep(_POLL_S)  # a poll with a deadline
                    continue
                lines = (stack.logs / "tmemd.log").read_text(errors="replace").splitlines()[-_LAST_LINES:]
                what = "ended" if ended else f"did not answer within {_START_TIMEOUT_S:g} s"
                raise OperatorError(
                    f"tmemd was started and {what}: {' | '.join(lines) or error.message}",
                    hint=f"see {stack.logs / 'tmemd.log'}",
                    code=ExitCode.UNAVAILABLE,
                ) from error
            else:
                return
