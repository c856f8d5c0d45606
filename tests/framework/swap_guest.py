"""A guest of the image `mini` that swaps through the shim, and programs in it that verify their memory."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path

from tmem_host.errors import OperatorError
from tmem_host.vm.machine import Machine
from tmem_host.vm.ssh import GuestShell

MIB = 1 << 20
COMMAND_S = 120.0
CONNECT_S = 150.0
"""SSH's own processes may wait for their pages: half a minute and more when an NBD server has died."""
VERIFIER = "/usr/bin/tmem-memory"
FILE = "/data/swap.tmem"
_CONTROL = "/run/tmem/swap.sock"
_STOP = "/run/verify.stop"
_CGROUPS = "/sys/fs/cgroup"
_POLL_S = 0.3
# The serving process: the one whose parent is another of the same name.
_SERVER = (
    "for p in $(pidof tmem-guest); do "
    "q=$(awk '/^PPid/{print $2}' /proc/$p/status); "
    "[ $(cat /proc/$q/comm) = tmem-guest ] && echo $p; done; true"
)
# What the shim's threads wait for.
_THREADS = (
    "for t in $(pidof tmem-guest | sed 's,[0-9]*,/proc/&/task/*,g'); do "
    "echo $t $(cat $t/comm $t/wchan); cat $t/stack; done; true"
)


@cache
def verifier() -> bytes:
    """The workloads' memory program, built on the host: `mini` has no compiler."""
    source = files("tmem_host.workloads") / "memory.c"
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "memory")
        options = ["-O2", "-static", "-s", "-x", "c", "-o", str(target), "-"]
        subprocess.run(["gcc", *options], input=source.read_bytes(), check=True)
        return target.read_bytes()


