"""A file cache: `tmem-guest fs` over a directory, from refusal to unmounting."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from tmem_guest import jsonline, log, mounts
from tmem_guest.config import MountConfig
from tmem_guest.errors import AgentError, ExitCode
from tmem_guest.service import Service

UNMOUNT_TIMEOUT_S = 3.0
STATUS_TIMEOUT_S = 0.5
FUSE = Path("/dev/fuse")
_VIRTUAL = frozenset(
    {"proc", "sysfs", "devtmpfs", "devpts", "cgroup2", "securityfs", "debugfs", "tracefs", "bpf", "configfs"}
)
_MAX_SLUG = 40  # a unix socket's path holds 107 bytes


def slug(path: str) -> str:
    """A path as a file name, different for different paths: `/srv/data` is `srv-data`."""
    plain = path.strip("/").replace("-", "--").replace("/", "-")
    if len(plain) <= _MAX_SLUG and plain.isascii() and " " not in plain:
        return plain
    safe = "".join(char if char.isascii() and (char.isalnum() or char in "-._") else "_" for char in plain)
    return f"{safe[:_MAX_SLUG]}_{zlib.crc32(os.fsencode(path)):08x}"


def resolve(config: MountConfig) -> MountConfig:
    """`config` with symbolic links and `..` resolved, as the mount table will show it."""
    directory = os.path.realpath(config.directory)
    point = os.path.realpath(config.mount_point)
    return MountConfig(directory=directory, at="" if point == directory else point, options=config.options)


def _inside(path: str, directory: str) -> bool:
    return path != directory and path.startswith(directory.rstrip("/") + "/")


def check(config: MountConfig, mounted: Iterable[MountConfig]) -> None:
    """Raise AgentError unless this (resolved) mount makes sense beside those already `mounted`."""
    directory, point = config.directory, config.mount_point
    for path in dict.fromkeys((directory, point)):
        if not Path(path).exists():
            raise AgentError(f"{path} does not exist", hint=f"mkdir {path}", code=ExitCode.NOT_FOUND)
        if not Path(path).is_dir():
            raise AgentError(f"{path} is not a directory", code=ExitCode.USAGE)
    if point == "/":
        raise AgentError("the root directory cannot be mounted over", hint="a directory below it")
    for other in mounted:
        if point == other.mount_point:
            raise AgentError(
                f"{point} is already mounted", hint=f"tmem-agent umount {point}", code=ExitCode.CONFLICT
            )
    if _inside(point, directory) or _inside(directory, point):
        raise AgentError(
            f"{point} would be nested on itself: one of {directory} and {point} lies in the other",
            hint="a mount point elsewhere, or none: it is then mounted over itself",
            code=ExitCode.USAGE,
        )
    for path in dict.fromkeys((directory, point)):
        _check_surroundings(path, mounts.table())
    if not FUSE.exists():
        raise AgentError(
            f"{FUSE} is not there: this kernel has no FUSE", hint="modprobe fuse", code=ExitCode.UNAVAILABLE
        )


def _check_surroundings(path: str, table: list[mounts.Mount]) -> None:
    """Raise AgentError if `path` is in, or above, what tmem serves already, or has no data to cache."""
    around = mounts.containing(path, table)
    if around is not None and around.is_tmem:
        raise AgentError(
            f"{path} lies in {around.path}, which tmem serves already",
            hint=f"tmem-agent umount {around.path}",
            code=ExitCode.CONFLICT,
        )
    if around is not None and around.filesystem in _VIRTUAL:
        raise AgentError(f"{path} is on {around.filesystem}, which has no data to cache", code=ExitCode.USAGE)
    for mount in table:
        if mount.is_tmem and _inside(mount.path, path):
            raise AgentError(
                f"{mount.path}, below {path}, is served by tmem already",
                hint=f"tmem-agent umount {mount.path}",
                code=ExitCode.CONFLICT,
            )


class MountService(Service):
    """`tmem-guest fs` for one `[[mount]]`."""

    def __init__(
        self,
        config: MountConfig,
        *,
        program: Path,
        endpoint: str,
        runtime_directory: Path,
        ready_timeout_s: float,
    ) -> None:
        """`config` is resolved and checked."""
        name = f"fs-{slug(config.mount_point)}"
        super().__init__(name, runtime_directory, ready_timeout_s=ready_timeout_s)
        self.config = config
        self.status_socket = runtime_directory / f"{name}.sock"
        self._program = program
        self._endpoint = endpoint

    def command(self) -> list[str]:
        """See `tmem-guest fs --help`."""
        return [
            str(self._program),
            "fs",
            f"--lower={self.config.directory}",
            f"--mount={self.config.mount_point}",
            f"--endpoint={self._endpoint}",
            f"--status-socket={self.status_socket}",
            *self.config.options,
        ]

    def is_ready(self) -> bool:
        """Mounted, and the status socket answers."""
        mount = mounts.at(self.config.mount_point)
        return mount is not None and mount.is_tmem and self.counters() is not None

    def counters(self) -> dict[str, object] | None:
        """What the status socket says; None if it does not answer."""
        try:
            return jsonline.ask(self.status_socket, None, STATUS_TIMEOUT_S)
        except OSError:
            return None

    def activate(self) -> None:
        """Nothing is left to do: a file system is in use once it is mounted."""
        log.info(f"{self.config.directory} is cached by tmem, mounted at {self.config.mount_point}")

    def release(self, *, lazily: bool) -> bool:
        """Unmount, and let the process end by itself, which it does once nothing of it is in use."""
        point = self.config.mount_point
        deadline = UNMOUNT_TIMEOUT_S if lazily else 0.0
        status, output = self.run_tool(["umount", point])
        while status and deadline > 0 and self._is_mounted():
            self._pump(0.25, heed_wake=False)
            deadline -= 0.25
            status, output = self.run_tool(["umount", point])
        if not self._is_mounted():
            log.info(f"{point} is unmounted")
            return True
        if not lazily:
            raise AgentError(
                f"{point} cannot be unmounted: {output}",
                hint=f"`fuser -vm {point}` shows who uses it",
                code=ExitCode.CONFLICT,
            )
        log.warning(f"{point} is still in use: it is out of the tree, its users keep what they have open")
        self._detach()
        return False

    def clean(self) -> None:
        """Detach what a dead process left mounted."""
        self.status_socket.unlink(missing_ok=True)
        if self._is_mounted():
            log.warning(f"detaching the dead mount at {self.config.mount_point}")
            self._detach()

    def given_up(self, *, success: bool) -> str:
        """Who unmounts by hand does not want it back."""
        if success and not self._is_mounted():
            return f"{self.config.mount_point} was unmounted by someone else and is left so"
        return ""

    def _is_mounted(self) -> bool:
        mount = mounts.at(self.config.mount_point)
        return mount is not None and mount.is_tmem

    def _detach(self) -> None:
        try:
            mounts.detach(self.config.mount_point)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise AgentError(f"cannot detach {self.config.mount_point}: {error.strerror}") from error
