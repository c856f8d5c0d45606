"""One JSON object a line over unix sockets: to the status sockets of `tmem-guest`, and to the daemon."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import cast

import msgspec

MAX_LINE_BYTES = 1 << 20
_UCRED = struct.Struct("iII")  # pid, uid, gid: unix(7)


def read_line(connection: socket.socket) -> bytes:
    """The next line, without its end; empty at the end of the stream. Raises OSError (and TimeoutError)."""
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = connection.recv(65536)
        if not chunk:
            break
        line += chunk
        if len(line) > MAX_LINE_BYTES:
            raise OSError(f"a line of more than {MAX_LINE_BYTES} bytes")
    return bytes(line).rstrip(b"\n")


def ask(path: Path, request: dict[str, object] | None, timeout_s: float) -> dict[str, object]:
    """Send one request to the socket at `path` and return the answer; `None`: it tells its one thing unasked.

    Raises OSError: nobody listens there, it took longer than `timeout_s`, or the answer is no JSON object.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
        if request is not None:
            connection.sendall(msgspec.json.encode(request) + b"\n")
        line = read_line(connection)
    try:
        answer: object = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise OSError(f"{path} did not answer in JSON: {error}") from error
    if not isinstance(answer, dict):
        raise OSError(f"{path} answered {line[:80]!r}, no JSON object")
    return cast("dict[str, object]", answer)


def listener(path: Path) -> int:
    """Pid of the process that listens at `path`. Raises OSError if nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        connection.connect(str(path))
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid: int = _UCRED.unpack(credentials)[0]
    return pid


def integer(answer: dict[str, object], *path: str) -> int:
    """The whole number at `path` in an answer, 0 if it is not there."""
    value: object = answer
    for name in path:
        if not isinstance(value, dict):
            return 0
        value = value.get(name)
    return value if isinstance(value, int) else 0
