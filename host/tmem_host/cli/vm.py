"""`tmemctl vm up|down|list|ssh|console`; `register` and `unregister` are in `registration`."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Literal, cast

import click

from tmem_host.cli.context import Context
from tmem_host.cli.options import SIZE, deadline_option, json_option
from tmem_host.cli.output import print_json, print_table
from tmem_host.cli.registration import register, unregister
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.units import format_size

if TYPE_CHECKING:
    from tmem_host.vm.machine import Machine
    from tmem_host.vm.transport import TransportChoice

_LEAST_MEMORY_BYTES = 64 << 20


@click.group()
def vm() -> None:
    """Start, stop and enter test VMs; register others."""


vm.add_command(register)
vm.add_command(unregister)


@vm.command("up")
@click.argument("name")
@click.option("--image", "image_name", default="debian", show_default=True, help="`tmemctl image list`.")
@click.option("--memory", "memory_bytes", type=SIZE, default="512M", show_default=True, help="Of the guest.")
@click.option("--cpus", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--cid", type=int, help="vsock CID; default: a free one.")
@click.option("--quota", "quota_bytes", type=SIZE, help="Host memory it may use; default: tmemd's own.")
@click.option("--min", "min_bytes", type=SIZE, default="0", help="Guaranteed minimum of it.")
@click.option("--weight", type=click.IntRange(1, 10_000), default=100, show_default=True)
@click.option(
    "--transport",
    type=click.Choice(["auto", "vhost-vsock", "vhost-user", "vhost-device-vsock"]),
    default="auto",
    show_default=True,
    help="How vsock reaches the guest.",
)
@click.option("--virt", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", show_default=True)
@click.option("--no-tmem", is_flag=True, help="Do not register it with tmemd.")
@deadline_option(180)
@json_option
@click.pass_obj
def up(
    context: Context,
    *,
    name: str,
    image_name: str,
    memory_bytes: int,
    cpus: int,
    cid: int | None,
    quota_bytes: int | None,
    min_bytes: int,
    weight: int,
    transport: str,
    virt: str,
    no_tmem: bool,
    deadline_s: float,
    as_json: bool,
) -> None:
    """Start the VM NAME from an image and wait until its agent is there.

    Whatever fails, nothing of it is left behind.
    """
    from tmem_host.vm import machine  # noqa: PLC0415
    from tmem_host.vm.request import Registration, VmRequest  # noqa: PLC0415

    _check_memory(name, memory_bytes)
    registration = Registration(
        admin_socket=context.admin_socket, quota_bytes=quota_bytes, min_bytes=min_bytes, weight=weight
    )
    request = VmRequest(
        name=name,
        image=image_name,
        memory_bytes=memory_bytes,
        cpus=cpus,
        cid=cid,
        transport=cast("TransportChoice", transport),
        virt=cast("Literal['auto', 'kvm', 'tcg']", virt),
        register=None if no_tmem else registration,
        deadline_s=deadline_s,
    )
    made = machine.up(request, progress=lambda line: click.echo(line, err=as_json))
    if as_json:
        print_json(made.state)


def _check_memory(name: str, memory_bytes: int) -> None:
    import psutil  # noqa: PLC0415

    host_bytes = psutil.virtual_memory().total
    if not _LEAST_MEMORY_BYTES <= memory_bytes <= host_bytes:
        raise OperatorError(
            f"{format_size(memory_bytes)} of memory is not between {format_size(_LEAST_MEMORY_BYTES)} "
            f"and the host's {format_size(host_bytes)}",
            vm=name,
            code=ExitCode.USAGE,
        )


@vm.command("down")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "every", is_flag=True, help="All VMs that `vm up` started.")
@json_option
def down(names: tuple[str, ...], *, every: bool, as_json: bool) -> None:
    """Power VMs off at once, unregister them, remove their disks."""
    from tmem_host.vm import machine  # noqa: PLC0415

    if every == bool(names):
        raise click.UsageError("give the NAME of a VM, or --all")
    chosen = [each.state.name for each in machine.list_machines()] if every else list(names)
    for name in chosen:
        machine.down(name)
        if not as_json:
            click.echo(f"VM {name} is down")
    if as_json:
        print_json(chosen)


@vm.command("list")
@json_option
def list_vms(*, as_json: bool) -> None:
    """List the VMs that `vm up` started."""
    from tmem_host.vm import machine  # noqa: PLC0415

    found = machine.list_machines()
    if as_json:
        print_json([{"running": each.running, "state": each.state} for each in found])
        return
    print_table(
        ("VM", "image", "memory", "CPUs", "CID", "on", "vsock", "state"),
        [
            (
                each.state.name,
                each.state.image,
                format_size(each.state.memory_bytes),
                str(each.state.cpus),
                str(each.state.cid),
                each.state.virt,
                each.state.transport,
                "running" if each.running else "ended by itself",
            )
            for each in found
        ],
        empty="no VM is up",
    )


@vm.command("ssh", context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@deadline_option(86_400)
@json_option
@click.pass_context
def ssh(ctx: click.Context, *, name: str, command: tuple[str, ...], deadline_s: float, as_json: bool) -> None:
    """Run COMMAND in the guest as root, or a shell; options of COMMAND go behind `--`.

    The exit code is the command's own.
    """
    from tmem_host.vm import machine  # noqa: PLC0415

    found = machine.get(name)
    if not command:
        _log_in(found, as_json)
    pieces: dict[str, list[bytes]] = {"stdout": [], "stderr": []}

    def hear(stream: Literal["stdout", "stderr"], data: bytes) -> None:
        if as_json:
            pieces[stream].append(data)
            return
        out = sys.stdout.buffer if stream == "stdout" else sys.stderr.buffer
        out.write(data)
        out.flush()

    with found.ssh() as shell:
        exit_code = shell.run(list(command), deadline_s=deadline_s, on_output=hear)
    if as_json:
        texts = {stream: b"".join(parts).decode(errors="replace") for stream, parts in pieces.items()}
        print_json({"exit_code": exit_code, **texts})
    ctx.exit(exit_code)


def _log_in(found: Machine, as_json: bool) -> None:
    """Become OpenSSH's client: it knows how to be a terminal."""
    if as_json:
        raise click.UsageError("--json needs a COMMAND")
    argv = found.ssh_command()
    try:
        os.execvp(argv[0], argv)  # noqa: S606  # no shell is wanted
    except FileNotFoundError as error:
        raise OperatorError(
            "no ssh program for a login shell",
            hint="apt-get install openssh-client, or give a COMMAND",
            code=ExitCode.UNAVAILABLE,
        ) from error


@vm.command("console")
@click.argument("name")
@click.option("--lines", type=click.IntRange(min=1), default=50, show_default=True, help="The last so many.")
@click.option("--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@json_option
def show_console(*, name: str, lines: int, follow: bool, as_json: bool) -> None:
    """Show what the guest wrote to its console."""
    from tmem_host.vm import console, machine  # noqa: PLC0415

    found = machine.get(name)
    if as_json:
        if follow:
            raise click.UsageError("--follow and --json do not go together")
        print_json({"vm": name, "lines": found.console(lines)})
        return
    for line in found.console(lines):
        click.echo(line)
    if not follow:
        return
    never = threading.Event()
    with console.path(found.directory).open("rb") as file:
        file.seek(0, os.SEEK_END)
        while True:
            data = file.read()
            if data:
                click.echo(data, nl=False)
            never.wait(0.2)
