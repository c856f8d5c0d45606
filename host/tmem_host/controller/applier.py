"""A policy's decision → changed quotas in tmemd."""

from __future__ import annotations

import logging
from typing import Protocol

from tmem_host.api.types import Vm, VmChange
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.policies import Decision, Snapshot
from tmem_host.units import format_size

_log = logging.getLogger(__name__)


class Changes(Protocol):
    """The part of the admin API's client that applying a decision needs."""

    def change_vm(self, name: str, change: VmChange) -> Vm:
        """Change its limits."""
        ...


def apply(client: Changes, snapshot: Snapshot, decision: Decision) -> int:
    """Set the quotas that differ from the snapshot's; returns how many VMs were changed.

    VMs that shrink come first, so that the sum of quotas never exceeds the larger of before and after. A VM
    that has gone since the snapshot, or refuses its change, is skipped. Raises OperatorError if tmemd is
    not there.
    """
    before = {vm.name: vm.quota_bytes for vm in snapshot.vms}
    changed = [target for target in decision if target.quota_bytes != before[target.vm]]
    changed.sort(key=lambda target: target.quota_bytes - before[target.vm])
    applied = 0
    for target in changed:
        try:
            change = VmChange(quota_bytes=target.quota_bytes, unless_pinned=True)
            if client.change_vm(target.vm, change).pinned:
                continue  # by an administrator, since the snapshot
        except OperatorError as error:
            if error.code in (ExitCode.UNAVAILABLE, ExitCode.TIMEOUT, ExitCode.PRIVILEGE):
                raise
            _log.warning("VM %s keeps its quota: %s", target.vm, error.message)
            continue
        applied += 1
        _log.info(
            "VM %s: quota %s -> %s (%s)",
            target.vm,
            format_size(before[target.vm]),
            format_size(target.quota_bytes),
            target.reason,
        )
    return applied
