"""What outlives a restart: the VMs, their quotas, the grants of shared pools, the policy."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from tmem_host.api.types import Policy, VmSpec
from tmem_host.errors import ExitCode, OperatorError

_FILE = "state.json"
_VERSION = 1


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A registered VM: its spec and the limits it has now."""

    spec: VmSpec
    quota_bytes: int
    min_bytes: int
    weight: int
    pinned: bool
    frozen: bool = False
    quota_changes: int = 0
    """Since it was registered."""


class Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state file."""

    version: int = _VERSION
    vms: dict[str, Entry] = {}
    grants: dict[str, list[str]] = {}
    """VMs by UUID of the shared pool."""
    policy: Policy = Policy()


class Registry:
    """The state, in memory and on disk. Every change is on disk before its method returns."""

    def __init__(self, directory: Path) -> None:
        """Read the state in `directory`, which is made if it is missing. Raises OperatorError."""
        self._path = directory / _FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.saved = self._read()
        except PermissionError as error:
            raise OperatorError(
                f"no access to the state directory {directory}: {error.strerror}",
                hint="run as root, or choose another --state-directory",
                code=ExitCode.PRIVILEGE,
            ) from error
        except OSError as error:
            raise OperatorError(f"cannot use the state directory {directory}: {error}") from error

    @property
    def vms(self) -> dict[str, Entry]:
        """Registered VMs by name. Call `save` after a change."""
        return self.saved.vms

    @property
    def grants(self) -> dict[str, list[str]]:
        """VMs that may join a shared pool, by its UUID. Call `save` after a change."""
        return self.saved.grants

    @property
    def policy(self) -> Policy:
        """What the controller is to follow."""
        return self.saved.policy

    def set_policy(self, policy: Policy) -> None:
        """Keep another policy."""
        self.saved.policy = policy
        self.save()

    def save(self) -> None:
        """Write the state; a crash at any moment leaves the old or the new one. Raises OperatorError."""
        new = self._path.with_suffix(".new")
        try:
            with new.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(self.saved), indent=2))
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        except OSError as error:
            code = ExitCode.NO_SPACE if error.errno == 28 else ExitCode.FAILED  # ENOSPC
            raise OperatorError(f"cannot write {self._path}: {error.strerror}", code=code) from error

    def _read(self) -> Saved:
        try:
            saved = msgspec.json.decode(self._path.read_bytes(), type=Saved)
        except FileNotFoundError:
            return Saved()
        except msgspec.DecodeError as error:
            raise OperatorError(
                f"{self._path} is damaged: {error}",
                hint="move it away; VMs must then be registered again, their pages are kept",
            ) from error
        if saved.version != _VERSION:
            raise OperatorError(f"{self._path} was written by another version of tmemd")
        return saved
