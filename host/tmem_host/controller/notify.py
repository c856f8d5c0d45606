"""Telling systemd how the service does (sd_notify); nothing where there is no systemd."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Sends to the socket systemd names in NOTIFY_SOCKET, as sd_notify(3) does."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        # A leading @ stands for Linux' abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._status = ""

    def ready(self, status: str) -> None:
        """The service is up."""
        self._status = status
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """What `systemctl status` shows; sent only when it changes."""
        if status != self._status:
            self._status = status
            self._send(f"STATUS={status}")

    def stopping(self) -> None:
        """The service is about to exit."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            try:
                sender.sendto(text.encode(), self._address)
            except OSError:
                # Whoever started us has stopped listening; that is no reason to fail.
                return
