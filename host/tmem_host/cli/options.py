"""Options and argument types that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from tmem_host.units import parse_size

F = TypeVar("F", bound=Callable[..., object])


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """Bytes, written as `512M` or `1.5G`; never negative."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of what was written."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Parameter(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """`NAME=VALUE`."""

    name = "name=value"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """The name and the value as text."""
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not (name and equals and text):
            self.fail(f"{value!r} is not of the form NAME=VALUE, such as percent=4", param, ctx)
        return name, text


SIZE = Size()
PARAMETER = Parameter()


def json_option(command: F) -> F:
    """Add `--json` (parameter `as_json`)."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(command)


def deadline_option(default_s: float) -> Callable[[F], F]:
    """Add `--deadline SECONDS` (parameter `deadline_s`)."""
    return click.option(
        "--deadline",
        "deadline_s",
        type=click.FloatRange(min=1),
        default=default_s,
        show_default=True,
        help="Give up after this many seconds (exit code 6).",
    )
