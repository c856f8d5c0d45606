"""The daemon's command socket: one request and one answer, a JSON object a line each.

    {"command": "mount", "directory": "/srv/data"}  →  {"result": {…}}
    {"command": "swap off"}  →  {"progress": "…"}*  {"error": {"message", "hint", "code"}}

The socket's mode is 0600: only root may give commands.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec

from tmem_guest import jsonline, log
from tmem_guest.errors import AgentError, ExitCode

Progress = Callable[[str], None]
Handler = Callable[[dict[str, object], Progress], dict[str, object]]
REQUEST_TIMEOUT_S = 10.0


class CommandServer(threading.Thread):
    """Answers commands on a unix socket, each in a thread of its own: turning swap off may take minutes."""

    def __init__(self, path: Path, handlers: dict[str, Handler]) -> None:
        """Listen at `path`, replacing what a dead daemon left there. Raises OSError."""
        super().__init__(name="commands", daemon=True)
        self._path = path
        self._handlers = handlers
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        except BaseException:
            self._listener.close()
            raise
        finally:
            os.umask(mask)
        self._listener.listen()

    def run(self) -> None:
        """The thread's body."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed by stop()
                return
            threading.Thread(target=self._serve, args=(connection,), name="command", daemon=True).start()

    def stop(self) -> None:
        """Take no more commands."""
        self._path.unlink(missing_ok=True)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(REQUEST_TIMEOUT_S)
                line = jsonline.read_line(connection)
                if line:
                    self._send(connection, self._answer(line, connection))
            except OSError:  # whoever asked has left
                return

    def _answer(self, line: bytes, connection: socket.socket) -> dict[str, object]:
        try:
            return {"result": self._respond(line, lambda text: self._send(connection, {"progress": text}))}
        except AgentError as error:
            return {"error": {"message": error.message, "hint": error.hint, "code": int(error.code)}}
        except Exception as error:
            log.error(f"a command failed: {error!r}")
            return {"error": {"message": f"the agent failed: {error!r}", "hint": "its log", "code": 1}}

    def _respond(self, line: bytes, progress: Progress) -> dict[str, object]:
        try:
            request: object = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise AgentError(f"the request is not JSON: {error}", code=ExitCode.USAGE) from error
        if not isinstance(request, dict):
            raise AgentError("the request is no JSON object", code=ExitCode.USAGE)
        fields = cast("dict[str, object]", request)
        command = fields.pop("command", None)
        handler = self._handlers.get(command) if isinstance(command, str) else None
        if handler is None:
            known = ", ".join(self._handlers)
            raise AgentError(f"unknown command {command!r}", hint=f"one of {known}", code=ExitCode.USAGE)
        return handler(fields, progress)

    @staticmethod
    def _send(connection: socket.socket, answer: dict[str, object]) -> None:
        connection.sendall(msgspec.json.encode(answer) + b"\n")
