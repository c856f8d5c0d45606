"""What a workload needs of a guest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tmem_host.errors import OperatorError

OnOutput = Callable[[str], None]
"""Called with each piece of output as it arrives."""

DIRECTORY = "/mnt/tmem"
"""Where the guest's agent mounts the tmem-backed file system."""


class Finished(Protocol):
    """A command that has ended."""

    @property
    def exit_code(self) -> int:
        """As in a shell; 128 + n if a signal ended it."""
        ...

    @property
    def stdout(self) -> str:
        """What it wrote to stdout."""
        ...

    @property
    def stderr(self) -> str:
        """What it wrote to stderr."""
        ...


class Shell(Protocol):
    """Runs commands in one guest."""

    def run(
        self, argv: Sequence[str], *, deadline_s: float, on_output: OnOutput | None = None, stdin: bytes = b""
    ) -> Finished:
        """Run a command to its end. Raises OperatorError (TIMEOUT) when the deadline passes."""
        ...


class WorkloadError(OperatorError):
    """A command in the guest failed; `exit_code` is its own."""

    def __init__(self, message: str, *, exit_code: int, hint: str = "", vm: str | None = None) -> None:
        super().__init__(message, hint=hint, vm=vm)
        self.exit_code = exit_code


def checked(
    shell: Shell,
    what: str,
    argv: Sequence[str],
    *,
    deadline_s: float,
    on_output: OnOutput | None = None,
    stdin: bytes = b"",
) -> str:
    """Run a command that must succeed and return its stdout; `what` names it in the error."""
    finished = shell.run(argv, deadline_s=deadline_s, on_output=on_output, stdin=stdin)
    if finished.exit_code != 0:
        last = (finished.stderr.strip() or finished.stdout.strip()).splitlines()[-1:]
        raise WorkloadError(
            f"{what} failed with exit code {finished.exit_code}" + (f": {last[0].strip()}" if last else ""),
            exit_code=finished.exit_code,
        )
    return finished.stdout
