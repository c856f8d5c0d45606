"""`tmemctl policy get|set|list`."""

from __future__ import annotations

import click

from tmem_host.cli.context import Context
from tmem_host.cli.options import PARAMETER, json_option
from tmem_host.cli.output import print_json, print_table
from tmem_host.errors import ExitCode, OperatorError


@click.group()
def policy() -> None:
    """Choose how quotas are divided between VMs."""


@policy.command("list")
@json_option
def list_policies(as_json: bool) -> None:
    """List the policies and their parameters."""
    from tmem_host.policies import describe, names  # noqa: PLC0415

    entries = [describe(name) for name in names()]
    if as_json:
        print_json(
            [
                {
                    "name": entry.name,
                    "summary": entry.summary,
                    "parameters": [
                        {"name": each.name, "default": each.default, "low": each.low, "high": each.high}
                        for each in entry.parameters
                    ],
                }
                for entry in entries
            ]
        )
        return
    print_table(
        ("policy", "what it does", "parameters"),
        [
            (
                entry.name,
                entry.summary,
                ", ".join(f"{each.name}={each.default:g} ({each.summary})" for each in entry.parameters)
                or "-",
            )
            for entry in entries
        ],
    )


@policy.command("get")
@json_option
@click.pass_obj
def get(context: Context, as_json: bool) -> None:
    """Show the policy the controller follows."""
    with context.client() as client:
        current = client.policy()
    if as_json:
        print_json(current)
        return
    click.echo(" ".join([current.name, *(f"{key}={value}" for key, value in current.parameters.items())]))


@policy.command("set")
@click.argument("name")
@click.argument("parameters", nargs=-1, type=PARAMETER)
@json_option
@click.pass_obj
def set_policy(context: Context, name: str, parameters: tuple[tuple[str, str], ...], as_json: bool) -> None:
    """Follow the policy NAME from now on: `tmemctl policy set smart-alloc percent=4`."""
    from tmem_host.api.types import Policy  # noqa: PLC0415
    from tmem_host.policies import PolicyError, make  # noqa: PLC0415
    from tmem_host.policies.catalogue import UnknownPolicyError  # noqa: PLC0415

    values: dict[str, bool | int | float | str] = {}
    for key, text in parameters:
        try:
            values[key] = float(text)
        except ValueError:
            raise click.UsageError(f"{key}={text}: {text!r} is not a number") from None
    try:
        make(name, {key: float(value) for key, value in values.items()})
    except UnknownPolicyError as error:
        raise OperatorError(str(error), hint="tmemctl policy list", code=ExitCode.NOT_FOUND) from error
    except PolicyError as error:
        raise OperatorError(str(error), hint="tmemctl policy list", code=ExitCode.USAGE) from error
    with context.client() as client:
        current = client.set_policy(Policy(name=name, parameters=values))
    if as_json:
        print_json(current)
        return
    click.echo(f"policy {current.name}")
