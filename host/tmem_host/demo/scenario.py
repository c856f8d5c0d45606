"""What each VM of the demonstration goes through.

boot → tmem swap on, tmem mount → checksums of files on the disk itself → the same files read through
the mount → memory filled beyond what is free → (both VMs are there) → the workload, while the memory is
verified → the files read through the mount again → the memory verified to its end
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from tmem_host.api.types import Vm
from tmem_host.demo.progress import Progress
from tmem_host.demo.report import VmReport
from tmem_host.demo.stack import Stack
from tmem_host.errors import OperatorError
from tmem_host.vm.machine import Machine
from tmem_host.workloads import fio, kernel, memory
from tmem_host.workloads.shell import DATA, OnOutput, Shell, WorkloadError, checked, ensure_mounted, finish

_SWAP = "512M"
_SUMS = "/run/tmem-demo.sums"
_STEP_DEADLINE_S = 300.0
_WORK_DEADLINE_S = 900.0
_FILL_DEADLINE_S = 240.0
_JOURNAL_DEADLINE_S = 60.0

Work = Callable[[Shell, str, OnOutput], None]
"""Runs a workload, given the mount point; raises if it fails."""


@dataclass(frozen=True, slots=True)
class Part:
    """A VM and what it does."""

    name: str
    workload: str
    """As the report names it."""
    memory_bytes: int
    cpus: int
    fill_bytes: int
    """What the memory program fills."""
    pause_ms: int
    """Its pause after each MiB: slow passes leave the memory cold enough to be swapped, and the workload in
    peace."""
    compare: tuple[str, ...]
    """Directories, below the kernel sources, whose files are compared with the originals."""
    work: Work


def fio_work(profile: str, size_bytes: int, seconds: int) -> Work:
    """fio on the mount."""

    def work(shell: Shell, mount: str, on_output: OnOutput) -> None:
        chosen = fio.profile(profile, size_bytes=size_bytes, seconds=seconds)
        fio.run(shell, chosen, directory=f"{mount}/fio", deadline_s=_WORK_DEADLINE_S, on_output=on_output)

    return work


def kernel_work(target: str, jobs: int) -> Work:
    """A kernel build on the mount."""

    def work(shell: Shell, mount: str, on_output: OnOutput) -> None:
        kernel.run(
            shell,
            kernel.target(target),
            source=f"{mount}/linux",
            jobs=jobs,
            deadline_s=_WORK_DEADLINE_S,
            on_output=on_output,
        )

    return work


class Start:
    """Lets the workloads begin when all VMs are short of memory, and tells when that was."""

    def __init__(self, parties: int) -> None:
        self._barrier = threading.Barrier(parties, action=self._pass)
        self._passed = threading.Event()

    def wait(self) -> None:
        """Wait for the others. Raises OperatorError if one of them failed meanwhile."""
        try:
            self._barrier.wait(_WORK_DEADLINE_S)
        except threading.BrokenBarrierError as error:
            raise OperatorError("another VM failed before this one's workload began") from error

    def passed(self, timeout_s: float) -> bool:
        """Whether the workloads have begun, waiting for it so long."""
        return self._passed.wait(timeout_s)

    def abort_unless_passed(self) -> None:
        """Let nobody wait for a VM that has failed."""
        if not self._passed.is_set():
            self._barrier.abort()

    def _pass(self) -> None:
        self._passed.set()


class Guest:
    """One VM from its boot to its report; runs in a thread of its own."""

    def __init__(self, part: Part, machine: Machine, stack: Stack, progress: Progress, start: Start) -> None:
        self._part = part
        self._machine = machine
        self._stack = stack
        self._progress = progress
        self._start = start

    def play(self) -> VmReport:
        """Go through it all. Raises OperatorError if anything failed or any byte was wrong."""
        try:
            with self._machine.ssh() as shell, self._machine.ssh() as second:
                try:
                    return self._play(shell, second)
                finally:
                    self._keep_journal(shell)
        except OperatorError as error:
            error.vm = self._part.name
            raise
        finally:
            # Whatever happened, nobody waits for this VM any longer.
            self._start.abort_unless_passed()

    def _play(self, shell: Shell, second: Shell) -> VmReport:
        part, phase = self._part, self._phase
        phase("turning on tmem swap, mounting through tmem")
        checked(
            shell,
            "turning on swap",
            ["tmem-agent", "swap", "on", "--size", _SWAP],
            deadline_s=_STEP_DEADLINE_S,
        )
        mount = ensure_mounted(shell)
        phase("compiling the memory program, computing checksums of the originals")
        memory.prepare(shell)
        self._sum(shell)
        self._compare(shell, mount)
        phase("filling memory")
        with ThreadPoolExecutor(1, thread_name_prefix=f"{part.name}-memory") as pool:
            filled = threading.Event()
            verifier = pool.submit(self._fill, second, filled)
            try:
                self._wait_until_filled(filled, verifier)
                phase("waiting for the other VM")
                self._start.wait()
                phase(f"running {part.workload}, short of memory")
                seconds = self._work(shell, mount, verifier)
                at_end = self._look()
                phase("comparing files read through the mount with the originals, short of memory")
                self._compare(shell, mount)
                phase("verifying swapped memory")
            finally:
                memory.stop(shell)
            verified = verifier.result()
        self._progress.say(f"{part.name}: {verified.pages_verified} pages of memory verified, all intact")
        return self._report(seconds, at_end, self._look())

    def _keep_journal(self, shell: Shell) -> None:
        """Keep what the guest's kernel and agent logged, for whoever wants to know why it failed."""
        with suppress(OperatorError):
            text = finish(
                shell, ["journalctl", "--boot", "--no-pager"], deadline_s=_JOURNAL_DEADLINE_S
            ).stdout
            (self._stack.logs / f"{self._part.name}.journal.log").write_text(text)

    def _phase(self, text: str) -> None:
        self._progress.phase(self._part.name, text)

    def _sum(self, shell: Shell) -> None:
        """Checksums of the files on the disk itself, past tmem."""
        where = " ".join(self._part.compare)
        command = f"cd {DATA}/linux && find {where} -type f -print0 | xargs -0 sha256sum > {_SUMS}"
        checked(shell, "computing checksums", ["sh", "-c", command], deadline_s=_STEP_DEADLINE_S)

    def _compare(self, shell: Shell, mount: str) -> None:
        """Read the files through the mount, past the guest's page cache, and compare."""
        command = f"echo 1 > /proc/sys/vm/drop_caches; cd {mount}/linux && sha256sum --check --quiet {_SUMS}"
        try:
            checked(shell, "comparing files", ["sh", "-c", command], deadline_s=_STEP_DEADLINE_S)
        except WorkloadError as error:
            raise OperatorError(
                f"files read through the mount differ from the originals: {error.message}"
            ) from error

    def _fill(self, shell: Shell, filled: threading.Event) -> memory.MemoryResult:
        def hear(piece: str) -> None:
            if "filled" in piece:
                filled.set()

        return memory.run(
            shell,
            size_bytes=self._part.fill_bytes,
            seconds=int(_WORK_DEADLINE_S),
            pause_ms=self._part.pause_ms,
            deadline_s=_WORK_DEADLINE_S + _STEP_DEADLINE_S,
            on_output=hear,
        )

    def _wait_until_filled(self, filled: threading.Event, verifier: Future[memory.MemoryResult]) -> None:
        until_s = time.monotonic() + _FILL_DEADLINE_S
        while not filled.wait(0.2):
            if verifier.done():
                verifier.result()
            if time.monotonic() > until_s:
                raise OperatorError(f"memory was not filled within {_FILL_DEADLINE_S:g} s")

    def _work(self, shell: Shell, mount: str, verifier: Future[memory.MemoryResult]) -> float:
        started_s = time.monotonic()
        self._part.work(shell, mount, self._progress.hear(self._part.name))
        if verifier.done():
            # It should hold the memory until it is told to stop.
            verifier.result()
            raise OperatorError("the memory program ended before the workload did")
        return time.monotonic() - started_s

    def _look(self) -> Vm:
        with self._stack.client() as client:
            return client.vm(self._part.name)

    def _report(self, seconds: float, at_end: Vm, final: Vm) -> VmReport:
        if final.report is None:
            raise OperatorError("its agent never reported")
        sectors = self._machine.block_stats()
        return VmReport(
            name=self._part.name,
            workload=self._part.workload,
            seconds=round(seconds, 1),
            puts_accepted=final.puts_accepted,
            puts_refused=final.puts_refused,
            gets_hit=final.gets_hit,
            gets_missed=final.gets_missed,
            pages_flushed=final.pages_flushed,
            pages_evicted=final.pages_evicted,
            stored_bytes=at_end.stored_bytes,
            raw_bytes=at_end.raw_bytes,
            quota_bytes=final.quota_bytes,
            quota_changes=final.quota_changes,
            swap_pages_in=final.report.swap_in_pages,
            swap_pages_out=final.report.swap_out_pages,
            sectors_read=sectors.sectors_read,
            sectors_written=sectors.sectors_written,
        )
