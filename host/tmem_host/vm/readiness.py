"""Waiting for a guest that starts: it says when it is ready, and its console why it never is."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from contextlib import ExitStack
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
    with ExitStack() as streams, selectors.DefaultSelector() as selector:
        selector.register(notifications, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(_POLL_S):
                if key.fileobj is notifications:
                    stream, address = notifications.accept()
                    streams.enter_context(stream)
                    if recorded.transport != "vhost-vsock" or address[0] == recorded.cid:
                        selector.register(stream, selectors.EVENT_READ)
                elif isinstance(key.fileobj, socket.socket):
                    # One packet, and then the guest waits for us to close: its half-close does not get through
                    # every transport. How long it takes to send it depends on how busy this host is, and it is
                    # said only once.
                    selector.unregister(key.fileobj)
                    with key.fileobj as stream:
                        if b"READY=1" in _received(stream):
                            return
            _check_alive(recorded, connection)
            if time.monotonic() > deadline:
                raise late(recorded, "the guest did not become ready in time")


def _received(stream: socket.socket) -> bytes:
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
