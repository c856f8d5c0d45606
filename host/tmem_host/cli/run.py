"""`tmemctl run fio|kernel-build`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from tmem_host.cli.options import SIZE, deadline_option, json_option
from tmem_host.cli.output import print_json
from tmem_host.units import format_size

if TYPE_CHECKING:
    from tmem_host.vm.ssh import GuestShell


@click.group()
def run() -> None:
    """Run a workload in a VM, on its tmem-backed file system.

    Output is shown as it comes. The exit code is the workload's own if it fails.
    """


@contextmanager
def _in_guest(ctx: click.Context, vm: str) -> Iterator[GuestShell]:
    """A shell in the guest; a workload that fails ends the command with its own exit code."""
    from tmem_host.vm import machine  # noqa: PLC0415
    from tmem_host.workloads.shell import WorkloadError  # noqa: PLC0415

    with machine.get(vm).ssh() as shell:
        try:
            yield shell
        except WorkloadError as error:
            error.vm = vm
            click.echo(f"tmemctl: {error}", err=True)
            ctx.exit(error.exit_code)


def _live(as_json: bool) -> Callable[[str], None]:
    """Shows output as it comes: on stdout, or on stderr if stdout is for JSON."""
    return lambda piece: click.echo(piece, nl=False, err=as_json)


@run.command("fio")
@click.argument("vm")
@click.option("--profile", "profile_name", default="randread", show_default=True, help="`--list` shows them.")
@click.option("--size", "size_bytes", type=SIZE, help="Of all files together.")
@click.option("--seconds", type=click.IntRange(min=1), help="How long to measure.")
@click.option("--directory", help="In the guest; default: `fio` on the tmem-backed file system.")
@deadline_option(1800)
@json_option
@click.pass_context
def fio_command(
    ctx: click.Context,
    *,
    vm: str,
    profile_name: str,
    size_bytes: int | None,
    seconds: int | None,
    directory: str | None,
    deadline_s: float,
    as_json: bool,
) -> None:
    """Run fio: randread, seqread, mixed or verify."""
    from tmem_host.workloads import fio, shell  # noqa: PLC0415

    chosen = fio.profile(profile_name, size_bytes=size_bytes, seconds=seconds)
    with _in_guest(ctx, vm) as guest:
        result = fio.run(
            guest,
            chosen,
            directory=directory or f"{shell.ensure_mounted(guest)}/fio",
            deadline_s=deadline_s,
            on_output=_live(as_json),
        )
    if as_json:
        print_json(result)
        return
    click.echo()
    for way, moved, iops, rate, p99 in (
        ("read", result.read_bytes, result.read_iops, result.read_bytes_per_s, result.read_p99_us),
        ("wrote", result.write_bytes, result.write_iops, result.write_bytes_per_s, result.write_p99_us),
    ):
        if moved:
            click.echo(
                f"{vm}: {way} {format_size(moved)} in {result.seconds:.0f} s, {iops:.0f} a second, "
                f"{format_size(int(rate))}/s, 99 % within {p99:.0f} us"
            )


@run.command("kernel-build")
@click.argument("vm")
@click.option(
    "--target",
    "target_name",
    default="small",
    show_default=True,
    help="small, time, lib, mm, core, vmlinux, or a directory of the sources.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Compilers at once.")
@deadline_option(3600)
@json_option
@click.pass_context
def kernel_command(
    ctx: click.Context, *, vm: str, target_name: str, jobs: int, deadline_s: float, as_json: bool
) -> None:
    """Compile a part of the Linux kernel."""
    from tmem_host.workloads import kernel, shell  # noqa: PLC0415

    chosen = kernel.target(target_name)
    with _in_guest(ctx, vm) as guest:
        result = kernel.run(
            guest,
            chosen,
            source=f"{shell.ensure_mounted(guest)}/linux",
            jobs=jobs,
            deadline_s=deadline_s,
            on_output=_live(as_json),
        )
    if as_json:
        print_json(result)
        return
    click.echo(f"{vm}: {result.objects} files compiled in {result.seconds:.0f} s")
