"""A part of the Linux kernel, compiled in the guest on the tmem-backed mount.

The image has Debian's kernel sources on its data disk, configured (`tinyconfig`) and prepared when the
image was built, so that a guest spends its time compiling, reading sources and writing objects through the
mount.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import msgspec

from tmem_host.errors import ExitCode, OperatorError
from tmem_host.workloads.shell import OnOutput, Shell, WorkloadError, checked, finish


@dataclass(frozen=True, slots=True)
class Target:
    """What to compile."""

    name: str
    summary: str
    make: tuple[str, ...]
    """Targets of the kernel's own make."""


TARGETS = {
    target.name: target
    for target in (
        Target("small", "init/ and kernel/locking/", ("init/", "kernel/locking/")),
        Target("time", "kernel/time/", ("kernel/time/",)),
        Target("lib", "lib/", ("lib/",)),
        Target("mm", "mm/, memory management", ("mm/",)),
        Target("core", "kernel/ and mm/", ("kernel/", "mm/")),
        Target("vmlinux", "the whole tiny kernel; tens of minutes on an emulated CPU", ("vmlinux",)),
    )
}


class KernelResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was compiled."""

    target: str
    exit_code: int
    seconds: float
    objects: int
    """Files compiled."""


def target(name: str) -> Target:
    """A target by name, or a directory of the kernel's sources (`fs/proc/`). Raises OperatorError
    (NOT_FOUND)."""
    if name in TARGETS:
        return TARGETS[name]
    if re.fullmatch(r"[a-z0-9_]+(/[a-zA-Z0-9_-]+)*/", name):
        return Target(name, f"{name} of the kernel's sources", (name,))
    raise OperatorError(
        f"no kernel-build target is called {name!r}",
        hint=f"one of {', '.join(TARGETS)}, or a directory of the sources such as fs/proc/",
        code=ExitCode.NOT_FOUND,
    )


def run(
    shell: Shell,
    chosen: Target,
    *,
    source: str,
    jobs: int = 2,
    deadline_s: float,
    on_output: OnOutput | None = None,
) -> KernelResult:
    """Compile, from sources below `source`; objects of an earlier run are removed first.

    Raises WorkloadError with make's exit code if it fails, and OperatorError (TIMEOUT) when the deadline
    passes.
    """
    started_s = time.monotonic()
    directories = [f"{source}/{each}" for each in chosen.make if each.endswith("/")] or [source]
    for directory in directories:
        if shell.run(["test", "-d", directory], deadline_s=60) != 0:
            raise OperatorError(
                f"there is no {directory} in the guest",
                hint="a VM of the image debian has kernel sources there; is the tmem file system mounted?",
                code=ExitCode.NOT_FOUND,
            )
    checked(
        shell,
        "removing old objects",
        ["find", *directories, "(", "-name", "*.o", "-o", "-name", "*.a", ")", "-delete"],
        deadline_s=deadline_s,
    )
    left_s = max(1.0, deadline_s - (time.monotonic() - started_s))
    started_s = time.monotonic()
    finished = finish(
        shell, ["make", "-C", source, f"-j{jobs}", *chosen.make], deadline_s=left_s, on_output=on_output
    )
    seconds = time.monotonic() - started_s
    if finished.exit_code != 0:
        complaints = [line for line in finished.stderr.splitlines() if "rror" in line or "Killed" in line]
        raise WorkloadError(
            f"the kernel build failed with exit code {finished.exit_code}"
            + (f": {complaints[0].strip()}" if complaints else ""),
            exit_code=finished.exit_code,
        )
    objects = compiled(finished.stdout)
    if objects == 0:
        raise OperatorError("the kernel build compiled nothing", hint="a --target with sources in it")
    return KernelResult(target=chosen.name, exit_code=0, seconds=seconds, objects=objects)


def compiled(text: str) -> int:
    """How many files make's output says were compiled."""
    return len(re.findall(r"^  (?:CC|AS) ", text, re.MULTILINE))
