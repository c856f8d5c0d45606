"""A `tmem-guest` process: started, or adopted from an agent that died before this one.

Children outlive their agent on purpose (the unit has `KillMode=process`): a swap device must not vanish
because the program that watches it was killed. So that nothing they log is lost in between, their stderr is a
named pipe that they hold open for reading, too: it fills up while nobody reads, and the next agent reads on.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tmem_guest.errors import AgentError, ExitCode


def start_time(pid: int) -> int:
    """When a process began, in clock ticks since boot: with the pid, its name for ever. Raises OSError."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(stat.rpartition(") ")[2].split()[19])


class Child:
    """A running process. Readable (`fileno`) once it has ended."""

    def __init__(self, pid: int, began: int, process: subprocess.Popen[bytes] | None) -> None:
        """Take charge of `pid`. Raises ProcessLookupError if it is gone."""
        self.pid = pid
        self.began = began
        self._process = process
        self._pidfd = os.pidfd_open(pid)

    @classmethod
    def spawn(cls, argv: list[str], *, shown_as: str, output: int) -> Child:
        """Start `argv`, named `shown_as` in the process table, with stdout and stderr going to `output`."""
        environment = {name: value for name, value in os.environ.items() if name not in _PRIVATE}
        try:
            process = subprocess.Popen(
                [shown_as, *argv[1:]],
                executable=argv[0],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise AgentError(
                f"the program {argv[0]} is not there",
                hint="set tmem_guest in agent.toml",
                code=ExitCode.UNAVAILABLE,
            ) from None
        except OSError as error:
            raise AgentError(f"cannot start {argv[0]}: {error}") from error
        return cls(process.pid, start_time(process.pid), process)

    @classmethod
    def adopt(cls, pid: int, began: int) -> Child | None:
        """Take charge of a process another agent started, unless it has ended."""
        try:
            child = cls(pid, began, None)
        except ProcessLookupError:
            return None
        try:
            same = start_time(pid) == began
        except OSError:
            same = False
        if same:
            return child
        child.close()
        return None

    def fileno(self) -> int:
        """A descriptor that is readable once the process has ended."""
        return self._pidfd

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended."""
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return

    def ending(self) -> tuple[str, bool]:
        """How the ended process ended, in words, and whether that was success (unknown counts as not)."""
        if self._process is None:
            return "ended (it was started by an earlier agent, so its status is not known)", False
        status = self._process.wait()
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}", False
        return f"exited with status {status}", status == 0

    def close(self) -> None:
        """Let go of the descriptor; the process is not touched."""
        os.close(self._pidfd)


_PRIVATE = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", "INVOCATION_ID"})


def open_output(path: Path) -> int:
    """Make, if need be, and open the named pipe that a child logs to; the descriptor does not block."""
    try:
        os.mkfifo(path, 0o600)
    except FileExistsError:
        if not path.is_fifo():
            raise AgentError(f"{path} is in the way: it is no named pipe", hint=f"rm {path}") from None
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
