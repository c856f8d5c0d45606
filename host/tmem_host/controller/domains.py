"""Which domains run, from libvirt's events and statistics.

A thread of its own asks libvirt: a call may hang as long as libvirtd or a QEMU monitor does, and the
controller must notice that rather than hang with it. Events end the wait between two looks at once; the
statistics of a look are the truth (an event may be lost while libvirtd restarts).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import libvirt

from tmem_host.api.types import VmSpec
from tmem_host.controller.metadata import MetadataError, parse_spec

_log = logging.getLogger(__name__)

_KEEPALIVE_S = 5
_KEEPALIVE_MISSES = 3
_RECONNECT_S = 2.0

_STATISTICS = (
    libvirt.VIR_DOMAIN_STATS_STATE | libvirt.VIR_DOMAIN_STATS_BALLOON | libvirt.VIR_DOMAIN_STATS_BLOCK
)
_ACTIVE_NOWAIT = (
    libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
)

_PAGES_LIVE_ON = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT,
}
"""Why a domain may stop and its guest still go on later, with its pages."""


# libvirt prints errors to stderr by itself; they are raised as exceptions too.
libvirt.registerErrorHandler(lambda _context, _error: None, None)


@dataclass(frozen=True, slots=True)
class Domain:
    """A running domain."""

    name: str
    spec: VmSpec | None
    """How to register it; None if its XML does not mention tmem (or wrongly)."""
    memory_bytes: int
    """What the guest has now (balloon)."""
    disk_bytes: int
    """Read and written by all its disks since it started."""


class DomainWatch:
    """Follows the domains of one libvirt connection while it is entered; reconnects by itself."""

    def __init__(
        self,
        uri: str,
        *,
        wake: threading.Event | None = None,
        interval_s: float = 1.0,
        stale_after_s: float = 10.0,
    ) -> None:
        """`wake` is set whenever a domain started or stopped; what is older than `stale_after_s` is not
        told."""
        self._uri = uri
        self._interval_s = interval_s
        self._stale_after_s = stale_after_s
        self._thread = threading.Thread(target=self._run, name="libvirt", daemon=True)
        self._look = threading.Event()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._domains: dict[str, Domain] = {}
        self._seen_at_s: float | None = None
        self._stopped: deque[str] = deque(maxlen=1000)
        self._connection: libvirt.virConnect | None = None
        self._complaint = ""
        self._specs: dict[tuple[str, int], VmSpec | None] = {}
        self._wake = wake or threading.Event()

    def __enter__(self) -> Self:
        """Start to follow."""
        _ensure_event_loop()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._look.set()
        # A hung libvirt call cannot be interrupted; the thread is a daemon and dies with the process.
        self._thread.join(timeout=2 * self._interval_s)

    def running(self) -> dict[str, Domain] | None:
        """Running domains by name; None while libvirt cannot be asked."""
        with self._lock:
            if self._seen_at_s is None or time.monotonic() - self._seen_at_s > self._stale_after_s:
                return None
            return dict(self._domains)

    def take_stopped(self) -> list[str]:
        """Names of domains that stopped for good since the last call."""
        with self._lock:
            names = list(dict.fromkeys(self._stopped))
            self._stopped.clear()
        return names

    def is_stopped(self, name: str) -> bool:
        """Whether libvirt says, now, that no domain of this name runs; False if it cannot be asked."""
        connection = self._connection
        if connection is None:
            return False
        try:
            return bool(connection.lookupByName(name).isActive() == 0)
        except libvirt.libvirtError as error:
            return bool(error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._connection = self._connect()
                while not self._stop.is_set():
                    self._look_at(self._connection)
                    self._complain("")
                    self._look.wait(self._interval_s)
                    self._look.clear()
            except libvirt.libvirtError as error:
                self._complain(error.get_error_message())
                self._seen_at_s = None
                self._stop.wait(_RECONNECT_S)
            finally:
                connection, self._connection = self._connection, None
                if connection is not None:
                    _close(connection)

    def _connect(self) -> libvirt.virConnect:
        connection = libvirt.open(self._uri)
        try:
            connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_MISSES)
        except libvirt.libvirtError as error:
            # Drivers inside this process (test:///) have no connection to keep alive.
            _log.debug("no keep-alive on %s: %s", self._uri, error)
        connection.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None
        )
        return connection

    def _on_lifecycle(
        self,
        connection: libvirt.virConnect,
        domain: libvirt.virDomain,
        event: int,
        detail: int,
        opaque: object,
    ) -> None:
        del connection, opaque
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED and detail not in _PAGES_LIVE_ON:
            with self._lock:
                self._stopped.append(domain.name())
        self._look.set()

    def _look_at(self, connection: libvirt.virConnect) -> None:
        seen = {}
        specs = {}
        for handle, statistics in connection.getAllDomainStats(_STATISTICS, _ACTIVE_NOWAIT):
            name = handle.name()
            # A domain's id changes whenever it starts, and its XML is read once for each.
            key = (name, handle.ID())
            specs[key] = self._specs[key] if key in self._specs else _spec(handle, name)
            seen[name] = _domain(name, specs[key], statistics)
        self._specs = specs
        with self._lock:
            different = seen.keys() != self._domains.keys() or self._seen_at_s is None
            self._domains = seen
            self._seen_at_s = time.monotonic()
        if different or self._stopped:
            self._wake.set()

    def _complain(self, text: str) -> None:
        if text and text != self._complaint:
            _log.warning("libvirt cannot be asked (%s): quotas stay as they are", " ".join(text.split()))
        if self._complaint and not text:
            _log.info("libvirt answers again")
        self._complaint = text


def _spec(handle: libvirt.virDomain, name: str) -> VmSpec | None:
    try:
        return parse_spec(handle.XMLDesc(0))
    except MetadataError as error:
        _log.warning("domain %s is not registered: its tmem metadata is wrong: %s", name, error)
        return None


# The statistics' values have no common type: libvirt-python declares them Any.
def _domain(name: str, spec: VmSpec | None, statistics: dict[str, Any]) -> Domain:
    disks = range(int(statistics.get("block.count", 0)))
    return Domain(
        name=name,
        spec=spec,
        memory_bytes=int(statistics.get("balloon.current", 0)) * 1024,
        disk_bytes=sum(
            int(statistics.get(f"block.{disk}.{way}.bytes", 0)) for disk in disks for way in ("rd", "wr")
        ),
    )


def _close(connection: libvirt.virConnect) -> None:
    try:
        connection.close()
    except libvirt.libvirtError as error:
        _log.debug("closing the libvirt connection: %s", error)


_event_loop = threading.Lock()
_event_loop_runs = False


def _ensure_event_loop() -> None:
    """Run libvirt's event loop in a thread; once for the process, before its first connection."""
    global _event_loop_runs  # noqa: PLW0603  # libvirt's event loop is global as well
    with _event_loop:
        if _event_loop_runs:
            return
        libvirt.virEventRegisterDefaultImpl()

        def turn() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        threading.Thread(target=turn, name="libvirt-events", daemon=True).start()
        _event_loop_runs = True
