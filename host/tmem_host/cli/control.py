"""`tmemctl freeze`, `thaw` and `reclaim`."""

from __future__ import annotations

import click

from tmem_host.cli.context import Context
from tmem_host.cli.options import SIZE, json_option
from tmem_host.cli.output import print_json
from tmem_host.units import format_size

_PAGE_BYTES = 4096


@click.command()
@click.argument("vm")
@json_option
@click.pass_obj
def freeze(context: Context, vm: str, as_json: bool) -> None:
    """Refuse VM's new pages from now on; its gets and flushes go on."""
    _set_frozen(context, vm, True, as_json)


@click.command()
@click.argument("vm")
@json_option
@click.pass_obj
def thaw(context: Context, vm: str, as_json: bool) -> None:
    """Take VM's pages again."""
    _set_frozen(context, vm, False, as_json)


def _set_frozen(context: Context, vm: str, frozen: bool, as_json: bool) -> None:
    from tmem_host.api.types import VmChange  # noqa: PLC0415

    with context.client() as client:
        changed = client.change_vm(vm, VmChange(frozen=frozen))
    if as_json:
        print_json(changed)
        return
    click.echo(f"{changed.name}: {'frozen' if changed.frozen else 'thawed'}")


@click.command()
@click.argument("vm")
@click.argument("size", type=SIZE)
@json_option
@click.pass_obj
def reclaim(context: Context, vm: str, size: int, as_json: bool) -> None:
    """Ask VM's guest to move SIZE (64M) of its coldest swap pages to its own swap file.

    Returns at once; `tmemctl stats VM --json` shows reclaim_pending_pages going down.
    """
    pages = -(-size // _PAGE_BYTES)
    with context.client() as client:
        client.reclaim(vm, pages)
    if as_json:
        print_json({"vm": vm, "pages": pages})
        return
    click.echo(f"{vm}: asked for {pages} pages ({format_size(pages * _PAGE_BYTES)})")
