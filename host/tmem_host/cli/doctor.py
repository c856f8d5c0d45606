"""`tmemctl doctor`."""

from __future__ import annotations

import click

from tmem_host.cli.context import Context
from tmem_host.cli.options import json_option
from tmem_host.cli.output import print_json, print_table
from tmem_host.errors import ExitCode


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, *, as_json: bool) -> None:
    """Say what this host can do, and what it lacks: each `ok`, `warn` or `fail`, with what to try.

    Exits 1 if something failed, 0 otherwise.
    """
    from tmem_host.cli.checks import run_all  # noqa: PLC0415

    assert isinstance(ctx.obj, Context)  # noqa: S101  # main put it there
    results = run_all(ctx.obj)
    if as_json:
        print_json(results)
    else:
        print_table(
            ("", "what", "found", "try"),
            [(each.state, each.name, each.found, each.hint or "-") for each in results],
        )
    if any(each.state == "fail" for each in results):
        ctx.exit(ExitCode.FAILED)
