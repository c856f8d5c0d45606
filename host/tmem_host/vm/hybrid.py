"""Hybrid vsock sockets: how vhost-device-vsock, tmemd and Firecracker show vsock to the host.

To reach port P of a guest, connect to the VM's socket, write `CONNECT P\\n`, and read `OK n\\n`. What the
guest sends to port P of the host arrives at the unix socket `<socket>_P`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from tmem_host.errors import ExitCode, OperatorError

_ANSWER_LIMIT = 32
"""`OK ` and a 32-bit port fit well."""


def connect(path: Path, port: int, timeout_s: float, *, vm: str | None = None) -> socket.socket:
    """Connect to a port of a guest. UNAVAILABLE if nothing listens there, TIMEOUT if there is no answer."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.settimeout(timeout_s)
        stream.connect(str(path))
        stream.sendall(b"CONNECT %d\n" % port)
        _read_answer(stream)
    except TimeoutError as error:
        stream.close()
        raise OperatorError(
            f"no answer on vsock port {port} within {timeout_s:g} s", vm=vm, code=ExitCode.TIMEOUT
        ) from error
    except OSError as error:
        stream.close()
        raise OperatorError(
            f"nothing listens on vsock port {port}",
            vm=vm,
            hint="is the guest still starting?",
            code=ExitCode.UNAVAILABLE,
        ) from error
    except BaseException:
        stream.close()
        raise
    stream.settimeout(None)
    return stream


def _read_answer(stream: socket.socket) -> None:
    # Byte by byte: what follows the line belongs to the guest's service.
    answer = b""
    while not answer.endswith(b"\n") and len(answer) < _ANSWER_LIMIT:
        byte = stream.recv(1)
        if not byte:
            break
        answer += byte
    if not answer.startswith(b"OK "):
        raise ConnectionRefusedError


def listen(path: Path, port: int) -> socket.socket:
    """Listen for what the guest sends to a port of the host.

    The socket is for the owner of its directory alone, that is for whoever serves the VM's device. That user
    may put anything in its place meanwhile: no link is followed.
    """
    target = Path(f"{path}_{port}")
    target.unlink(missing_ok=True)
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.ExitStack() as undo:
        undo.callback(stream.close)
        # Before bind it sets the mode of the file to come.
        os.fchmod(stream.fileno(), 0o600)
        stream.bind(str(target))
        owner = target.parent.stat()
        if owner.st_uid != os.geteuid():
            os.chown(target, owner.st_uid, owner.st_gid, follow_symlinks=False)
        stream.listen(16)
        undo.pop_all()
    return stream