class SwapGuest:
    """The guest; tmemd may go away at any time, and SSH with it."""

    def __init__(self, up: Machine) -> None:
        self.up = up
        self.device = ""
        self._shell: GuestShell | None = None
        self._verifiers = 0

    def run(self, line: str) -> str:
        """A shell line that must succeed. It may be run twice if the connection breaks under it."""
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                if self._shell is None:
                    self._shell = self.up.ssh()
                return self._shell.check(line, deadline_s=COMMAND_S)
            except OperatorError as error:
                if "ended with" in error.message or time.monotonic() > deadline:
                    error.add_note("\n".join(self.up.console(40)))
                    raise
                self.close()
                time.sleep(_POLL_S)

    def close(self) -> None:
        """End the SSH connection, if there is one."""
        shell, self._shell = self._shell, None
        if shell is not None:
            with suppress(OperatorError, OSError, EOFError):
                shell.close()

    # ── the shim ───────────────────────────────────────────────────────────────────────────────────────────

    def swap_on(self, device: str, *options: str, size_mib: int) -> None:
        """Start the shim, format its device and turn swap on."""
        words = f"--device {device} --file {FILE} --size {size_mib}M --require-protection {' '.join(options)}"
        self.run(f"rm -f {_CONTROL}; setsid tmem-guest swap {words} > /run/swap.log 2>&1 < /dev/null &")
        self.until(self._ready, "the shim serves its device")
        self.device = str(self.status()["device"])
        assert "is ready" in self.log(), (
            "instead of to a file, which may be swapped out, the shim logs to the kernel"
        )
        self.run(f"mkswap {self.device} > /dev/null && swapon -dpages {self.device}")

    def _ready(self) -> bool:
        if self.run("pidof tmem-guest || true") == "":
            raise AssertionError(f"the shim ended:\n{self.log()}")
        return self.run(f"test -S {_CONTROL} && echo yes || true") != ""

    def swap_off(self) -> None:
        """Turn swap off and end the shim, which must leave nothing behind."""
        self.run(f"swapoff {self.device}")
        self.run(f"kill -TERM {self.keeper()}")
        self.await_end()

    def await_end(self) -> None:
        """Wait until the shim, which was told to, has ended."""
        try:
            self.until(lambda: self.run("pidof tmem-guest || true") == "", "the shim ends")
        except AssertionError as error:
            error.add_note(self.run(_THREADS) + self.log())
            raise
        self.device = ""

    def keeper(self) -> int:
        """Process id of the serving process's parent, which a service manager knows."""
        return int(self.run(f"awk '/^PPid/{{print $2}}' /proc/{self.server()}/status"))

    def server(self) -> int:
        """Process id of the serving process."""
        return int(self.run(_SERVER).split()[0])

    def kill_server(self) -> None:
        """kill -9 of the serving process; returns when its parent has started another, which answers."""
        before = self.status()["restarts"]
        self.run(f"kill -9 {self.server()}")
        self.until(lambda: self.status()["restarts"] > before, "another server serves")

    def ask(self, **request: object) -> dict[str, int]:
        """One request to the control socket; the answer, which must say that all is well."""
        line = json.dumps(request)
        answer = self.run(f"echo '{line}' | socat -t 10 - UNIX-CONNECT:{_CONTROL}")
        told: dict[str, int] = json.loads(answer)
        assert told["ok"], told
        return told

    def status(self) -> dict[str, int]:
        """The shim's counters. While one server takes over from another there are none; wait for that."""
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                return self.ask(op="status")
            except (OperatorError, ValueError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)

    def log(self) -> str:
        """What the shim said, to a file as it started and to the kernel's log since, and the kernel of it."""
        return self.run("cat /run/swap.log; dmesg | grep -e tmem-guest -e nbd | tail -n 40")

    # ── programs that use memory ───────────────────────────────────────────────────────────────────────────

    def verify(self, processes: int, size_mib: int, memory_mib: int | None = None) -> None:
        """Start programs that fill memory and verify it, pass after pass, until told to stop.

        With `memory_mib` they have so much together, and nothing else in the guest is swapped out for them.
        """
        enter = "" if memory_mib is None else self.limited("verify", memory_mib)
        self.run(f"rm -f {_STOP} /run/verify.*")
        self._verifiers = processes
        for number in range(processes):
            # Should memory run out, it is not for them to end. The shell that waits for one keeps its memory.
            body = f"({enter}exec {VERIFIER} {size_mib} 86400 {_STOP} 0)"
            body = f"echo -900 > /proc/self/oom_score_adj; {body}"
            log = f"/run/verify.{number}"
            self.run(f"setsid sh -c '{body}; echo $? > {log}.exit' > {log}.log 2>&1 < /dev/null &")
        self.until(
            lambda: self.run("cat /run/verify.*.log 2>/dev/null || true").count("filled") == processes,
            "memory is filled",
        )

    def limited(self, group: str, memory_mib: int) -> str:
        """What a shell says to have, together with others that say it, so much memory."""
        self.run(f"mkdir -p {_CGROUPS}/{group}; echo {memory_mib}M > {_CGROUPS}/{group}/memory.max")
        return f"echo 0 > {_CGROUPS}/{group}/cgroup.procs; "

    def assert_verifying(self) -> None:
        """None of the programs has found anything wrong, or ended otherwise."""
        ended = self.run("tail -n 3 /run/verify.*.exit /run/verify.*.log 2>/dev/null | head -n 40; true")
        assert ".exit" not in ended, f"{ended}\n{self.log()}"

    def moved(self, status: dict[str, int] | None = None) -> int:
        """Pages that came back from swap so far."""
        status = status or self.status()
        return status["reads_host"] + status["reads_file"]

    def await_reads(self, pages: int) -> None:
        """Wait until this many more pages came back from swap, all of them as they were written."""
        target = self.moved() + pages
        self.until(lambda: self.moved() >= target, f"{pages} more pages come back from swap")
        self.assert_verifying()

    def stop_verifying(self) -> None:
        """Have the programs check all of their memory once more, and end."""
        self.run(f"touch {_STOP}")
        self.until(
            lambda: self.run("ls /run/verify.*.exit 2>/dev/null | wc -l").strip() == str(self._verifiers),
            "the programs end",
            deadline_s=400.0,
        )
        assert self.run("cat /run/verify.*.exit").split() == ["0"] * self._verifiers, self.run(
            "tail -n 3 /run/verify.*.log"
        )

    def until(self, true: Callable[[], bool], what: str, deadline_s: float = 120.0) -> None:
        """Poll until it is true."""
        deadline = time.monotonic() + deadline_s
        while not true():
            assert time.monotonic() < deadline, f"waited {deadline_s:g} s in vain until {what}"
            time.sleep(_POLL_S)
