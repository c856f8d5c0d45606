"""`tmemctl vm register` and `unregister`: VMs that neither libvirt nor `vm up` brings."""

from __future__ import annotations

from pathlib import Path

import click

from tmem_host.cli.context import Context
from tmem_host.cli.options import SIZE, json_option
from tmem_host.cli.output import print_json
from tmem_host.units import format_size


@click.command()
@click.argument("name")
@click.option("--cid", type=int, help="vsock CID of the guest, on a host with /dev/vhost-vsock.")
@click.option(
    "--hybrid-socket",
    type=click.Path(path_type=Path),
    help="Path that Firecracker, Cloud Hypervisor or vhost-device-vsock was given.",
)
@click.option("--quota", "quota_bytes", type=SIZE, help="Host memory it may use; default: tmemd's own.")
@click.option("--min", "min_bytes", type=SIZE, default="0", help="Guaranteed minimum of it.")
@click.option("--weight", type=click.IntRange(1, 10_000), default=100, show_default=True)
@json_option
@click.pass_obj
def register(
    context: Context,
    *,
    name: str,
    cid: int | None,
    hybrid_socket: Path | None,
    quota_bytes: int | None,
    min_bytes: int,
    weight: int,
    as_json: bool,
) -> None:
    """Lend memory to the VM NAME, which something else than libvirt runs.

    Its guest is known by its CID or by the path of its socket; with neither given, the socket is
    /run/tmem/vm/NAME/vsock.sock.
    """
    from tmem_host.api.types import Cid, VmSpec  # noqa: PLC0415

    spec = VmSpec(
        cid=None if cid is None else Cid(cid),
        hybrid_socket=None if hybrid_socket is None else str(hybrid_socket.absolute()),
        quota_bytes=quota_bytes,
        min_bytes=min_bytes,
        weight=weight,
    )
    with context.client() as client:
        registered = client.add_vm(name, spec)
    if as_json:
        print_json(registered)
        return
    click.echo(f"{registered.name}: registered, quota {format_size(registered.quota_bytes)}")


@click.command()
@click.argument("name")
@json_option
@click.pass_obj
def unregister(context: Context, name: str, as_json: bool) -> None:
    """Forget the VM NAME and destroy its pages, swapped ones too: after it has been shut down."""
    with context.client() as client:
        client.remove_vm(name)
    if as_json:
        print_json({"name": name})
        return
    click.echo(f"{name}: forgotten, its pages destroyed")
