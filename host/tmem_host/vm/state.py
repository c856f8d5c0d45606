"""What is recorded of a VM under /run/tmemctl/vm/NAME, so that every command can find, use and end it.

Only the user of `tmemctl` writes there. A VM's sockets are where its tmemd, which may be of another user, can
make them.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm.kvm import Virt
from tmem_host.vm.process import Recorded
from tmem_host.vm.transport import Transport, TransportName

_DEFAULT = Path("/run/tmemctl/vm")
_ENVIRONMENT = "TMEM_VM_DIRECTORY"
_FILE = "vm.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
_REMOVE_TIMEOUT_S = 5.0
_FIRST_CID = 100
"""0 to 2 are reserved by vsock; a little room for VMs that others define by hand."""


class VmState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM as it was brought up."""

    name: str
    image: str
    cid: int
    memory_bytes: int
    cpus: int
    virt: Virt
    virt_reason: str
    transport: TransportName
    host_key: str
    admin_socket: str | None = None
    """Of the tmemd it is registered with."""
    device: Recorded | None = None
    """Its vhost-device-vsock process."""


def directory(name: str) -> Path:
    """Where the files of a VM are."""
    return root() / name


def root() -> Path:
    """Where the directories of all VMs are."""
    return Path(os.environ.get(_ENVIRONMENT, _DEFAULT))


def sockets(state: VmState) -> Path:
    """Where the sockets of a VM are: beside its tmemd's admin socket, or with its files if it has none."""
    if state.admin_socket is None:
        return directory(state.name)
    return Path(state.admin_socket).parent / "vm" / state.name


def transport(state: VmState) -> Transport:
    """The way to the guest of a VM."""
    return Transport(state.transport, state.name, state.cid, sockets(state), directory(state.name))


def check_name(name: str) -> None:
    """USAGE unless the name is fit for a file, a socket and a host name."""
    if not _NAME.fullmatch(name):
        raise OperatorError(
            f"{name!r} is not a VM name",
            hint="lower-case letters, digits and hyphens, at most 31",
            code=ExitCode.USAGE,
        )


def load(name: str) -> VmState:
    """The record of a VM. NOT_FOUND if there is none; PRIVILEGE or FAILED if it cannot be read."""
    check_name(name)
    try:
        return _read(directory(name) / _FILE)
    except FileNotFoundError as error:
        known = ", ".join(state.name for state in every())
        hint = f"one of {known}" if known else f"none is up; tmemctl vm up {name}"
        raise OperatorError("there is no such VM", vm=name, hint=hint, code=ExitCode.NOT_FOUND) from error


def every() -> list[VmState]:
    """The records of all VMs, by name."""
    files = sorted(root().glob(f"*/{_FILE}"))
    return [_read(file) for file in files]


def _read(file: Path) -> VmState:
    name = file.parent.name
    try:
        return msgspec.json.decode(file.read_bytes(), type=VmState)
    except PermissionError as error:
        raise OperatorError(
            f"not allowed to read {file}", vm=name, hint="as root", code=ExitCode.PRIVILEGE
        ) from error
    except msgspec.DecodeError as error:
        # Records are written whole: another version of tmem wrote this one.
        raise OperatorError(
            f"its record is not to be understood: {error}",
            vm=name,
            hint=f"virsh destroy {name}; rm -r {file.parent}",
        ) from error


def save(state: VmState) -> None:
    """Write the record of a VM, whole or not at all."""
    target = directory(state.name) / _FILE
    scratch = target.with_suffix(".new")
    scratch.write_bytes(msgspec.json.encode(state))
    scratch.rename(target)


def remove(state: VmState) -> None:
    """Remove the record, the sockets and every other file of a VM."""
    deadline = time.monotonic() + _REMOVE_TIMEOUT_S
    for place in (sockets(state), directory(state.name)):
        # tmemd may just be taking its own sockets away; what it is faster with is no error.
        while place.exists() and time.monotonic() < deadline:
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def exclusive() -> Iterator[None]:
    """Held while names and CIDs are chosen. PRIVILEGE if this user may not."""
    try:
        root().mkdir(parents=True, exist_ok=True)
        lock = (root() / ".lock").open("w")
    except PermissionError as error:
        raise OperatorError(
            f"not allowed to write to {root()}", hint="run as root", code=ExitCode.PRIVILEGE
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def choose_cid(wanted: int | None, taken: dict[int, str]) -> int:
    """The CID asked for, or the lowest free one. `taken` maps CIDs to VMs; CONFLICT, USAGE."""
    if wanted is None:
        cid = _FIRST_CID
        while cid in taken:
            cid += 1
        return cid
    if not 3 <= wanted < 2**32 - 1:
        raise OperatorError(f"{wanted} is not a CID for a guest", hint="3 to 4294967294", code=ExitCode.USAGE)
    if wanted in taken:
        raise OperatorError(
            f"CID {wanted} is taken by VM {taken[wanted]!r}",
            hint="leave it out, and a free one is chosen",
            code=ExitCode.CONFLICT,
        )
    return wanted
