"""What a workload needs of a guest: commands with a deadline, live output, an exit code."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tmem_host.errors import OperatorError

OnOutput = Callable[[str], None]
"""Called with each piece of output as it arrives."""


class Shell(Protocol):
    """Runs commands in one guest; `tmem_host.vm.ssh.GuestShell` is one."""

    def run(
        self,
        command: str | Sequence[str],
        *,
        deadline_s: float,
        on_output: Callable[[Literal["stdout", "stderr"], bytes], None] | None = None,
        stdin: bytes = b"",
    ) -> int:
        """Run a command to its end and return its exit code. Raises OperatorError (TIMEOUT, UNAVAILABLE)."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has ended."""

    exit_code: int
    stdout: str
    stderr: str


class WorkloadError(OperatorError):
    """A command in the guest failed; `exit_code` is its own."""

    def __init__(self, message: str, *, exit_code: int, hint: str = "", vm: str | None = None) -> None:
        super().__init__(message, hint=hint, vm=vm)
        self.exit_code = exit_code


def finish(
    shell: Shell,
    argv: Sequence[str],
    *,
    deadline_s: float,
    on_output: OnOutput | None = None,
    stdin: bytes = b"",
) -> Finished:
    """Run a command to its end, whatever its exit code, and return what it wrote."""
    parts: dict[str, list[str]] = {"stdout": [], "stderr": []}
    decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in parts}

    def hear(name: Literal["stdout", "stderr"], data: bytes) -> None:
        text = decoders[name].decode(data)
        parts[name].append(text)
        if on_output is not None and text:
            on_output(text)

    exit_code = shell.run(argv, deadline_s=deadline_s, on_output=hear, stdin=stdin)
    return Finished(exit_code, "".join(parts["stdout"]), "".join(parts["stderr"]))


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
    finished = finish(shell, argv, deadline_s=deadline_s, on_output=on_output, stdin=stdin)
    if finished.exit_code != 0:
        last = (finished.stderr.strip() or finished.stdout.strip()).splitlines()[-1:]
        raise WorkloadError(
            f"{what} failed with exit code {finished.exit_code}" + (f": {last[0].strip()}" if last else ""),
            exit_code=finished.exit_code,
        )
    return finished.stdout


DATA = "/data"
"""Where the images mount their data disk."""
MOUNT = "/mnt/tmem"
"""Where `ensure_mounted` puts the tmem-backed file system over it."""


def ensure_mounted(shell: Shell) -> str:
    """Mount the guest's data disk through tmem unless something is mounted through tmem already; returns
    where."""
    found = mount_point(shell)
    if found is None:
        checked(shell, "making the mount point", ["mkdir", "-p", MOUNT], deadline_s=60)
        argv = ["tmem-agent", "mount", DATA, "--at", MOUNT]
        checked(shell, f"mounting {DATA} through tmem", argv, deadline_s=120)
        found = MOUNT
    return found


def mount_point(shell: Shell) -> str | None:
    """Where the tmem-backed file system is mounted in the guest; None if nowhere."""
    table = checked(shell, "reading the mount table", ["cat", "/proc/self/mounts"], deadline_s=60)
    points = [
        fields[1]
        for fields in map(str.split, table.splitlines())
        if fields[2].startswith("fuse") and "tmem" in fields[0] + fields[2]
    ]
    return points[-1].encode().decode("unicode_escape") if points else None
