"""The program `tmemctl`: finds the command, and turns failures into one line on stderr and an exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path

import click

from tmem_host.cli.context import Context
from tmem_host.errors import ExitCode, OperatorError

COMMANDS = {
    "doctor": ("tmem_host.cli.doctor:doctor", "Say what this host can do, and what it lacks."),
    "image": ("tmem_host.cli.image:image", "Build and list VM images."),
    "vm": ("tmem_host.cli.vm:vm", "Start, stop and enter test VMs."),
    "quota": ("tmem_host.cli.quota:quota", "Show and set how much host memory a VM may use."),
    "pool": ("tmem_host.cli.pool:pool", "Show the pools of VMs."),
    "stats": ("tmem_host.cli.stats:stats", "Show each VM's pages, hits and refusals."),
    "policy": ("tmem_host.cli.policy:policy", "Choose how quotas are divided between VMs."),
    "freeze": ("tmem_host.cli.control:freeze", "Refuse a VM's new pages; gets and flushes go on."),
    "thaw": ("tmem_host.cli.control:thaw", "Take a frozen VM's pages again."),
    "reclaim": ("tmem_host.cli.control:reclaim", "Ask a guest to take persistent pages back."),
    "run": ("tmem_host.cli.run:run", "Run a workload in a VM."),
    "demo": ("tmem_host.demo.main:demo", "Run the demonstration on two real VMs."),
}
"""Command → where it is, and its line in the help (so that help imports none of them)."""

_TRACEBACK = "TMEM_TRACEBACK"
"""Environment variable for developers: failures are shown with where they came from."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class LazyGroup(click.Group):
    """Imports a command's module only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, in the order of the table."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)  # noqa: S101  # the table above is ours
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tmem", prog_name="tmemctl")
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    envvar="TMEM_ADMIN_SOCKET",
    default=Path("/run/tmem/admin.sock"),
    show_default=True,
    show_envvar=True,
    help="tmemd's admin socket.",
)
@click.option(
    "--connect",
    envvar="TMEM_LIBVIRT_URI",
    default="qemu:///system",
    show_default=True,
    show_envvar=True,
    help="libvirt's URI.",
)
@click.pass_context
def tmemctl(ctx: click.Context, socket: Path, connect: str) -> None:
    """Lend this host's idle memory to VMs, and see what they do with it.

    Every command takes --json. Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict,
    5 tmemd, libvirtd or guest not there, 6 deadline passed, 7 not root, 8 no space.
    """
    ctx.obj = Context(socket, connect)


def main(argv: list[str] | None = None) -> None:
    """Run `tmemctl` and exit with its code."""
    sys.exit(run(argv))


def run(argv: list[str] | None = None) -> int:
    """Run `tmemctl` with these arguments (default: the process's own) and return its exit code."""
    try:
        result = tmemctl.main(args=argv, prog_name="tmemctl", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if _TRACEBACK in os.environ:
            raise
        line, code = _explain(error)
        if line:
            print(f"tmemctl: {line}", file=sys.stderr)
        return code
    # click hands back what `ctx.exit(code)` was given, or the command's return value.
    return result if isinstance(result, int) else ExitCode.OK


def _explain(error: BaseException) -> tuple[str, int]:  # noqa: PLR0911  # a table of kinds
    """The line for stderr (empty for none) and the exit code."""
    match error:
        case OperatorError():
            return str(error), error.code
        case click.exceptions.NoArgsIsHelpError():
            return "a command is needed; --help lists them", ExitCode.USAGE
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "tmemctl"
            return f"{error.format_message()} (try: {command} --help)", ExitCode.USAGE
        case click.ClickException():
            return error.format_message(), ExitCode.FAILED
        case BrokenPipeError():
            # The reader (`head`, say) has what it wanted. Python would complain again when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return "", ExitCode.OK
        case click.Abort() | KeyboardInterrupt():
            return "interrupted", INTERRUPTED
        case OSError():
            return _explain_os(error)
        case _:
            # A mistake of ours. Whoever operates this has no use for its traceback, whoever repairs it has.
            what = " ".join(f"{type(error).__name__}: {error}".split())
            return f"unexpected failure: {what} (try: {_TRACEBACK}=1 shows where)", ExitCode.FAILED


def _explain_os(error: OSError) -> tuple[str, int]:
    """The line and the exit code of what the system refused without anybody expecting it."""
    what = f"{error.filename}: {error.strerror}" if error.filename else " ".join(str(error).split())
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return f"{what} (try: as root)", ExitCode.PRIVILEGE
        case errno.ENOSPC | errno.EDQUOT | errno.ENOMEM:
            return f"{what} (try: free some)", ExitCode.NO_SPACE
        case _:
            return what, ExitCode.FAILED


if __name__ == "__main__":
    main()
