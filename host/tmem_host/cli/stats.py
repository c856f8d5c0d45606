"""`tmemctl stats [--watch]`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import click

from tmem_host.cli.context import Context
from tmem_host.cli.options import json_option
from tmem_host.cli.output import print_json, print_table, table
from tmem_host.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tmem_host.api.client import Client
    from tmem_host.api.types import Status, Vm

HEADINGS = (
    "VM", "quota", "stored", "pages as", "accepted", "refused", "hit", "missed", "flushed", "evicted",
    "swapped in", "out", "pressure", "state",
)  # fmt: skip


@click.command()
@click.argument("vm", required=False)
@click.option("--watch", is_flag=True, help="Show again every interval, until Ctrl-C.")
@click.option(
    "--interval", "interval_s", type=click.FloatRange(min=0.1), default=1.0, show_default=True,
    help="Seconds between two looks with --watch.",
)  # fmt: skip
@json_option
@click.pass_obj
def stats(context: Context, vm: str | None, watch: bool, interval_s: float, as_json: bool) -> None:
    """Show the daemon's memory and each VM's counters; with --json and --watch, one JSON object a line."""
    with context.client() as client:
        if watch:
            _watch(client, vm, interval_s, as_json)
            return
        status, vms = _look(client, vm)
    if as_json:
        print_json({"status": status, "vms": vms})
        return
    click.echo(summary(status))
    print_table(HEADINGS, [row(each) for each in vms], empty="no VM is registered")


def _look(client: Client, vm: str | None) -> tuple[Status, Sequence[Vm]]:
    return client.status(), [client.vm(vm)] if vm else client.vms()


def _watch(client: Client, vm: str | None, interval_s: float, as_json: bool) -> None:
    never = threading.Event()
    if as_json:
        import msgspec  # noqa: PLC0415

        while True:
            status, vms = _look(client, vm)
            click.echo(msgspec.json.encode({"status": status, "vms": vms}))
            never.wait(interval_s)
    from rich.console import Group  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    with Live(auto_refresh=False) as live:
        while True:
            status, vms = _look(client, vm)
            live.update(
                Group(Text(summary(status)), table(HEADINGS, [row(each) for each in vms])), refresh=True
            )
            never.wait(interval_s)


def summary(status: Status) -> str:
    """One line about the daemon's memory."""
    ratio = f", compressed {status.raw_bytes / status.used_bytes:.1f} to 1" if status.used_bytes else ""
    return (
        f"{format_size(status.used_bytes)} of {format_size(status.capacity_bytes)} lent "
        f"in {status.pages} pages{ratio}; {status.vms} VMs, {status.connections} connections"
    )


def row(vm: Vm) -> tuple[str, ...]:
    """A VM's line in the table."""
    report = vm.report
    states = [word for word, holds in (("pinned", vm.pinned), ("frozen", vm.frozen)) if holds]
    if not vm.connections:
        states.append("not connected")
    return (
        vm.name,
        format_size(vm.quota_bytes),
        format_size(vm.stored_bytes),
        format_size(vm.raw_bytes),
        str(vm.puts_accepted),
        str(vm.puts_refused),
        str(vm.gets_hit),
        str(vm.gets_missed),
        str(vm.pages_flushed),
        str(vm.pages_evicted),
        str(report.swap_in_pages) if report else "-",
        str(report.swap_out_pages) if report else "-",
        f"{report.psi_some_avg10:.0f} %" if report else "-",
        ", ".join(states) or "ok",
    )
