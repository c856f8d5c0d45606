"""`tmemctl demo`, which `make demo` runs."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import click
from rich.console import Console

from tmem_host.api.types import Vm
from tmem_host.cli.options import json_option
from tmem_host.demo import leftovers, stack
from tmem_host.demo.progress import Progress
from tmem_host.demo.report import Report, VmReport, failures, final_table, write
from tmem_host.demo.scenario import Guest, Part, Start, fio_work, kernel_work
from tmem_host.demo.stack import Stack
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm import console as consoles
from tmem_host.vm import images, machine
from tmem_host.vm import state as machine_state
from tmem_host.vm.machine import Machine
from tmem_host.vm.request import Registration, VmRequest

T = TypeVar("T")

_MIB = 1 << 20
_IMAGE = "debian"
_BOOT_DEADLINE_S = 240.0
_SQUEEZE_AFTER_S = 15.0
_RELAX_AFTER_S = 30.0
_DEADLINE_S = 1800.0
_LEFTOVER_DEADLINE_S = 10.0

_CAPACITY = "96M"
_INITIAL_QUOTA_BYTES = 48 * _MIB
_SQUEEZED = "8M"
_RELAXED = "48M"


def parts() -> tuple[Part, ...]:
    """The two VMs."""
    return (
        Part(
            name="demo-fio",
            workload="fio mixed",
            memory_bytes=256 * _MIB,
            cpus=1,
            fill_bytes=192 * _MIB,
            pause_ms=400,
            compare=("mm",),
            work=fio_work("mixed", 48 * _MIB, 60),
        ),
        Part(
            name="demo-build",
            workload="kernel-build small",
            memory_bytes=256 * _MIB,
            cpus=2,
            fill_bytes=136 * _MIB,
            pause_ms=1000,
            compare=("mm", "kernel/sched"),
            work=kernel_work("small", 1),
        ),
    )


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/demo"),
    show_default=True,
    help="Directory of report.json and the logs.",
)
@json_option
def demo(*, output: Path, as_json: bool) -> None:
    """Show tmem on two real VMs that are short of memory (`make demo`).

    Boots them, runs fio in one and a kernel build in the other while both swap, changes a quota meanwhile,
    and prints what became of their pages. Exits 1 if a byte was wrong or something that should happen did
    not.
    """
    if os.geteuid() != 0:
        raise OperatorError(
            "the demonstration starts virtual machines, which needs root",
            hint="sudo make demo",
            code=ExitCode.PRIVILEGE,
        )
    output.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=as_json, highlight=False)
    report = _run(console, output)
    write(report, output / "report.json")
    if as_json:
        click.echo((output / "report.json").read_text(), nl=False)
    else:
        console.print(final_table(report))
        console.print(f"{report.virt.upper()}, {report.transport}, {report.seconds:.0f} s")
        console.print(f"the same as JSON: {output / 'report.json'}", soft_wrap=True)
    wrong = failures(report.vms)
    if wrong:
        raise OperatorError("; ".join(wrong), hint=f"see the logs in {output}")
    console.print("every byte was right, and nothing was left behind")


def _run(console: Console, output: Path) -> Report:
    """The whole of it; when this returns or raises, nothing is left, or what is left has been named."""
    directories: list[Path] = []
    with _unwound_in_peace() as unwinding:
        try:
            with Progress(console) as progress, ExitStack() as undo, unwinding:
                return _demonstrate(progress, undo, output, directories)
        finally:
            left = [*_left_behind(directories)]
            for line in left:
                console.print(f"left behind: {line}", markup=False)
            if left and sys.exc_info()[0] is None:
                raise OperatorError(
                    f"the demonstration left {len(left)} things behind", hint="the lines above"
                )


def _left_behind(directories: Sequence[Path]) -> Iterator[str]:
    for directory in directories:
        yield from leftovers.wait_until_none(directory, _LEFTOVER_DEADLINE_S)
    for part in parts():
        disks = images.cache_directory() / "vm" / part.name
        if directories and disks.exists():
            yield f"{disks} still exists"


@contextmanager
def _unwound_in_peace() -> Iterator[AbstractContextManager[None]]:
    """SIGTERM unwinds like Ctrl-C, and once unwinding has begun (the context given ends) neither disturbs
    it."""

    def interrupt(number: int, frame: object) -> None:
        del number, frame
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, interrupt) for number in numbers}

    @contextmanager
    def until_unwinding() -> Iterator[None]:
        try:
            yield
        finally:
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)

    try:
        yield until_unwinding()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _demonstrate(progress: Progress, undo: ExitStack, output: Path, directories: list[Path]) -> Report:
    images.build(_IMAGE, progress=progress.say)
    progress.say("starting libvirtd, tmemd and the controller")
    running = undo.enter_context(
        stack.running(output, capacity=_CAPACITY, made=directories.append, say=progress.say)
    )
    progress.say(running.tmemctl("policy", "set", "smart-alloc", "percent=6"))
    started_s = time.monotonic()
    chosen = parts()
    # The threads end when their VMs do, so they are joined after them.
    pool = undo.enter_context(ThreadPoolExecutor(2 * len(chosen), thread_name_prefix="vm"))
    machines = undo.enter_context(_machines(pool, chosen, running, progress))
    progress.say(f"both VMs are up after {time.monotonic() - started_s:.0f} s")
    progress.watch(lambda: _look(running))
    undo.callback(progress.watch, None)
    start = Start(len(chosen))
    undo.callback(start.abort_unless_passed)
    guests = [
        pool.submit(Guest(part, made, running, progress, start).play)
        for part, made in zip(chosen, machines, strict=True)
    ]
    _turn_the_quota(guests, start, running, progress, chosen[0].name)
    _wait_for(guests, _DEADLINE_S)
    vms = tuple(guest.result() for guest in guests)
    state = machines[0].state
    seconds = round(time.monotonic() - started_s, 1)
    progress.say("taking everything down")
    return Report(virt=state.virt, transport=state.transport, seconds=seconds, vms=vms)


def _look(running: Stack) -> Sequence[Vm]:
    with running.client() as client:
        return client.vms()


@contextmanager
def _machines(
    pool: ThreadPoolExecutor, chosen: Sequence[Part], running: Stack, progress: Progress
) -> Iterator[list[Machine]]:
    """The VMs, booted side by side; down afterwards, also those that were still booting."""
    boots = [pool.submit(_boot, part, running, progress) for part in chosen]
    try:
        _wait_for(boots, _BOOT_DEADLINE_S + 60)
        yield [boot.result() for boot in boots]
    finally:
        # A boot under way fails as soon as its VM is gone, and cleans up after itself.
        _down(chosen, running.logs)
        wait(boots, timeout=60)
        _down(chosen, running.logs)


def _boot(part: Part, running: Stack, progress: Progress) -> Machine:
    request = VmRequest(
        name=part.name,
        image=_IMAGE,
        memory_bytes=part.memory_bytes,
        cpus=part.cpus,
        register=Registration(admin_socket=running.admin_socket, quota_bytes=_INITIAL_QUOTA_BYTES),
        deadline_s=_BOOT_DEADLINE_S,
    )
    return machine.up(request, progress=progress.say)


def _down(chosen: Sequence[Part], logs: Path) -> None:
    for part in chosen:
        with suppress(OSError):
            shutil.copyfile(
                consoles.path(machine_state.directory(part.name)), logs / f"{part.name}.console.log"
            )
        with suppress(OperatorError):
            machine.down(part.name)


def _turn_the_quota(
    guests: Sequence[Future[VmReport]], start: Start, running: Stack, progress: Progress, name: str
) -> None:
    """While the workloads run, take quota from a VM with the CLI, and hand it back to the controller."""
    while not start.passed(timeout_s=0.5):
        if any(guest.done() for guest in guests):
            return
    for pause_s, arguments in (
        (_SQUEEZE_AFTER_S, ("quota", "set", name, _SQUEEZED)),
        (_RELAX_AFTER_S, ("quota", "set", name, _RELAXED, "--unpin")),
    ):
        if wait(guests, timeout=pause_s, return_when=FIRST_EXCEPTION).done:
            return
        progress.say(f"tmemctl {' '.join(arguments)}: {running.tmemctl(*arguments)}")


def _wait_for(futures: Sequence[Future[T]], deadline_s: float) -> None:
    """Wait until all are done; raises the first one's failure at once."""
    done, pending = wait(futures, timeout=deadline_s, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    if pending:
        raise OperatorError(
            f"{len(pending)} VMs were not done within {deadline_s:g} s",
            hint="see the logs",
            code=ExitCode.TIMEOUT,
        )
