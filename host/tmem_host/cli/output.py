"""What commands print: JSON for programs, tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table


def print_json(value: object) -> None:
    """Print a struct, or a list or mapping of them, as indented JSON."""
    import msgspec  # noqa: PLC0415  # only commands that are asked for JSON pay for it

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table; columns that hold nothing but numbers and sizes (`-` for none) are aligned right."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415  # rich takes 0.1 s to import
    from rich.table import Table  # noqa: PLC0415

    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, heading in enumerate(headings):
        numbers = all(row[index][:1].isdigit() or row[index] == "-" for row in rows)
        made.add_column(heading, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str = "nothing") -> None:
    """Print a table, or the line `empty` if there are no rows."""
    from rich.console import Console  # noqa: PLC0415

    if not rows:
        click.echo(empty)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        # A pipe has no width: whoever reads it wants whole lines.
        console = Console(highlight=False, width=400)
    console.print(table(headings, rows))
