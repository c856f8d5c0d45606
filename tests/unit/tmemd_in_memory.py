"""A tmemd that keeps its state in a dictionary: the admin API's semantics, for tests of its clients'
logic."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec
from tmem_host.api.types import Policy, Pool, PoolId, Status, Vm, VmChange, VmSpec
from tmem_host.errors import ExitCode, OperatorError

MIB = 1 << 20


def vm(name: str, **values: object) -> Vm:
    zeros = dict.fromkeys(Vm.__struct_fields__, 0)
    return msgspec.convert(
        {
            **zeros,
            "name": name,
            "spec": {},
            "weight": 100,
            "pinned": False,
            "frozen": False,
            "connections": 1,
            "boot_id": None,
            "report": None,
            **values,
        },
        Vm,
    )


def pool(vm_name: str, number: int) -> Pool:
    zeros = dict.fromkeys(Pool.__struct_fields__, 0)
    plain = {
        "id": number,
        "vm": vm_name,
        "name": "swap",
        "kind": "persistent",
        "exclusive": False,
        "shared": None,
    }
    return msgspec.convert({**zeros, **plain}, Pool)


@dataclass
class Tmemd:
    """The admin API's semantics that the controller relies on, in memory."""

    capacity_bytes: int = 1000 * MIB
    registered: dict[str, Vm] = field(default_factory=dict)
    pool_list: dict[str, list[Pool]] = field(default_factory=dict)
    chosen: Policy = field(default_factory=lambda: Policy(name="static"))
    running: bool = True
    changes: list[tuple[str, int | None]] = field(default_factory=list)
    reclaims: list[tuple[str, int]] = field(default_factory=list)

    def _check(self, name: str | None = None) -> None:
        if not self.running:
            raise OperatorError("tmemd is not running", code=ExitCode.UNAVAILABLE)
        if name is not None and name not in self.registered:
            raise OperatorError("not registered", vm=name, code=ExitCode.NOT_FOUND)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def vms(self) -> list[Vm]:
        self._check()
        return list(self.registered.values())

    def vm(self, name: str) -> Vm:
        self._check(name)
        return self.registered[name]

    def add_vm(self, name: str, spec: VmSpec) -> Vm:
        self._check()
        if spec.cid == 2:
            raise OperatorError("CID 2 is the host's", vm=name, code=ExitCode.CONFLICT)
        self.registered[name] = vm(name, quota_bytes=spec.quota_bytes or 0, weight=spec.weight)
        return self.registered[name]

    def remove_vm(self, name: str) -> None:
        self._check(name)
        del self.registered[name]

    def change_vm(self, name: str, change: VmChange) -> Vm:
        self._check(name)
        if change.unless_pinned and self.registered[name].pinned:
            return self.registered[name]
        self.changes.append((name, change.quota_bytes))
        values = {key: value for key, value in msgspec.structs.asdict(change).items() if value is not None}
        del values["unless_pinned"]
        self.registered[name] = msgspec.structs.replace(self.registered[name], **values)
        return self.registered[name]

    def pools(self, name: str) -> list[Pool]:
        self._check(name)
        return self.pool_list.get(name, [])

    def destroy_pool(self, name: str, number: PoolId) -> None:
        self._check(name)
        self.pool_list[name] = [each for each in self.pool_list[name] if each.id != number]

    def policy(self) -> Policy:
        self._check()
        return self.chosen

    def set_policy(self, policy: Policy) -> Policy:
        self._check()
        self.chosen = policy
        return policy

    def reclaim(self, name: str, pages: int) -> None:
        self._check(name)
        self.reclaims.append((name, pages))

    def status(self) -> Status:
        self._check()
        zeros = dict.fromkeys(Status.__struct_fields__, 0)
        recovery = {"pages": 0, "discarded": 0, "seconds": 0}
        plain = {"version": "1", "draining": False, "arena": "memfd", "recovery": recovery}
        return msgspec.convert({**zeros, **plain, "capacity_bytes": self.capacity_bytes}, Status)
