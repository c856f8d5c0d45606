"""Waiting for a guest that starts: it says when it is ready, and its console why it never is."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from pathlib import Path

import libvirt

from tmem_host.api.client import Client
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm import console, libvirtd, state
from tmem_host.vm.state import VmState

NOTIFY_PORT = 29806
"""Host port on which a starting guest says that it is ready (systemd's VM notification)."""
_POLL_S = 0.2


def wait_for_ready(
    recorded: VmState, notifications: socket.socket, connection: libvirt.virConnect, deadline: float
) -> None:
    """Wait until the guest says that it is ready. TIMEOUT, UNAVAILABLE (it died), with its last lines."""
    # Each notification is a connection of its own. On a busy host its only packet comes long after it was
    # opened, so none is given up before the deadline: it may be the one that counts.
    with contextlib.ExitStack() as opened:
        streams: set[socket.socket] = set()
        while True:
            readable, _, _ = select.select([notifications, *streams], [], [], _POLL_S)
            for stream in readable:
                if stream is notifications:
                    streams.update(_accept(notifications, recorded, opened))
                elif b"READY=1" in _read(stream):
                    return
                else:
                    streams.discard(stream)
            _check_alive(recorded, connection)
            if time.monotonic() > deadline:
                raise late(recorded, "the guest did not become ready in time")


def _accept(
    notifications: socket.socket, recorded: VmState, opened: contextlib.ExitStack
) -> list[socket.socket]:
    stream, address = notifications.accept()
    opened.enter_context(stream)
    if recorded.transport == "vhost-vsock" and address[0] != recorded.cid:
        stream.close()
        return []
    return [stream]


def _read(stream: socket.socket) -> bytes:
    """The one packet of a notification; then the guest waits for us to close.

    Its half-close does not get through every transport.
    """
    with stream:
        try:
            return stream.recv(4096)
        except OSError:
            return b""


def wait_for_agent(
    recorded: VmState, admin_socket: Path, connection: libvirt.virConnect, deadline: float
) -> None:
    """Wait until the guest's agent has reported to tmemd. TIMEOUT, UNAVAILABLE, as above."""
    with Client(admin_socket) as client:
        while client.vm(recorded.name).report is None:
            _check_alive(recorded, connection)
            if time.monotonic() > deadline:
                raise late(recorded, "the guest is ready, but its agent did not report to tmemd in time")
            threading.Event().wait(_POLL_S)


def _check_alive(recorded: VmState, connection: libvirt.virConnect) -> None:
    directory = state.directory(recorded.name)
    if console.panicked(directory):
        raise _failed(recorded, "the guest's kernel panicked", ExitCode.UNAVAILABLE)
    if libvirtd.find(connection, recorded.name) is None:
        raise _failed(recorded, "QEMU ended while the guest was starting", ExitCode.UNAVAILABLE)


def late(recorded: VmState, message: str) -> OperatorError:
    """The error of a deadline that passed, with the last console lines."""
    return _failed(recorded, message, ExitCode.TIMEOUT)


def _failed(recorded: VmState, message: str, code: ExitCode) -> OperatorError:
    lines = console.last_lines(state.directory(recorded.name))
    shown = "\n  ".join(["last lines of its console:", *lines]) if lines else "its console is empty"
    return OperatorError(f"{message}; {shown}", vm=recorded.name, code=code)
