"""The admin socket, and who may use it."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path

from tmem_host.errors import ExitCode, OperatorError

_UCRED = struct.Struct("3i")


def listen(path: Path) -> socket.socket:
    """A listening unix socket that only its owner may connect to.

    A socket file left by a daemon that died is replaced. Raises OperatorError: CONFLICT if another process
    listens there, PRIVILEGE or FAILED if it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise OperatorError(f"{path} exists and is not a socket", code=ExitCode.CONFLICT)
            if _answers(path):
                raise OperatorError(
                    f"another tmemd listens on {path}",
                    hint="stop it (systemctl stop tmemd), or give this one another --admin-socket",
                    code=ExitCode.CONFLICT,
                )
            path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Before bind it sets the mode of the file to come, so that nobody else can connect in between.
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(64)
        except BaseException:
            listener.close()
            raise
    except PermissionError as error:
        raise OperatorError(
            f"cannot listen on {path}: {error.strerror}",
            hint="run as root, or choose another --admin-socket",
            code=ExitCode.PRIVILEGE,
        ) from error
    except OSError as error:
        raise OperatorError(f"cannot listen on {path}: {error}") from error
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def peer_uid(connection: socket.socket) -> int:
    """User id of the process at the other end of a unix socket, from the kernel."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[1])


def is_administrator(uid: int) -> bool:
    """Whether a user may administer this daemon: root, or the user it runs as."""
    return uid in (0, os.geteuid())
