"""When to ask a guest for how many of its persistent pages.

Persistent pages cannot be evicted: if a VM has more of them than its quota allows, only its guest can help,
by moving them to its own swap file. It is asked at once, again when it connects, and whenever it has made
no progress for a while.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

REPEAT_S = 3.0
"""How long a guest may make no progress before it is asked again."""
EXPIRY_S = 300.0
"""How long a request of the administrator is pursued."""


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """What a VM uses at one moment."""

    quota_bytes: int
    persistent_bytes: int
    persistent_pages: int
    connections_opened: int
    """Connections since the daemon started: a new one may be an agent that was not asked yet."""


class _Asked(msgspec.Struct):
    pages: int
    persistent_pages: int
    connections_opened: int
    at: float


class _Request(msgspec.Struct):
    target_pages: int
    expires: float


def excess_pages(use: Use) -> int:
    """Persistent pages over the quota, at the VM's own bytes per page."""
    excess_bytes = use.persistent_bytes - use.quota_bytes
    if excess_bytes <= 0 or use.persistent_pages == 0:
        return 0
    # Pages times excess over bytes, rounded up.
    return min(use.persistent_pages, -(-use.persistent_pages * excess_bytes // use.persistent_bytes))


class Reclaimer:
    """Decides, once a second, which guests to ask. It neither asks nor reads a clock itself."""

    def __init__(self) -> None:
        self._asked: dict[str, _Asked] = {}
        self._requests: dict[str, _Request] = {}

    def request(self, vm: str, pages: int, use: Use, now: float) -> None:
        """The administrator wants `pages` back."""
        target = max(0, use.persistent_pages - pages)
        self._requests[vm] = _Request(target, now + EXPIRY_S)
        self._asked.pop(vm, None)

    def pending(self, vm: str, use: Use) -> int:
        """Pages the guest is still to take back."""
        request = self._requests.get(vm)
        wanted = use.persistent_pages - request.target_pages if request else 0
        return max(0, wanted, excess_pages(use))

    def decide(self, uses: Mapping[str, Use], now: float) -> dict[str, int]:
        """Pages to ask each VM for now; VMs that need not be asked are left out."""
        for vm in self._requests.keys() - uses.keys():
            del self._requests[vm]
        for vm in self._asked.keys() - uses.keys():
            del self._asked[vm]
        decisions = {}
        for vm, use in uses.items():
            request = self._requests.get(vm)
            if request and (now > request.expires or use.persistent_pages <= request.target_pages):
                del self._requests[vm]
            pages = self.pending(vm, use)
            if pages == 0:
                self._asked.pop(vm, None)
            elif self._is_due(vm, use, pages, now):
                decisions[vm] = pages
                self._asked[vm] = _Asked(pages, use.persistent_pages, use.connections_opened, now)
        return decisions

    def _is_due(self, vm: str, use: Use, pages: int, now: float) -> bool:
        asked = self._asked.get(vm)
        if asked is None or use.connections_opened > asked.connections_opened or pages > asked.pages:
            return True
        if use.persistent_pages < asked.persistent_pages:
            # It is at it.
            asked.persistent_pages = use.persistent_pages
            asked.at = now
            return False
        return now - asked.at >= REPEAT_S
