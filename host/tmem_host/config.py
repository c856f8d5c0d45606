"""Configuration files: TOML, read into frozen structs, refused with file, key and a suggestion."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tmem_host.errors import ExitCode, OperatorError
from tmem_host.units import parse_size

T = TypeVar("T", bound=msgspec.Struct)


def resolve_capacity(capacity: str, host_memory_bytes: int) -> int:
    """Bytes of a size (`4G`) or of a share of the host's memory (`25%`); ValueError for anything else."""
    if capacity.endswith("%"):
        share = float(capacity[:-1])
        if not 0 < share <= 100:
            raise ValueError(f"capacity {capacity!r} is not between 0% and 100%")
        return int(host_memory_bytes * share / 100)
    return parse_size(capacity)


class Arena(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where pages are kept."""

    path: str = "/dev/shm/tmem/arena"  # noqa: S108  # not a temporary file: tmpfs is the point
    """A file on tmpfs or hugetlbfs, or `memfd` for memory that does not outlive the daemon."""
    capacity: str = "25%"
    """How much host memory may be lent: a size, or a share of the host's memory."""
    incompressible: str = "store"
    """What happens to pages that do not compress: `store` or `refuse`."""

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        resolve_capacity(self.capacity, 1 << 40)
        if self.incompressible not in ("store", "refuse"):
            raise ValueError("incompressible is 'store' or 'refuse'")
        if self.path != "memfd" and not Path(self.path).is_absolute():
            raise ValueError("path is 'memfd' or an absolute path")


class Sockets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where administrators and guests connect."""

    admin: str = "/run/tmem/admin.sock"
    """The admin API; only its owner may use it."""
    vm_directory: str = "/run/tmem/vm"
    """A VM's hybrid vsock socket is `NAME/vsock.sock` in it, unless its spec says otherwise."""
    mode: str = "0660"
    """Permissions of the VMs' sockets, octal."""
    group: str = ""
    """Group of the VMs' sockets, for instance that of QEMU; empty for tmemd's own."""
    vsock: str = "auto"
    """Listen on AF_VSOCK: `on`, `off`, or `auto` for where the kernel has it."""

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        if not 0 <= int(self.mode, 8) <= 0o777:
            raise ValueError("mode is octal, for instance '0660'")
        if self.vsock not in ("auto", "on", "off"):
            raise ValueError("vsock is 'auto', 'on' or 'off'")


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one VM may use of the daemon, and how long it may take."""

    connections: int = 16
    connections_per_s: int = 50
    """Connections a VM may open in a second, and as many at once; 0 for no limit."""
    in_flight: str = "40M"
    """Buffers of a VM's connections for frames over 192 KiB, together."""
    in_flight_total: str = "256M"
    """The same for all VMs, not counting one connection of each."""
    pages_per_s: int = 0
    """Pages a second a VM of weight 100 may use, other weights in proportion; 0 for no limit."""
    max_in_flight: int = 64
    """Requests a guest may have unanswered on a connection."""
    hello_timeout_s: float = 10.0
    frame_timeout_s: float = 30.0
    """From a frame's first byte to its last."""
    stall_timeout_s: float = 30.0
    """How long a guest may leave answers unread."""
    keep_alive_s: float = 0.0
    """A guest silent for three of these is disconnected; 0 for never."""
    drain_timeout_s: float = 10.0
    """How long stopping waits for guests."""
    busy_poll_us: int = 50
    """Longest busy polling for the next request while requests come one after another; 0 turns it off."""

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        parse_size(self.in_flight)
        parse_size(self.in_flight_total)
        for name in ("connections", "max_in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1")
        for name in ("hello_timeout_s", "frame_timeout_s", "stall_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is over 0")
        for name in ("connections_per_s", "pages_per_s", "keep_alive_s", "drain_timeout_s", "busy_poll_us"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is not negative")


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What outlives a restart."""

    directory: str = "/var/lib/tmem"
    """Registered VMs, their quotas, grants and the policy are kept in `state.json` in it."""


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is written to standard error."""

    level: str = "info"

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        if self.level not in ("debug", "info", "warning", "error"):
            raise ValueError("level is 'debug', 'info', 'warning' or 'error'")


class TmemdConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`/etc/tmem/tmemd.toml`."""

    arena: Arena = Arena()
    sockets: Sockets = Sockets()
    limits: Limits = Limits()
    state: State = State()
    log: Log = Log()


def load(path: Path, kind: type[T]) -> T:
    """Read a configuration file into `kind`.

    Raises OperatorError, with the file and the key, if it cannot be read or says what `kind` does not know.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise OperatorError(f"{path} is not valid TOML: {error}", code=ExitCode.USAGE) from error
    except UnicodeDecodeError as error:
        raise OperatorError(f"{path} is not UTF-8 text: {error}", code=ExitCode.USAGE) from error
    except OSError as error:
        raise OperatorError(
            f"{path} cannot be read: {error.strerror}", hint="another --config", code=ExitCode.USAGE
        ) from error
    return parse(data, kind, str(path))


def parse(data: dict[str, Any], kind: type[T], origin: str) -> T:
    """Check `data` against `kind`; `origin` names it in errors. Raises OperatorError."""
    _refuse_unknown(data, kind, origin, "")
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        key = where.rstrip("`").lstrip(".")
        place = f"{origin}: key '{key}'" if key else origin
        raise OperatorError(f"{place}: {message}", code=ExitCode.USAGE) from error


def _refuse_unknown(data: dict[str, Any], kind: type[msgspec.Struct], origin: str, prefix: str) -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in data.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            known = "known are " + ", ".join(sorted(fields))
            raise OperatorError(
                f"{origin}: unknown key '{prefix}{key}'",
                hint=f"did you mean '{prefix}{near[0]}'?" if near else known,
                code=ExitCode.USAGE,
            )
        field = fields[key]
        if isinstance(value, dict) and isinstance(field, type) and issubclass(field, msgspec.Struct):
            _refuse_unknown(value, field, origin, f"{prefix}{key}.")
