"""`tmemctl image build|list`."""

from __future__ import annotations

import click

from tmem_host.cli.options import json_option
from tmem_host.cli.output import print_json, print_table
from tmem_host.units import format_size


@click.group()
def image() -> None:
    """Build and list VM images."""


@image.command("build")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--force", is_flag=True, help="Build again even if the image is in the cache.")
@json_option
def build(names: tuple[str, ...], *, force: bool, as_json: bool) -> None:
    """Build the images named (default: debian) unless they are in the cache; takes minutes, needs root."""
    from tmem_host.vm import images  # noqa: PLC0415

    built = [
        images.build(name, force=force, progress=lambda line: click.echo(line, err=as_json))
        for name in names or ("debian",)
    ]
    if as_json:
        print_json([{"name": each.name, "path": str(each.path)} for each in built])
        return
    for each in built:
        click.echo(f"{each.name}: {each.path}")


@image.command("list")
@json_option
def list_images(as_json: bool) -> None:
    """List the images there are, built or not."""
    from tmem_host.vm import images  # noqa: PLC0415

    found = images.list_images()
    if as_json:
        print_json(
            [
                {
                    "name": each.name,
                    "description": each.description,
                    "digest": each.digest,
                    "built": each.built,
                    "path": str(each.path),
                    "size_bytes": each.size_bytes,
                }
                for each in found
            ]
        )
        return
    print_table(
        ("image", "built", "size", "what it is"),
        [
            (
                each.name,
                "yes" if each.built else "no",
                format_size(each.size_bytes) if each.built else "-",
                each.description,
            )
            for each in found
        ],
    )
