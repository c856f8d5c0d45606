"""Tell systemd how far the agent is (sd_notify(3)); without systemd, nobody."""

from __future__ import annotations

import os
import socket


def notify(*assignments: str) -> None:
    """Send assignments such as `READY=1`. Never fails: the agent's socket tells of its readiness, too."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        try:
            connection.connect(address)
            connection.send("\n".join(assignments).encode())
        except OSError:
            return
