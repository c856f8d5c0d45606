"""The program `tmem-controller`."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import click

from tmem_host.errors import ExitCode

_log = logging.getLogger("tmem_host.controller")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    envvar="TMEM_ADMIN_SOCKET",
    default=Path("/run/tmem/admin.sock"),
    show_default=True,
    help="tmemd's admin socket.",
)
@click.option(
    "--connect", envvar="TMEM_LIBVIRT_URI", default="qemu:///system", show_default=True, help="libvirt's URI."
)
@click.option("--no-libvirt", is_flag=True, help="Follow connected guests only; there is no libvirt here.")
@click.option(
    "--no-register",
    is_flag=True,
    help="Leave VMs that tmemd does not know alone; somebody else registers them.",
)
@click.option(
    "--interval", "interval_s", type=click.FloatRange(min=0.05), default=1.0, show_default=True,
    help="Seconds between two rounds.",
)  # fmt: skip
@click.option("--verbose", is_flag=True, help="Log details.")
def controller(
    socket: Path, connect: str, *, no_libvirt: bool, no_register: bool, interval_s: float, verbose: bool
) -> None:
    """Follow libvirt and tmemd, and move quota between running VMs.

    Runs until SIGTERM. A tmemd or libvirtd that is not there yet, or restarts, is waited for; meanwhile the
    last quotas stay in force.
    """
    # Imported here, so that --help and wrong options cost nothing.
    from tmem_host.api.client import Client  # noqa: PLC0415
    from tmem_host.controller.domains import DomainWatch  # noqa: PLC0415
    from tmem_host.controller.loop import Domains, Loop, NoDomains  # noqa: PLC0415
    from tmem_host.service import log  # noqa: PLC0415
    from tmem_host.service.notify import notify  # noqa: PLC0415

    log.set_up("debug" if verbose else "info")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    stop = threading.Event()
    wake = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        del frame
        _log.info("stopping on %s", signal.Signals(number).name)
        stop.set()
        wake.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    with ExitStack() as stack:
        client = stack.enter_context(Client(socket, timeout_s=5.0))
        domains: Domains
        if no_libvirt:
            domains = NoDomains()
        else:
            domains = stack.enter_context(DomainWatch(connect, interval_s=interval_s, wake=wake))
        loop = Loop(client, domains, register=not no_register)
        told = loop.state
        notify(f"READY=1\nSTATUS={told}")
        _log.info("following %s and %s", "no libvirt" if no_libvirt else connect, socket)
        # The first round waits for the first look at libvirt.
        wake.wait(interval_s)
        while not stop.is_set():
            wake.clear()
            loop.round()
            if loop.state != told:
                told = loop.state
                notify(f"STATUS={told}")
            wake.wait(interval_s)
        notify("STOPPING=1")
    sys.exit(ExitCode.OK)


def main() -> None:
    """Run `tmem-controller`."""
    try:
        controller(standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"tmem-controller: {error.format_message()} (try: tmem-controller --help)", err=True)
        sys.exit(ExitCode.USAGE)


if __name__ == "__main__":
    main()
