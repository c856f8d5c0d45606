"""`tmemctl pool list`."""

from __future__ import annotations

import click

from tmem_host.cli.context import Context
from tmem_host.cli.options import json_option
from tmem_host.cli.output import print_json, print_table
from tmem_host.units import format_size

HEADINGS = (
    "VM",
    "pool",
    "kind",
    "id",
    "pages",
    "stored",
    "accepted",
    "refused",
    "hit",
    "missed",
    "flushed",
    "evicted",
)


@click.group()
def pool() -> None:
    """Show the pools of VMs."""


@pool.command("list")
@click.argument("vm", required=False)
@json_option
@click.pass_obj
def list_pools(context: Context, vm: str | None, as_json: bool) -> None:
    """List the pools of one VM, or of all."""
    with context.client() as client:
        names = [vm] if vm else [each.name for each in client.vms()]
        pools = [each for name in names for each in client.pools(name)]
    if as_json:
        print_json(pools)
        return
    print_table(
        HEADINGS,
        [
            (
                each.vm,
                each.name,
                f"{each.kind}, {'shared' if each.shared else 'exclusive' if each.exclusive else 'private'}",
                str(each.id),
                str(each.pages),
                format_size(each.stored_bytes),
                str(each.puts_accepted),
                str(each.puts_refused),
                str(each.gets_hit),
                str(each.gets_missed),
                str(each.pages_flushed),
                str(each.pages_evicted),
            )
            for each in pools
        ],
        empty="no pools",
    )
