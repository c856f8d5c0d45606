"""`tmem-agent`: the daemon, and the commands that talk to it.

| module | holds |
|---|---|
| `main` | the command line (argparse: under emulation, importing click takes a quarter of a second) |
| `display` | what the commands print |
| `config` | agent.toml |
| `daemon` | the daemon: what it serves, its commands |
| `service`, `child` | supervision of one `tmem-guest` process |
| `mount`, `swap` | what is special about file caches and swap: refusals, mkswap, unmounting |
| `link`, `wire` | the control connection to tmemd |
| `pressure`, `mounts` | what the kernel knows: memory, mount table |
| `memory` | memory that is never swapped out |
| `commands`, `jsonline`, `state`, `notify`, `log` | sockets, what survives a crash of the agent, systemd |
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tmem_guest.errors import AgentError, ExitCode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tmem-agent", description="Extend this guest's page cache and swap into memory its host lends."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: /etc/tmem/agent.toml")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run the daemon; systemd does this")
    run.add_argument("--config", type=Path, default=argparse.SUPPRESS, metavar="FILE")
    check = commands.add_parser("check", help="read a configuration and say whether it is valid")
    check.add_argument("config", type=Path, nargs="?", default=argparse.SUPPRESS, metavar="FILE")
    status = commands.add_parser("status", help="mounts with hit ratios, swap, connection to the host")
    mount = commands.add_parser("mount", help="cache a directory in host memory")
    mount.add_argument("directory", metavar="DIR")
    mount.add_argument("--at", metavar="OTHER", help="mount there instead of over DIR itself")
    mount.add_argument(
        "--changes",
        choices=("watch", "check", "none"),
        help="how others' changes of DIR itself are met: told by the kernel (the default), asked for each "
        "time, or there are none, which is fastest",
    )
    umount = commands.add_parser("umount", help="end that")
    umount.add_argument("directory", metavar="DIR")
    umount.add_argument(
        "--lazy", action="store_true", help="even if it is in use: users keep what they have open"
    )
    swap = commands.add_parser("swap", help="swap to host memory").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    on = swap.add_parser("on", help="create, format and activate swap")
    on.add_argument("--size", required=True, help="for instance 512M")
    on.add_argument("--file", type=Path, default=Path("/swap.tmem"), help="takes the pages the host refuses")
    on.add_argument("--device", choices=("auto", "ublk", "nbd"), default="auto")
    on.add_argument("--priority", type=int, help="default: above every other swap")
    off = swap.add_parser("off", help="bring every page back and remove the swap file")
    off.add_argument("--keep-file", action="store_true")
    swap_status = swap.add_parser("status", help="where the swapped pages are")
    for each in (status, mount, umount, on, off, swap_status):
        each.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _request(options: argparse.Namespace) -> dict[str, object]:
    """The request that a command line asks for."""
    match options.command, getattr(options, "action", None):
        case "mount", _:
            at = {"at": str(Path(options.at).absolute())} if options.at else {}
            how = {"options": [f"--changes={options.changes}"]} if options.changes else {}
            return {"command": "mount", "directory": str(Path(options.directory).absolute()), **at, **how}
        case "umount", _:
            directory = str(Path(options.directory).absolute())
            return {"command": "umount", "directory": directory, "lazy": options.lazy}
        case "swap", "on":
            priority = {} if options.priority is None else {"priority": options.priority}
            file = str(options.file.absolute())
            return {
                "command": "swap on",
                "size": options.size,
                "file": file,
                "device": options.device,
                **priority,
            }
        case "swap", "off":
            return {"command": "swap off", "keep_file": options.keep_file}
        case _:
            return {"command": "status"}


def _dispatch(options: argparse.Namespace) -> None:
    from tmem_guest import config  # after the options are known to be good  # noqa: PLC0415

    settings = config.load(options.config)
    if options.command == "check":
        return
    if options.command == "run":
        from tmem_guest import daemon  # noqa: PLC0415

        daemon.run(settings)
        return
    from tmem_guest import display  # noqa: PLC0415

    swap_only = options.command == "swap"
    display.show(settings.socket_path, _request(options), swap_only=swap_only, as_json=options.json)


def main(argv: list[str] | None = None) -> None:
    """Run `tmem-agent`; exits with one of `ExitCode`."""
    options = _parser().parse_args(argv)
    try:
        _dispatch(options)
    except AgentError as error:
        print(f"tmem-agent: {error}", file=sys.stderr)
        sys.exit(int(error.code))
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.FAILED))


if __name__ == "__main__":
    main()
