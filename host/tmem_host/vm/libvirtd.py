"""A connection to libvirtd, and a libvirtd where no init system started one.

On a machine with systemd libvirtd is the administrator's, and is only connected to. Without (containers, CI)
it is started under `supervisor`, as a recorded process, and stopped again when the last VM is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree as Xml

import libvirt
import msgspec

from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm import process, supervisor
from tmem_host.vm.process import Recorded

URI = "qemu:///system"
_RUN = Path("/run/tmemctl/libvirt")
_RECORD = _RUN / "supervisor.json"
_USERS = _RUN.parent / "libvirt.users"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.05
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
# As root, because nothing has made /dev/kvm accessible to libvirt's own user here: libvirt would find that it
# may use KVM but that QEMU may not, and examine QEMU again before every step. Without virtlogd, which would
# be one more process to start.
_QEMU_CONFIGURATION = 'user = "root"\ngroup = "root"\nstdio_handler = "file"\n'
# The packages make these in their service units or by systemd-tmpfiles, which did not run here.
_DIRECTORIES = ("/run/libvirt", "/var/log/libvirt/qemu", "/var/cache/libvirt/qemu", "/var/lib/libvirt/qemu")


def _quiet(_context: object, _error: object) -> None:
    """libvirt prints errors to stderr by itself; they are raised as exceptions too."""


libvirt.registerErrorHandler(_quiet, None)


def connect() -> libvirt.virConnect:
    """Connect to libvirtd. UNAVAILABLE if it is not running."""
    try:
        return libvirt.open(URI)
    except libvirt.libvirtError as error:
        hint = "systemctl start libvirtd" if _has_systemd() else "tmemctl vm up starts one"
        raise OperatorError(
            f"libvirtd is not running: {error}", hint=hint, code=ExitCode.UNAVAILABLE
        ) from error


@contextmanager
def connection() -> Iterator[libvirt.virConnect]:
    """A connection to a running libvirtd, closed afterwards."""
    connected = connect()
    try:
        yield connected
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            connected.close()


def find(connection: libvirt.virConnect, name: str) -> libvirt.virDomain | None:
    """The domain of this name, if there is one."""
    try:
        return connection.lookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise OperatorError(f"libvirtd: {error}", vm=name, code=ExitCode.UNAVAILABLE) from error


def security_models(connection: libvirt.virConnect) -> tuple[str, ...]:
    """The security models libvirt applies to domains here: `dac`, `apparmor`, `selinux`."""
    capabilities = Xml.fromstring(connection.getCapabilities())  # noqa: S314  # libvirt's own
    return tuple(model.text or "" for model in capabilities.iterfind("host/secmodel/model"))


@contextmanager
def running() -> Iterator[None]:
    """A libvirtd for the time of the block: the running one, or one of our own that ends with its last VM."""
    try:
        with in_use():
            yield
    finally:
        stop_if_idle()


@contextmanager
def in_use() -> Iterator[None]:
    """Like `running`, but what was started is left for `stop_if_idle` of whoever comes last.

    While a process is in such a block, no other one stops the libvirtd under it.
    """
    check_permission()
    _RUN.parent.mkdir(parents=True, exist_ok=True)
    with _USERS.open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        _ensure()
        yield


def _ensure() -> None:
    with contextlib.suppress(OperatorError):
        connect().close()
        return
    if _has_systemd():
        connect().close()  # for its message
        return
    _check_startable()
    _RUN.mkdir(exist_ok=True)
    with (_RUN / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OperatorError):  # another process was faster
            connect().close()
            return
        _start()


def stop_if_idle() -> None:
    """Stop the libvirtd that was started here, unless it is in use. Somebody else's is left alone."""
    # Who may not use it did not start it either.
    if os.geteuid() != 0 or not _RECORD.exists():
        return
    with _USERS.open("w") as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody needs it, and stops it later
            return
        try:
            recorded = msgspec.json.decode(_RECORD.read_bytes(), type=Recorded)
        except FileNotFoundError:
            return
        with contextlib.suppress(OperatorError), connection() as connected:
            if connected.listAllDomains():
                return
        process.end(recorded, _STOP_TIMEOUT_S)
        shutil.rmtree(_RUN)


def _has_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


def check_permission() -> None:
    """PRIVILEGE unless this user may make and end VMs."""
    if os.geteuid() != 0:
        raise OperatorError("using libvirtd's system VMs needs root", hint="sudo", code=ExitCode.PRIVILEGE)


def _check_startable() -> None:
    if shutil.which("libvirtd", path=_PATH) is None:
        raise OperatorError(
            "libvirtd is not installed",
            hint="apt-get install libvirt-daemon-system",
            code=ExitCode.UNAVAILABLE,
        )


def _start() -> None:
    for directory in _DIRECTORIES:
        Path(directory).mkdir(parents=True, exist_ok=True)
    configuration = _RUN / "libvirtd.conf"
    # The socket is root's; there is no polkit to ask.
    configuration.write_text('auth_unix_ro = "none"\nauth_unix_rw = "none"\nunix_sock_rw_perms = "0700"\n')
    qemu_configuration = _RUN / "qemu.conf"
    qemu_configuration.write_text(_QEMU_CONFIGURATION)
    log = _RUN / "log"
    command = [sys.executable, "-I", supervisor.__file__, str(configuration), str(qemu_configuration)]
    started = process.start(command, log, path=_PATH)
    try:
        _wait_for_answer(started, log)
        _RECORD.write_bytes(msgspec.json.encode(started))
    except BaseException:
        process.end(started, _STOP_TIMEOUT_S)
        raise


def _wait_for_answer(started: Recorded, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            connect().close()
        except OperatorError as error:
            dead = process.find(started) is None
            if not dead and time.monotonic() < deadline:
                threading.Event().wait(_POLL_S)
                continue
            lines = log.read_text(errors="replace").splitlines()[-5:]
            what = "ended at once" if dead else f"did not answer within {_START_TIMEOUT_S:g} s"
            raise OperatorError(
                f"libvirtd was started and {what}:\n  " + "\n  ".join(lines), code=ExitCode.UNAVAILABLE
            ) from error
        else:
            return
