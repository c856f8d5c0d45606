"""Commands over SSH, against paramiko's own server on a socket pair."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_SUCCEEDED
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm.ssh import GuestShell, make_key


class _Server(paramiko.ServerInterface):
    """Runs what it is asked to, in a shell of this machine."""

    def __init__(self, key: paramiko.PKey) -> None:
        self._key = key

    def get_allowed_auths(self, _username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return AUTH_SUCCESSFUL if username == "root" and key == self._key else AUTH_FAILED

    def check_channel_request(self, _kind: str, _chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=_execute, args=(channel, command.decode()), daemon=True).start()
        return True


def _execute(channel: paramiko.Channel, command: str) -> None:
    stdin = b""
    while data := channel.recv(4096):
        stdin += data
    done = subprocess.run(["sh", "-c", command], input=stdin, capture_output=True, check=False)
    channel.sendall(done.stdout)
    channel.sendall_stderr(done.stderr)
    channel.send_exit_status(done.returncode % 256)
    channel.close()


class _Guest:
    def __init__(self, directory: Path) -> None:
        self.key = directory / "key"
        make_key(self.key)
        make_key(directory / "host")
        self._host_key = paramiko.Ed25519Key.from_private_key_file(str(directory / "host"))
        self.host_key = f"ssh-ed25519 {self._host_key.get_base64()}"
        self.stream, theirs = socket.socketpair()
        self.server = paramiko.Transport(theirs)
        self.server.add_server_key(self._host_key)
        client_key = paramiko.Ed25519Key.from_private_key_file(str(self.key))
        self.server.start_server(event=threading.Event(), server=_Server(client_key))


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[_Guest]:
    made = _Guest(tmp_path)
    yield made
    made.server.close()
    made.stream.close()


@pytest.fixture
def shell(guest: _Guest) -> Iterator[GuestShell]:
    with GuestShell(guest.stream, guest.key, guest.host_key, "a") as opened:
        yield opened


def test_a_key_is_private(tmp_path: Path) -> None:
    public = make_key(tmp_path / "key")
    assert public.startswith("ssh-ed25519 ")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_output_errors_and_exit_code(shell: GuestShell) -> None:
    result = shell.output("echo out; echo err >&2; exit 5", deadline_s=20)
    assert (result.exit_code, result.stdout, result.stderr) == (5, b"out\n", b"err\n")


def test_much_output_is_whole_and_in_order(shell: GuestShell) -> None:
    assert shell.check("seq 200000", deadline_s=60) == "".join(f"{n}\n" for n in range(1, 200001))


def test_an_argument_vector_is_not_interpreted(shell: GuestShell) -> None:
    assert shell.check(["echo", "$HOME;", "it's"], deadline_s=20) == "$HOME; it's\n"


def test_files_go_both_ways(shell: GuestShell, tmp_path: Path) -> None:
    data = bytes(range(256)) * 400
    target = tmp_path / "some where" / "file"
    shell.put(data, str(target), mode=0o640)
    assert target.read_bytes() == data
    assert target.stat().st_mode & 0o777 == 0o640
    assert shell.get(str(target)) == data
    with pytest.raises(OperatorError, match="nowhere"):
        shell.get("/nowhere")


def test_a_command_that_must_succeed_is_shown_with_what_it_said(shell: GuestShell) -> None:
    with pytest.raises(OperatorError, match=r"VM 'a': 'echo no >&2; exit 4' ended with 4: no"):
        shell.check("echo no >&2; exit 4", deadline_s=20)


def test_a_deadline_ends_the_command(shell: GuestShell) -> None:
    started = time.monotonic()
    with pytest.raises(OperatorError, match=r"'exec sleep 30' was not done within 1 s") as caught:
        shell.run("exec sleep 30", deadline_s=1)
    assert caught.value.code is ExitCode.TIMEOUT
    assert time.monotonic() - started < 10


def test_a_connection_that_breaks_is_unavailable(shell: GuestShell, guest: _Guest) -> None:
    threading.Timer(0.5, guest.server.close).start()
    with pytest.raises(OperatorError, match="connection broke") as caught:
        shell.run("sleep 5", deadline_s=20)
    assert caught.value.code is ExitCode.UNAVAILABLE
    assert caught.value.vm == "a"


def test_another_host_key_is_refused(guest: _Guest, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    other = paramiko.Ed25519Key.from_private_key_file(str(tmp_path / "other"))
    with pytest.raises(OperatorError, match="another SSH host key"):
        GuestShell(guest.stream, guest.key, f"ssh-ed25519 {other.get_base64()}", "a")


def test_another_client_key_is_refused(guest: _Guest, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    with pytest.raises(OperatorError, match="SSH") as caught:
        GuestShell(guest.stream, tmp_path / "other", guest.host_key, "a")
    assert caught.value.code is ExitCode.UNAVAILABLE
