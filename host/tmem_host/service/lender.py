"""The administrator's operations on engine and registry, with their checks and errors."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import psutil
from tmem_native import Engine, EngineError

from tmem_host.api.types import Policy, Pool, PoolId, Recovery, Status, Vm, VmChange, VmSpec
from tmem_host.config import TmemdConfig
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.service import keeper
from tmem_host.service.reclaim import Reclaimer, Use
from tmem_host.service.registry import Entry, Registry
from tmem_host.units import format_size

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@:-]{0,62}")
_UUID = re.compile(r"[0-9a-f]{32}")
_WEIGHTS = range(1, 10_001)
_LOCAL_CID = 1  # this machine itself, through vsock_loopback
_GUEST_CIDS = range(3, 2**32 - 1)
_CODES = {
    "not_found": ExitCode.NOT_FOUND,
    "conflict": ExitCode.CONFLICT,
    "in_use": ExitCode.CONFLICT,
    "invalid": ExitCode.USAGE,
    "no_space": ExitCode.NO_SPACE,
    "privilege": ExitCode.PRIVILEGE,
    "shutting_down": ExitCode.UNAVAILABLE,
}
_VM_FIELDS = frozenset(field.name for field in msgspec.structs.fields(Vm))


def operator_error(error: EngineError, vm: str | None = None, hint: str = "") -> OperatorError:
    """What an operator is told when the engine refuses."""
    message, kind = error.args
    return OperatorError(str(message), hint=hint, vm=vm, code=_CODES.get(kind, ExitCode.FAILED))


class Lender:
    """Lends the arena's memory to VMs. Changes are serialised; what may block runs outside the event loop."""

    def __init__(self, config: TmemdConfig, engine: Engine, registry: Registry) -> None:
        self._config = config
        self.engine = engine
        self.registry = registry
        self.reclaimer = Reclaimer()
        self.draining = False
        self._started = time.monotonic()
        self._lock = asyncio.Lock()
        self._closed: dict[str, str] = {}
        """VMs whose sockets could not be opened, with the reason that was logged."""

    # Start

    async def restore(self) -> None:
        """Open the sockets of the VMs registered before the restart; those that fail are tried again."""
        async with self._lock:
            for name, entry in self.registry.vms.items():
                await self._open(name, entry)
            for uuid, vms in self.registry.grants.items():
                for vm in set(vms) & set(self.engine.vms()):
                    self.engine.grant_shared(bytes.fromhex(uuid), vm)
        for name in sorted(set(self.engine.stored_vms()) - set(self.registry.vms)):
            log.warning("the arena holds pages of an unregistered VM; they are kept", extra={"vm": name})

    async def retry(self) -> None:
        """Try again to open the sockets that could not be opened."""
        if not self._closed:
            return
        async with self._lock:
            for name in list(self._closed):
                if name in self.registry.vms:
                    await self._open(name, self.registry.vms[name])
                else:
                    del self._closed[name]

    async def _open(self, name: str, entry: Entry) -> None:
        try:
            await asyncio.to_thread(self._add, name, entry)
        except EngineError as error:
            reason = str(error.args[0])
            if self._closed.get(name) != reason:
                log.error("its guest cannot connect: %s", reason, extra={"vm": name})  # noqa: TRY400
            self._closed[name] = reason
        else:
            self._closed.pop(name, None)

    # The daemon

    def status(self) -> Status:
        """The daemon and its memory."""
        usage = self.engine.usage()
        memory = psutil.virtual_memory()
        found = self.engine.recovery
        return Status(
            version=_version(),
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started,
            draining=self.draining,
            arena=self._config.arena.path,
            capacity_bytes=usage["capacity_bytes"],
            used_bytes=usage["used_bytes"],
            free_bytes=max(0, usage["capacity_bytes"] - usage["used_bytes"]),
            payload_bytes=usage["payload_bytes"],
            metadata_bytes=usage["metadata_bytes"],
            raw_bytes=usage["raw_bytes"],
            pages=usage["pages"],
            same_filled_pages=usage["same_filled_pages"],
            host_memory_bytes=memory.total,
            host_available_bytes=memory.available,
            vms=len(self.engine.vms()),
            connections=usage["connections"],
            recovery=Recovery(
                pages=found["persistent_pages"],
                discarded=found["reclaimed_slots"] + found["ephemeral_pages"],
                seconds=found["elapsed_us"] / 1e6,
            ),
        )

    async def set_capacity(self, capacity_bytes: int) -> Status:
        """Change how much memory may be lent, until the next restart."""
        memory = psutil.virtual_memory().total
        if not 0 <= capacity_bytes <= memory:
            raise OperatorError(
                f"a capacity of {format_size(capacity_bytes)} is not between 0 and the host's memory, "
                f"{format_size(memory)}",
                code=ExitCode.USAGE,
            )
        async with self._lock:
            got = await self._call(self.engine.set_capacity, capacity_bytes)
        log.info("capacity changed", extra={"capacity_bytes": got})
        return self.status()

    async def free(self, size_bytes: int) -> int:
        """Give memory back to the host by dropping ephemeral pages; returns the bytes freed."""
        if size_bytes < 0:
            raise OperatorError("the size to free is negative", code=ExitCode.USAGE)
        freed = await self._call(self.engine.free_memory, size_bytes)
        log.info("memory given back to the host", extra={"asked_bytes": size_bytes, "freed_bytes": freed})
        return freed

    # VMs

    def vms(self) -> list[Vm]:
        """All VMs by name."""
        return [self.vm(name) for name in self.engine.vms() if name in self.registry.vms]

    def vm(self, name: str) -> Vm:
        """One VM."""
        entry = self._entry(name)
        try:
            found = self.engine.vm(name)
        except EngineError as error:
            raise self._not_open(name, error) from error
        fields = {field: value for field, value in found.items() if field in _VM_FIELDS}
        use = self._use(found["connections_opened"], fields)
        return msgspec.convert(
            fields
            | {
                "spec": msgspec.to_builtins(entry.spec),
                "pinned": entry.pinned,
                "quota_changes": entry.quota_changes,
                "reclaim_pending_pages": self.reclaimer.pending(name, use),
            },
            Vm,
        )

    async def add_vm(self, name: str, spec: VmSpec) -> Vm:
        """Register a VM and open its sockets."""
        if not _NAME.fullmatch(name):
            raise OperatorError(
                f"{name!r} is not a name for a VM",
                hint="use 1 to 63 letters, digits and ._+@:- and begin with a letter or digit",
                code=ExitCode.USAGE,
            )
        spec = self._completed(name, spec)
        capacity = self.engine.usage()["capacity_bytes"]
        quota = capacity if spec.quota_bytes is None else spec.quota_bytes
        async with self._lock:
            known = self.registry.vms.get(name)
            if known is not None:
                if _identity(known.spec) != _identity(spec):
                    raise OperatorError(
                        "it is registered with other sockets, another CID or another maximum",
                        hint=f"remove it first: curl -X DELETE …/v1/vms/{name}, or tmemctl vm down {name}",
                        vm=name,
                        code=ExitCode.CONFLICT,
                    )
                return self.vm(name)
            self._check_limits(name, quota, spec.min_bytes, spec.weight)
            if spec.persistent_max_bytes is not None and spec.persistent_max_bytes < 0:
                raise OperatorError("persistent_max_bytes is negative", vm=name, code=ExitCode.USAGE)
            entry = Entry(
                spec=spec,
                quota_bytes=quota,
                min_bytes=spec.min_bytes,
                weight=spec.weight,
                pinned=spec.pinned,
            )
            await self._call(self._add, name, entry, vm=name)
            self.registry.vms[name] = entry
            try:
                self.registry.save()
            except OperatorError:
                del self.registry.vms[name]
                await self._call(self.engine.remove_vm, name, vm=name)
                raise
        log.info("registered", extra={"vm": name, "quota_bytes": quota})
        return self.vm(name)

    async def change_vm(self, name: str, change: VmChange) -> Vm:
        """Change limits; all of the change is done, or nothing."""
        async with self._lock:
            entry = self._entry(name)
            if change.unless_pinned and entry.pinned:
                return self.vm(name)
            quota = entry.quota_bytes if change.quota_bytes is None else change.quota_bytes
            minimum = entry.min_bytes if change.min_bytes is None else change.min_bytes
            weight = entry.weight if change.weight is None else change.weight
            limits = (quota, minimum, weight)
            if limits != (entry.quota_bytes, entry.min_bytes, entry.weight):
                self._check_limits(name, *limits)
                await self._call(self._set_limits, name, entry, *limits, vm=name)
                if quota != entry.quota_bytes:
                    entry.quota_changes += 1
                    log.info("quota changed", extra={"vm": name, "from": entry.quota_bytes, "to": quota})
                entry.quota_bytes, entry.min_bytes, entry.weight = limits
            if change.frozen is not None and change.frozen != entry.frozen:
                await self._call(self.engine.set_frozen, name, change.frozen, vm=name)
                entry.frozen = change.frozen
                log.info("frozen" if change.frozen else "thawed", extra={"vm": name})
            if change.pinned is not None:
                entry.pinned = change.pinned
            self.registry.save()
        self.reclaim_excess()
        return self.vm(name)

    async def remove_vm(self, name: str) -> None:
        """Unregister a VM; its pools are destroyed and scrubbed."""
        async with self._lock:
            self._entry(name)
            if name in self._closed:
                pages = await self._call(self.engine.forget_vm, name, vm=name)
            else:
                pages = await self._call(self.engine.remove_vm, name, vm=name)
            self._closed.pop(name, None)
            del self.registry.vms[name]
            for uuid, vms in list(self.registry.grants.items()):
                if name in vms:
                    vms.remove(name)
                if not vms:
                    del self.registry.grants[uuid]
            self.registry.save()
        self._remove_directory(name)
        log.info("removed", extra={"vm": name, "pages_destroyed": pages})

    async def flush(self, name: str) -> int:
        """Drop a VM's ephemeral pages."""
        self._entry(name)
        return await self._call(self.engine.flush_ephemeral, name, vm=name)

    def reclaim(self, name: str, pages: int) -> None:
        """Ask a VM's guest to take persistent pages back."""
        if pages < 1:
            raise OperatorError("pages to reclaim: at least 1", vm=name, code=ExitCode.USAGE)
        vm = self.vm(name)
        use = self._use(self.engine.vm(name)["connections_opened"], msgspec.structs.asdict(vm))
        self.reclaimer.request(name, pages, use, time.monotonic())
        self.reclaim_excess()

    def reclaim_excess(self) -> None:
        """Ask the guests that have more persistent pages than they may; see `reclaim`."""
        uses = {}
        for name in self.engine.vms():
            found = self.engine.vm(name)
            uses[name] = self._use(found["connections_opened"], dict(found))
        for name, pages in self.reclaimer.decide(uses, time.monotonic()).items():
            told = self.engine.reclaim(name, pages)
            log.info("asked to take pages back", extra={"vm": name, "pages": pages, "agents": told})

    # Pools

    def pools(self, name: str) -> list[Pool]:
        """A VM's pools."""
        self._entry(name)
        try:
            return msgspec.convert(self.engine.pools(name), list[Pool])
        except EngineError as error:
            raise self._not_open(name, error) from error

    async def destroy_pool(self, name: str, pool: PoolId) -> None:
        """Destroy a pool."""
        self._entry(name)
        pages = await self._call(self.engine.destroy_pool, name, pool, vm=name)
        log.info("pool destroyed", extra={"vm": name, "pool": pool, "pages": pages})

    async def grant_shared(self, uuid: str, name: str) -> None:
        """Allow a VM to join a shared pool."""
        await self._change_grant(uuid, name, allow=True)

    async def revoke_shared(self, uuid: str, name: str) -> None:
        """Forbid it."""
        await self._change_grant(uuid, name, allow=False)

    async def _change_grant(self, uuid: str, name: str, *, allow: bool) -> None:
        if not _UUID.fullmatch(uuid):
            raise OperatorError(f"{uuid!r} is not a UUID of 32 hexadecimal digits", code=ExitCode.USAGE)
        async with self._lock:
            self._entry(name)
            change = self.engine.grant_shared if allow else self.engine.revoke_shared
            await self._call(change, bytes.fromhex(uuid), name, vm=name)
            vms = [vm for vm in self.registry.grants.pop(uuid, []) if vm != name]
            if allow:
                vms.append(name)
            if vms:
                self.registry.grants[uuid] = vms
            self.registry.save()
        log.info("shared pool granted" if allow else "shared pool revoked", extra={"vm": name, "uuid": uuid})

    # Policy

    def set_policy(self, policy: Policy) -> Policy:
        """Keep another policy for the controller."""
        if not policy.name:
            raise OperatorError("the policy has no name", code=ExitCode.USAGE)
        self.registry.set_policy(policy)
        log.info("policy changed", extra={"policy": policy.name})
        return policy

    # Parts

    def _entry(self, name: str) -> Entry:
        try:
            return self.registry.vms[name]
        except KeyError:
            known = ", ".join(sorted(self.registry.vms)) or "none"
            raise OperatorError(
                f"no VM '{name}' is registered", hint=f"registered are: {known}", code=ExitCode.NOT_FOUND
            ) from None

    def _not_open(self, name: str, error: EngineError) -> OperatorError:
        reason = self._closed.get(name)
        if reason is None:
            return operator_error(error, vm=name)
        return OperatorError(
            f"its guest cannot connect: {reason}", vm=name, code=ExitCode.UNAVAILABLE, hint="see tmemd's log"
        )

    def _completed(self, name: str, spec: VmSpec) -> VmSpec:
        """The spec with the default socket, its paths and numbers checked."""
        if spec.cid is None and spec.hybrid_socket is None and spec.vhost_user_socket is None:
            path = Path(self._config.sockets.vm_directory) / name / "vsock.sock"
            spec = msgspec.structs.replace(spec, hybrid_socket=str(path))
        for path_text in (spec.hybrid_socket, spec.vhost_user_socket):
            if path_text is not None and not Path(path_text).is_absolute():
                raise OperatorError(
                    f"socket path {path_text!r} is not absolute", vm=name, code=ExitCode.USAGE
                )
        for cid in (None if spec.cid == _LOCAL_CID else spec.cid, spec.guest_cid):
            if cid is not None and cid not in _GUEST_CIDS:
                raise OperatorError(
                    f"CID {cid} is reserved or out of range",
                    hint=f"guests have CIDs from {_GUEST_CIDS.start} to {_GUEST_CIDS.stop - 1}",
                    vm=name,
                    code=ExitCode.USAGE,
                )
        if spec.vhost_user_socket is not None and spec.guest_cid is None:
            raise OperatorError("a vhost_user_socket needs a guest_cid", vm=name, code=ExitCode.USAGE)
        return spec

    def _check_limits(self, name: str, quota: int, minimum: int, weight: int) -> None:
        capacity = self.engine.usage()["capacity_bytes"]
        memory = psutil.virtual_memory().total
        problem, hint = "", ""
        if quota < 0:
            problem = f"a quota of {quota} bytes is negative"
        elif quota > memory:
            problem = f"a quota of {format_size(quota)} is over the host's memory, {format_size(memory)}"
        elif quota > capacity:
            problem = f"a quota of {format_size(quota)} is over tmemd's capacity, {format_size(capacity)}"
            hint = "raise the capacity first, or set a lower quota"
        elif not 0 <= minimum <= quota:
            problem = (
                f"a minimum of {format_size(minimum)} is not between 0 and the quota, {format_size(quota)}"
            )
        elif weight not in _WEIGHTS:
            problem = f"a weight of {weight} is not between {_WEIGHTS.start} and {_WEIGHTS.stop - 1}"
        if problem:
            raise OperatorError(problem, hint=hint, vm=name, code=ExitCode.USAGE)

    def _add(self, name: str, entry: Entry) -> None:
        spec = entry.spec
        if spec.vhost_user_socket is not None:
            # Before the device starts: it may have to take over from a tmemd that died.
            keeper_socket = Path(self._config.sockets.admin).parent / "keeper.sock"
            self.engine.use_keeper(str(keeper.ensure(keeper_socket)))
        self.engine.add_vm(
            name,
            quota_bytes=entry.quota_bytes,
            min_bytes=entry.min_bytes,
            weight=entry.weight,
            persistent_max_bytes=spec.persistent_max_bytes,
            cid=spec.cid,
            hybrid_socket=spec.hybrid_socket,
            vhost_user_socket=spec.vhost_user_socket,
            guest_cid=spec.guest_cid,
        )
        self.engine.set_frozen(name, entry.frozen)

    def _set_limits(self, name: str, entry: Entry, quota: int, minimum: int, weight: int) -> None:
        self.engine.set_limits(
            name,
            quota_bytes=quota,
            min_bytes=minimum,
            weight=weight,
            persistent_max_bytes=entry.spec.persistent_max_bytes,
        )

    def _remove_directory(self, name: str) -> None:
        directory = Path(self._config.sockets.vm_directory) / name
        try:
            directory.rmdir()
        except OSError:
            # Not ours, in use by the VM's other sockets, or never there.
            return

    @staticmethod
    def _use(connections_opened: int, figures: dict[str, object]) -> Use:
        return msgspec.convert(
            {
                "quota_bytes": figures["quota_bytes"],
                "persistent_bytes": figures["persistent_bytes"],
                "persistent_pages": figures["persistent_pages"],
                "connections_opened": connections_opened,
            },
            Use,
        )

    async def _call(self, function: Callable[..., T], *args: object, vm: str | None = None) -> T:
        """Run what may block outside the event loop; the engine's errors become the operator's."""
        try:
            return await asyncio.to_thread(function, *args)
        except EngineError as error:
            raise operator_error(error, vm=vm) from error


def _identity(spec: VmSpec) -> tuple[object, ...]:
    return (
        spec.cid,
        spec.hybrid_socket,
        spec.vhost_user_socket,
        spec.guest_cid,
        spec.persistent_max_bytes,
    )


def _version() -> str:
    try:
        return version("tmem")
    except PackageNotFoundError:
        return "unknown"
