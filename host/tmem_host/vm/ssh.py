"""Commands in a guest, through SSH over vsock, with live output, deadline and exit code."""

from __future__ import annotations

import base64
import contextlib
import select
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import paramiko
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tmem_host.errors import ExitCode, OperatorError

PORT = 22
OnOutput = Callable[[Literal["stdout", "stderr"], bytes], None]

_HANDSHAKE_TIMEOUT_S = 60.0
_CHUNK_BYTES = 32 << 10
_KILL_AFTER_S = 2
# vhost-device-vsock loses packets of more than 32 KiB from the guest, and sshd writes as much at once as the
# window lets it.
_WINDOW_BYTES = 32 << 10
_PACKET_BYTES = 16 << 10


@dataclass(frozen=True)
class Result:
    """What a command left."""

    exit_code: int
    stdout: bytes
    stderr: bytes


def make_key(path: Path) -> str:
    """Make a key pair, write the private half to `path` (mode 0600) and return the public half's line."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    path.touch(mode=0o600)
    path.write_bytes(private)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public.decode()


class GuestShell:
    """An SSH connection to a guest; runs any number of commands, also several at once (threads)."""

    def __init__(self, stream: socket.socket, key: Path, host_key: str, vm: str) -> None:
        """Log in as root over a stream to the guest's SSH port; the stream is owned from now on.

        The guest must show the host key that its image was built with. UNAVAILABLE if it does not, or if it
        refuses; TIMEOUT if it does not answer.
        """
        self.vm = vm
        self._transport = paramiko.Transport(
            stream, default_window_size=_WINDOW_BYTES, default_max_packet_size=_PACKET_BYTES
        )
        with contextlib.ExitStack() as undo:
            undo.callback(self._transport.close)
            self._log_in(key, host_key)
            undo.pop_all()

    def _log_in(self, key: Path, host_key: str) -> None:
        transport = self._transport
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = _HANDSHAKE_TIMEOUT_S
        kind, encoded = host_key.split()[:2]
        transport.get_security_options().key_types = (kind,)
        try:
            transport.start_client(timeout=_HANDSHAKE_TIMEOUT_S)
            if transport.get_remote_server_key().asbytes() != base64.b64decode(encoded):
                raise OperatorError(
                    "the guest shows another SSH host key than its image has",
                    vm=self.vm,
                    code=ExitCode.UNAVAILABLE,
                )
            transport.auth_publickey("root", paramiko.Ed25519Key.from_private_key_file(str(key)))
        except TimeoutError as error:
            raise OperatorError(
                f"SSH did not answer within {_HANDSHAKE_TIMEOUT_S:g} s", vm=self.vm, code=ExitCode.TIMEOUT
            ) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise OperatorError(
                f"SSH: {error or type(error).__name__}", vm=self.vm, code=ExitCode.UNAVAILABLE
            ) from error

    def __enter__(self) -> Self:
        """Return the shell itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and with it what still runs on it."""
        self._transport.close()

    def run(
        self,
        command: str | Sequence[str],
        *,
        deadline_s: float,
        on_output: OnOutput | None = None,
        stdin: bytes = b"",
    ) -> int:
        """Run a command to its end and return its exit code (128 + N if signal N ended it).

        `command` is a shell line, or an argument vector passed on as it is. Output is handed to `on_output`
        as it comes. When `deadline_s` has passed, the command is killed in the guest and OperatorError
        TIMEOUT is raised; UNAVAILABLE if the connection breaks, for instance because the guest went down.
        """
        line = command if isinstance(command, str) else shlex.join(command)
        guest_limit_s = int(deadline_s) + 1
        # The guest ends the command by itself, so that nothing runs on when this side is gone.
        wrapped = f"exec timeout -k {_KILL_AFTER_S} {guest_limit_s} sh -c {shlex.quote(line)}"
        deadline = time.monotonic() + deadline_s
        try:
            channel = self._transport.open_session(
                window_size=_WINDOW_BYTES, max_packet_size=_PACKET_BYTES, timeout=deadline_s
            )
            with channel:
                channel.exec_command(wrapped)
                if stdin:
                    channel.settimeout(deadline_s)
                    channel.sendall(stdin)
                channel.shutdown_write()
                return self._follow(channel, line, deadline, deadline_s, on_output)
        except TimeoutError as error:
            raise self._too_late(line, deadline_s) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise OperatorError(
                f"the connection broke during {_short(line)}: {error or 'closed by the guest'}",
                vm=self.vm,
                hint=f"tmemctl vm console {self.vm}",
                code=ExitCode.UNAVAILABLE,
            ) from error

    def output(self, command: str | Sequence[str], *, deadline_s: float, stdin: bytes = b"") -> Result:
        """Run a command and return what it wrote; for commands that write little."""
        parts: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        code = self.run(
            command, deadline_s=deadline_s, on_output=lambda name, data: parts[name].append(data), stdin=stdin
        )
        return Result(code, b"".join(parts["stdout"]), b"".join(parts["stderr"]))

    def check(self, command: str | Sequence[str], *, deadline_s: float, stdin: bytes = b"") -> str:
        """Run a command that must succeed and return its standard output as text; OperatorError otherwise."""
        result = self.output(command, deadline_s=deadline_s, stdin=stdin)
        if result.exit_code != 0:
            line = command if isinstance(command, str) else shlex.join(command)
            said = (result.stderr or result.stdout).decode(errors="replace").strip()[-2000:]
            raise OperatorError(f"{_short(line)} ended with {result.exit_code}: {said}", vm=self.vm)
        return result.stdout.decode(errors="replace")

    def put(self, data: bytes, path: str, *, mode: int = 0o644, deadline_s: float = 60.0) -> None:
        """Write a file in the guest; its directory is made."""
        target = shlex.quote(path)
        self.check(
            f'mkdir -p "$(dirname {target})" && cat > {target} && chmod {mode:o} {target}',
            deadline_s=deadline_s,
            stdin=data,
        )

    def get(self, path: str, *, deadline_s: float = 60.0) -> bytes:
        """Read a file of the guest."""
        result = self.output(["cat", path], deadline_s=deadline_s)
        if result.exit_code != 0:
            raise OperatorError(result.stderr.decode(errors="replace").strip(), vm=self.vm)
        return result.stdout

    def _follow(
        self,
        channel: paramiko.Channel,
        line: str,
        deadline: float,
        deadline_s: float,
        on_output: OnOutput | None,
    ) -> int:
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise self._too_late(line, deadline_s)
            select.select([channel], [], [], left_s)
            ended = channel.eof_received or channel.closed
            if channel.recv_ready():
                _hand_on(on_output, "stdout", channel.recv(_CHUNK_BYTES))
            elif channel.recv_stderr_ready():
                _hand_on(on_output, "stderr", channel.recv_stderr(_CHUNK_BYTES))
            elif ended:
                if not channel.status_event.wait(max(left_s, 1.0)):
                    raise self._too_late(line, deadline_s)
                code = channel.recv_exit_status()
                if code < 0:
                    raise EOFError
                return code

    def _too_late(self, line: str, deadline_s: float) -> OperatorError:
        return OperatorError(
            f"{_short(line)} was not done within {deadline_s:g} s and was ended",
            vm=self.vm,
            hint="a longer deadline",
            code=ExitCode.TIMEOUT,
        )


def _hand_on(on_output: OnOutput | None, name: Literal["stdout", "stderr"], data: bytes) -> None:
    if on_output is not None and data:
        on_output(name, data)


def _short(line: str) -> str:
    return f"'{line if len(line) <= 60 else line[:57] + '…'}'"
