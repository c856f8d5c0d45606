"""systemd's notification protocol (sd_notify(3)): readiness, stopping, watchdog."""

from __future__ import annotations

import os
import socket


def notify(message: str) -> None:
    """Send a notification such as `READY=1`; does nothing where systemd did not ask for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(message.encode(), address)
        except OSError:
            # The manager is gone or does not listen: not a reason for the service to fail.
            return


def watchdog_s() -> float | None:
    """How often, in seconds, systemd wants to hear `WATCHDOG=1`; half of it is a good period."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 1e6 if usec.isdigit() else None
