"""`tmemctl quota get|set`."""

from __future__ import annotations

import click

from tmem_host.cli.context import Context
from tmem_host.cli.options import SIZE, json_option
from tmem_host.cli.output import print_json, print_table
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.units import format_size

HEADINGS = ("VM", "quota", "stored", "minimum", "weight", "pinned")


@click.group()
def quota() -> None:
    """Show and set how much host memory a VM may use."""


@quota.command("get")
@click.argument("vm", required=False)
@json_option
@click.pass_obj
def get(context: Context, vm: str | None, as_json: bool) -> None:
    """Show the quota of one VM, or of all."""
    with context.client() as client:
        vms = [client.vm(vm)] if vm else client.vms()
    if as_json:
        keys = ("name", "quota_bytes", "stored_bytes", "min_bytes", "weight", "pinned")
        rows = [{key: getattr(each, key) for key in keys} for each in vms]
        print_json(rows[0] if vm else rows)
        return
    print_table(
        HEADINGS,
        [
            (
                each.name,
                format_size(each.quota_bytes),
                format_size(each.stored_bytes),
                format_size(each.min_bytes),
                str(each.weight),
                "yes" if each.pinned else "no",
            )
            for each in vms
        ],
        empty="no VM is registered",
    )


# Unknown options are ignored so that `quota set a -5M` reaches the size's own, clearer, refusal.
@quota.command("set", context_settings={"ignore_unknown_options": True})
@click.argument("vm")
@click.argument("size", type=SIZE, required=False)
@click.option("--unpin", is_flag=True, help="Let the controller decide again (with SIZE: starting from it).")
@click.option("--min", "min_bytes", type=SIZE, help="Guaranteed minimum.")
@click.option("--weight", type=click.IntRange(1, 10_000), help="Share relative to other VMs.")
@json_option
@click.pass_obj
def set_quota(
    context: Context,
    *,
    vm: str,
    size: int | None,
    unpin: bool,
    min_bytes: int | None,
    weight: int | None,
    as_json: bool,
) -> None:
    """Give VM a quota of SIZE (512M, 1.5G) and pin it: the controller leaves it alone until --unpin."""
    from tmem_host.api.types import VmChange  # noqa: PLC0415

    if size is None and not unpin and min_bytes is None and weight is None:
        raise click.UsageError("nothing to set: give a SIZE, --unpin, --min or --weight")
    pinned = False if unpin else (True if size is not None else None)
    with context.client() as client:
        if size is not None:
            capacity_bytes = client.status().capacity_bytes
            if size > capacity_bytes:
                raise OperatorError(
                    f"{format_size(size)} is more than tmemd may lend, {format_size(capacity_bytes)}",
                    hint="a smaller quota, or a larger capacity in /etc/tmem/tmemd.toml",
                    vm=vm,
                    code=ExitCode.USAGE,
                )
        changed = client.change_vm(
            vm, VmChange(quota_bytes=size, min_bytes=min_bytes, weight=weight, pinned=pinned)
        )
    if as_json:
        print_json(changed)
        return
    click.echo(
        f"{changed.name}: quota {format_size(changed.quota_bytes)}, "
        f"{'pinned' if changed.pinned else 'not pinned'}, "
        f"minimum {format_size(changed.min_bytes)}, weight {changed.weight}"
    )
