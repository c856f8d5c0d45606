"""Whom a command talks to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tmem_host.api.client import Client


@dataclass(frozen=True, slots=True)
class Context:
    """What the options before the command chose."""

    admin_socket: Path
    libvirt_uri: str

    def client(self) -> Client:
        """A client of tmemd's admin API, to be used as a context manager."""
        from tmem_host.api.client import Client  # noqa: PLC0415  # httpx takes 0.2 s to import

        return Client(self.admin_socket)
