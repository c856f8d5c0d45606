"""`agent.toml`: frozen types, checked once when read; unknown keys are refused with a suggestion."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from tmem_guest.errors import AgentError, ExitCode
from tmem_guest.units import parse_size

DEFAULT_PATH = Path("/etc/tmem/agent.toml")
PAGE_BYTES = 4096
MIN_SWAP_BYTES = 1 << 20
MAX_SWAP_PRIORITY = 32767


class MountConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[mount]]`: a directory whose page cache is extended into host memory."""

    directory: str
    """The lower directory."""
    at: str = ""
    """Where the file system appears; empty for over `directory` itself."""
    options: tuple[str, ...] = ()
    """More options for `tmem-guest fs`."""

    def __post_init__(self) -> None:
        for name, path in (("directory", self.directory), ("at", self.at or self.directory)):
            if not path.startswith("/"):
                raise ValueError(f"{name} is {path!r}, not an absolute path")

    @property
    def mount_point(self) -> str:
        """Where the file system appears."""
        return self.at or self.directory


class SwapConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[swap]`: a swap device whose pages go to the host first and to a swap file when the host refuses."""

    size: str | int
    """Size of device and swap file: bytes, or text such as `512M`."""
    file: str = "/swap.tmem"
    """The swap file."""
    device: Literal["auto", "ublk", "nbd"] = "auto"
    """How the kernel reaches the shim."""
    priority: int | None = None
    """Swap priority, 0 to 32767; unset for above every other swap that is on."""
    options: tuple[str, ...] = ()
    """More options for `tmem-guest swap`."""

    def __post_init__(self) -> None:
        if not self.file.startswith("/"):
            raise ValueError(f"file is {self.file!r}, not an absolute path")
        if self.size_bytes < MIN_SWAP_BYTES:
            raise ValueError(f"size is {self.size!r}; the least is 1M")
        if self.priority is not None and not 0 <= self.priority <= MAX_SWAP_PRIORITY:
            raise ValueError(f"priority is {self.priority}; 0 to {MAX_SWAP_PRIORITY} are allowed")

    @property
    def size_bytes(self) -> int:
        """The size, in whole pages. Raises ValueError if it is not one."""
        size_bytes = self.size if isinstance(self.size, int) else parse_size(self.size)
        return size_bytes - size_bytes % PAGE_BYTES


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file. Every key has a default: an agent without a file serves what commands ask for."""

    endpoint: str = "vsock:2:29805"
    """Where tmemd listens: `vsock:CID:PORT` or `unix:/path`."""
    runtime_directory: str = "/run/tmem"
    """Sockets and state that end with the boot."""
    tmem_guest: str = ""
    """The `tmem-guest` program; empty for the one beside this program, or on the PATH."""
    report_interval_s: float = 1.0
    """Seconds between two reports to the host."""
    ready_timeout_s: float = 60.0
    """Seconds a mount or swap device may take to come up."""
    mount: tuple[MountConfig, ...] = ()
    """File caches to serve from the start."""
    swap: SwapConfig | None = None
    """Swap to serve from the start."""

    def __post_init__(self) -> None:
        parse_endpoint(self.endpoint)
        for name, value in (
            ("report_interval_s", self.report_interval_s),
            ("ready_timeout_s", self.ready_timeout_s),
        ):
            if not value > 0:
                raise ValueError(f"{name} is {value:g}; it must be above 0")
        points = [mount.mount_point for mount in self.mount]
        for point in points:
            if points.count(point) > 1:
                raise ValueError(f"{point} is mounted twice")

    @property
    def socket_path(self) -> Path:
        """Where `tmem-agent`'s commands reach the daemon."""
        return Path(self.runtime_directory) / "agent.sock"


def parse_endpoint(text: str) -> tuple[int, int] | str:
    """The (CID, port) of a vsock endpoint, or the path of a unix one. Raises ValueError."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest.startswith("/"):
        return rest
    cid, _, port = rest.partition(":")
    if (
        scheme == "vsock"
        and cid.isdecimal()
        and port.isdecimal()
        and int(cid) < 1 << 32
        and int(port) < 1 << 32
    ):
        return int(cid), int(port)
    raise ValueError(f"endpoint is {text!r}; expected vsock:CID:PORT or unix:/path")


def load(path: Path | None) -> AgentConfig:
    """Read the file at `path`, or the default one if it exists. Raises AgentError."""
    chosen = path or DEFAULT_PATH
    try:
        text = chosen.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path is None:
            return AgentConfig()
        raise AgentError(
            f"the configuration {chosen} does not exist", hint="docs/guest.md shows one", code=ExitCode.USAGE
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise AgentError(f"cannot read the configuration {chosen}: {error}", code=ExitCode.USAGE) from error
    return parse(text, str(chosen))


def parse(text: str, name: str) -> AgentConfig:
    """The configuration in `text`; `name` is the file's, for messages. Raises AgentError."""
    try:
        return msgspec.convert(tomllib.loads(text), AgentConfig)
    except tomllib.TOMLDecodeError as error:
        raise AgentError(f"{name} is not valid TOML: {error}", code=ExitCode.USAGE) from error
    except msgspec.ValidationError as error:
        message, hint = _explain(str(error))
        raise AgentError(f"{name}: {message}", hint=hint, code=ExitCode.USAGE) from error


def _explain(message: str) -> tuple[str, str]:
    """What msgspec's message says in words of the file, and for an unknown key, which was meant."""
    what, _, where = message.partition(" - at `$")
    section = where.removesuffix("`").lstrip(".")
    prefix = "Object contains unknown field `"
    if what.startswith(prefix):
        import difflib  # only for a mistake  # noqa: PLC0415

        key = what.removeprefix(prefix).removesuffix("`")
        kinds: dict[str, type[msgspec.Struct]] = {"mount": MountConfig, "swap": SwapConfig}
        known = kinds.get(section.partition("[")[0], AgentConfig).__struct_fields__
        close = difflib.get_close_matches(key, known, n=1)
        place = f"{section}.{key}" if section else key
        return f"unknown key {place}", close[0] if close else f"one of {', '.join(known)}"
    return (f"{section}: {what}" if section else what), ""
