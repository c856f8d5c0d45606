"""`tmemctl demo`."""

from __future__ import annotations

import click


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False
)
@click.pass_context
def demo(ctx: click.Context) -> None:
    """Run the demonstration on two real VMs (`make demo`)."""
    from tmem_host.demo.main import run  # noqa: PLC0415

    ctx.exit(run(ctx.args))
