"""The store's contract as a small model: dictionaries and python-lz4, no limits on memory, no eviction.

It has the interface of `tmem_native.Store`, so that one suite tests both, and answers of one can be compared
with those of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import lz4.block
import xxhash

PAGE_BYTES = 4096
Kind = Literal["persistent", "ephemeral", "exclusive"]
Encoding = Literal["none", "raw", "same_filled", "lz4"]
PutStatus = Literal["stored", "over_quota", "frozen", "incompressible", "no_memory", "corrupt"]
GetStatus = Literal["hit", "miss", "lost"]
Address = tuple[bytes, int]


def checksum(page: bytes) -> int:
    """The checksum that goes with a page: the low half of its XXH3-64."""
    return xxhash.xxh3_64_intdigest(page) & 0xFFFF_FFFF


def decode(encoding: Encoding, payload: bytes) -> bytes | None:
    """The page a payload stands for; `None` if it stands for none."""
    if encoding == "raw":
        return payload if len(payload) == PAGE_BYTES else None
    if encoding == "same_filled":
        return payload * (PAGE_BYTES // 8) if len(payload) == 8 else None
    if encoding == "lz4" and 0 < len(payload) < PAGE_BYTES:
        try:
            page = lz4.block.decompress(payload, uncompressed_size=PAGE_BYTES)
        except lz4.block.LZ4BlockError:
            return None
        return page if len(page) == PAGE_BYTES else None
    return None


@dataclass
class _Pool:
    """A VM's membership in a pool. `pages` are those of all members, each with the number of who put it."""

    vm: int
    name: str
    kind: Kind
    shared: bytes | None
    pages: dict[Address, tuple[int, bytes]]


@dataclass
class _Vm:
    name: str
    frozen: bool = False
    boot_id: bytes | None = None


@dataclass
class ModelStore:
    """A store that forgets nothing by itself."""

    _vms: dict[int, _Vm] = field(default_factory=dict)
    _pools: dict[int, _Pool] = field(default_factory=dict)
    _grants: set[tuple[bytes, int]] = field(default_factory=set)
    _next_pool: int = 1

    def add_vm(self, name: str) -> int:
        found = self.find_vm(name)
        if found is not None:
            return found
        number = next(number for number in range(1 << 16) if number not in self._vms)
        self._vms[number] = _Vm(name)
        return number

    def find_vm(self, name: str) -> int | None:
        return next((number for number, vm in self._vms.items() if vm.name == name), None)

    def remove_vm(self, vm: int) -> int:
        pages = sum(self.destroy_pool(vm, pool) for pool in self._pools_of(vm))
        self._grants = {grant for grant in self._grants if grant[1] != vm}
        del self._vms[vm]
        return pages

    def set_frozen(self, vm: int, frozen: bool) -> None:
        self._vms[vm].frozen = frozen

    def attach_boot(self, vm: int, boot_id: bytes) -> tuple[int, int] | None:
        if self._vms[vm].boot_id == boot_id:
            return None
        self._vms[vm].boot_id = boot_id
        pools = self._pools_of(vm)
        return len(pools), sum(self.destroy_pool(vm, pool) for pool in pools)

    def _pools_of(self, vm: int) -> list[int]:
        return [number for number, pool in self._pools.items() if pool.vm == vm]

    def create_pool(self, vm: int, name: str, kind: Kind, *, shared: bytes | None = None) -> int:
        if shared is not None and kind == "exclusive":
            kind = "ephemeral"
        for number in self._pools_of(vm):
            pool = self._pools[number]
            if pool.name == name:
                if (pool.kind, pool.shared) != (kind, shared):
                    raise ValueError(name)
                return number
        if shared is not None and (shared, vm) not in self._grants:
            raise PermissionError(name)
        if shared is not None and kind == "persistent":
            raise ValueError(name)
        members = [pool for pool in self._pools.values() if shared is not None and pool.shared == shared]
        number, self._next_pool = self._next_pool, self._next_pool + 1
        self._pools[number] = _Pool(vm, name, kind, shared, members[0].pages if members else {})
        return number

    def destroy_pool(self, vm: int, pool: int) -> int:
        pages = self._drop_own(vm, pool)
        del self._pools[pool]
        return pages

    def _drop_own(self, vm: int, pool: int) -> int:
        pages = self._pool(vm, pool).pages
        own = [address for address, (owner, _) in pages.items() if owner == pool]
        for address in own:
            del pages[address]
        return len(own)

    def _pool(self, vm: int, pool: int) -> _Pool:
        found = self._pools.get(pool)
        if found is None or found.vm != vm:
            raise KeyError(f"VM {vm} has no pool {pool}")
        return found

    def put(
        self,
        vm: int,
        pool: int,
        object: bytes,  # noqa: A002
        index: int,
        payload: bytes,
        *,
        encoding: Encoding = "raw",
        checksum: int | None = None,
    ) -> PutStatus:
        pages, address = self._pool(vm, pool).pages, (object, index)
        pages.pop(address, None)
        if self._vms[vm].frozen:
            return "frozen"
        page = decode(encoding, payload)
        if page is None or (checksum is not None and checksum != globals()["checksum"](page)):
            return "corrupt"
        pages[address] = pool, page
        return "stored"

    def get(
        self,
        vm: int,
        pool: int,
        object: bytes,  # noqa: A002
        index: int,
        *,
        accept_lz4: bool = False,  # noqa: ARG002
    ) -> tuple[GetStatus, Encoding, bytes, int]:
        found = self._pool(vm, pool)
        if (object, index) not in found.pages:
            return "miss", "none", b"", 0
        _, page = found.pages[object, index]
        if found.kind == "exclusive":
            del found.pages[object, index]
        return "hit", "raw", page, checksum(page)

    def pages(self, vm: int, pool: int) -> dict[Address, bytes]:
        """What is there."""
        return {address: page for address, (_, page) in self._pool(vm, pool).pages.items()}

    def forget(self, vm: int, pool: int, address: Address) -> None:
        """Take note that the other store refused or evicted a page."""
        self._pool(vm, pool).pages.pop(address, None)

    def learn(self, vm: int, pool: int, address: Address, page: bytes) -> None:
        """Take note that the other store kept a put that nobody waited for."""
        self._pool(vm, pool).pages[address] = pool, page

    def flush_page(self, vm: int, pool: int, object: bytes, index: int) -> bool:  # noqa: A002
        return self._pool(vm, pool).pages.pop((object, index), None) is not None

    def flush_object(self, vm: int, pool: int, object: bytes) -> int:  # noqa: A002
        pages = self._pool(vm, pool).pages
        gone = [address for address in pages if address[0] == object]
        for address in gone:
            del pages[address]
        return len(gone)

    def flush_pool(self, vm: int, pool: int) -> int:
        pages = self._pool(vm, pool).pages
        count = len(pages)
        pages.clear()
        return count

    def flush_ephemeral(self, vm: int) -> int:
        pools = [pool for pool in self._pools_of(vm) if self._pools[pool].kind != "persistent"]
        return sum(self._drop_own(vm, pool) for pool in pools)

    def grant_shared(self, uuid: bytes, vm: int) -> None:
        self._grants.add((uuid, vm))
