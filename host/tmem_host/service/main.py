"""`tmemd`: its command line."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click
import msgspec

from tmem_host.config import TmemdConfig, load, parse
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.service import daemon, log

CONFIG = Path("/etc/tmem/tmemd.toml")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(path_type=Path), help=f"Configuration file [default: {CONFIG}].")
@click.option("--check", is_flag=True, help="Check the configuration and exit.")
@click.option("--arena", help="Arena: a file on tmpfs, or 'memfd'.")
@click.option("--memfd", is_flag=True, help="Keep pages in anonymous memory; the same as --arena memfd.")
@click.option("--capacity", help="Host memory to lend: a size such as 4G, or a share such as 25%.")
@click.option("--admin-socket", help="Path of the admin API's socket.")
@click.option("--vm-directory", help="Directory of the VMs' sockets.")
@click.option("--state-directory", help="Directory of what outlives a restart.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
def command(  # noqa: PLR0917  # click names them all
    config: Path | None,
    check: bool,
    arena: str | None,
    memfd: bool,
    capacity: str | None,
    admin_socket: str | None,
    vm_directory: str | None,
    state_directory: str | None,
    log_level: str | None,
) -> None:
    """Lend idle memory of this host, compressed, to its guests.

    Options override the configuration file.
    """
    options = {
        ("arena", "path"): "memfd" if memfd else arena,
        ("arena", "capacity"): capacity,
        ("sockets", "admin"): admin_socket,
        ("sockets", "vm_directory"): vm_directory,
        ("state", "directory"): state_directory,
        ("log", "level"): log_level,
    }
    try:
        chosen = configuration(config, options)
        if check:
            click.echo("the configuration is right")
            return
        log.set_up(chosen.log.level)
        asyncio.run(daemon.run(chosen))
    except OperatorError as error:
        click.echo(f"tmemd: {error}", err=True)
        sys.exit(error.code)


def configuration(path: Path | None, options: dict[tuple[str, str], str | None]) -> TmemdConfig:
    """The file's configuration with the given options over it. Raises OperatorError.

    Without a path, `/etc/tmem/tmemd.toml` is read if it exists.
    """
    if path is None:
        config = load(CONFIG, TmemdConfig) if CONFIG.exists() else TmemdConfig()
    else:
        config = load(path, TmemdConfig)
    data = msgspec.to_builtins(config)
    for (table, key), value in options.items():
        if value is not None:
            data[table][key] = value
    return parse(data, TmemdConfig, "command line")


def main() -> None:
    """Entry point."""
    try:
        command(prog_name="tmemd", standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"tmemd: {error.format_message()} (try: tmemd --help)", err=True)
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(ExitCode.FAILED)


if __name__ == "__main__":
    main()
