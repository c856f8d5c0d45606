"""Registers running domains with tmemd and releases the pages of domains that stopped for good."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

from tmem_host.api.types import Pool, PoolId, Vm, VmSpec
from tmem_host.controller.domains import Domain
from tmem_host.errors import ExitCode, OperatorError

_log = logging.getLogger(__name__)

_TMEMD_GONE = (ExitCode.UNAVAILABLE, ExitCode.TIMEOUT, ExitCode.PRIVILEGE)


class Registry(Protocol):
    """The part of the admin API's client that registering needs."""

    def add_vm(self, name: str, spec: VmSpec) -> Vm:
        """Register a VM."""
        ...

    def remove_vm(self, name: str) -> None:
        """Forget a VM and its pages."""
        ...

    def vm(self, name: str) -> Vm:
        """The VM as it is now."""
        ...

    def pools(self, name: str) -> list[Pool]:
        """Its pools."""
        ...

    def destroy_pool(self, name: str, pool: PoolId) -> None:
        """Destroy one of them."""
        ...


class Libvirt(Protocol):
    """The part of the domain watch that releasing needs."""

    def is_stopped(self, name: str) -> bool:
        """Whether it is certain that the domain does not run."""
        ...


class Registrar:
    """Remembers what it registered, and which failures it has already reported."""

    def __init__(self) -> None:
        self._mine: set[str] = set()
        self._complaints: dict[str, str] = {}

    def register(self, tmemd: Registry, running: Mapping[str, Domain], registered: Iterable[str]) -> int:
        """Register running domains that ask for tmem and are unknown to tmemd; returns how many.

        A domain that tmemd refuses is reported once and tried again in the next round. Raises OperatorError
        if tmemd is not there.
        """
        known = set(registered)
        added = 0
        for name, domain in running.items():
            if domain.spec is None or name in known:
                continue
            try:
                tmemd.add_vm(name, domain.spec)
            except OperatorError as error:
                if error.code in _TMEMD_GONE:
                    raise
                if self._complaints.get(name) != error.message:
                    _log.warning("VM %s is not registered: %s", name, error)
                    self._complaints[name] = error.message
                continue
            self._complaints.pop(name, None)
            self._mine.add(name)
            added += 1
            _log.info("VM %s: registered", name)
        return added

    def release(self, tmemd: Registry, libvirt: Libvirt, name: str) -> bool:
        """Give the memory of a stopped domain back to the others; returns whether that was done.

        A VM that this controller registered is forgotten; of others only the pools are destroyed. The pools
        are listed before libvirt is asked: if the domain does not run *after* that, they are a dead
        guest's, however quickly a new one starts; pool ids are never used twice.
        """
        try:
            pools = tmemd.pools(name)
            if tmemd.vm(name).connections or not libvirt.is_stopped(name):
                return False
            for pool in pools:
                tmemd.destroy_pool(name, pool.id)
            if name in self._mine:
                self._mine.discard(name)
                tmemd.remove_vm(name)
        except OperatorError as error:
            if error.code in _TMEMD_GONE:
                raise
            # Not registered, or forgotten meanwhile by whoever stopped it.
            return False
        _log.info("VM %s stopped: %d pools destroyed", name, len(pools))
        return True
