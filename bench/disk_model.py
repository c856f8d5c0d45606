"""The disk that comparisons of guests with a disk are made with.

An emulated guest's processor is several times slower than a real one, while the disk that the host gives it
is not: beside such a guest any disk looks fast. So the disk is made slower by the same factor. `measure` runs
one program (`guest/cpu.c`) on the host and in the guest by turns; the factor is the quotient of the times.
The disk is a cloud disk's baseline, 3000 operations and 125 MB a second, divided by the factor. With KVM the
factor is 1. A kernel build has a factor of its own, see `build_slowdown`.

    model = disk_model.measure(guest, shell)
    with model.on(guest):
        ...  # the guest's data disk is the cloud disk
    records.append(model.record())

Give the unthrottled figure beside each that was measured on the model.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from record import Record, record
from tmem_host.vm.domain import DiskLimits
from tmem_host.vm.machine import Machine
from tmem_host.vm.ssh import GuestShell

CLOUD_IOPS = 3000
CLOUD_BYTES_PER_S = 125_000_000
ROUNDS = 5
_PROGRAMS = ("sort", "compress", "interpret", "pipe")
_DIRECTORY = Path(__file__).parent / "guest"
_PLACE = "/run/tmem-bench"
_RUN_S = 120.0


@functools.cache
def guest_program(name: str) -> bytes:
    """`guest/NAME.c`, built on the host as a static program, which runs there and in every image."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, name)
        options = ["-O2", "-static", "-s", "-pthread", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["gcc", *options, "-o", target, _DIRECTORY / f"{name}.c"], check=True)
        return target.read_bytes()


def install(shell: GuestShell, name: str) -> str:
    """Put `guest/NAME.c` into the guest, in memory; returns its path there."""
    path = f"{_PLACE}/{name}"
    shell.put(guest_program(name), path, mode=0o755, deadline_s=_RUN_S)
    return path


@dataclass(frozen=True)
class DiskModel:
    """How much slower the guest's processor is than the host's, and the disk that goes with it."""

    slowdown: float
    """Geometric mean of the medians of `parts`; 1 with KVM."""
    parts: dict[str, float]
    """Of each program that was measured."""
    samples: int

    @classmethod
    def of(cls, quotients: Mapping[str, Sequence[float]]) -> DiskModel:
        """From each program's times in the guest, as multiples of its times on the host."""
        parts = {name: statistics.median(values) for name, values in quotients.items()}
        slowdown = math.prod(parts.values()) ** (1 / len(parts))
        return cls(max(1.0, slowdown), parts, min(map(len, quotients.values())))

    @property
    def limits(self) -> DiskLimits:
        """The cloud disk, reads and writes together."""
        return DiskLimits(
            total_iops=max(1, round(CLOUD_IOPS / self.slowdown)),
            total_bytes=max(4096, round(CLOUD_BYTES_PER_S / self.slowdown)),
        )

    @contextmanager
    def on(self, guest: Machine) -> Iterator[None]:
        """Make the guest's data disk the cloud disk while the block runs."""
        guest.set_disk_limits(self.limits)
        try:
            yield
        finally:
            guest.set_disk_limits(DiskLimits())

    def record(self) -> Record:
        """The factor, for the benchmark's results."""
        return record("tcg_slowdown", "times", self.slowdown, better="lower", samples=self.samples)

    def __str__(self) -> str:
        """A line for people."""
        parts = ", ".join(f"{name} {value:.1f}" for name, value in self.parts.items())
        limits = self.limits
        return (
            f"the guest's processor is {self.slowdown:.1f} times slower than the host's ({parts}); "
            f"cloud disk: {limits.total_iops} IOPS, {(limits.total_bytes or 0) / 1e6:.1f} MB/s"
        )


def measure(guest: Machine, shell: GuestShell, rounds: int = ROUNDS) -> DiskModel:
    """Measure the factor, in about 10 s. The machine should be quiet."""
    if guest.state.virt == "kvm":
        return DiskModel(1.0, dict.fromkeys(_PROGRAMS, 1.0), 0)
    there = install(shell, "cpu")
    quotients: dict[str, list[float]] = {name: [] for name in _PROGRAMS}
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch, "cpu")
        here.write_bytes(guest_program("cpu"))
        here.chmod(0o755)
        for _ in range(rounds):
            native = json.loads(subprocess.check_output([here], timeout=_RUN_S))
            emulated = json.loads(shell.check(there, deadline_s=_RUN_S))
            for name in _PROGRAMS:
                quotients[name].append(emulated[name] / native[name])
    return DiskModel.of(quotients)
