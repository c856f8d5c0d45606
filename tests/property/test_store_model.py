"""Random operations on the native store and on the model, every answer compared.

Several VMs with private pools and one they share; limits, capacity and compression change; guests reboot; the
store is closed and opened, and its process killed, between operations and in the middle of them.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import lz4.block
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from property.store_model import Address, Encoding, Kind, ModelStore, checksum, decode
from property.store_process import StoreProcess

if TYPE_CHECKING:
    import tmem_native

# Room for everything there can be, until it is taken away.
CAPACITY_BYTES = 8 << 20
VMS = ("one", "two")
PoolName = Literal["persistent", "ephemeral", "exclusive", "shared"]
POOLS: tuple[PoolName, ...] = ("persistent", "ephemeral", "exclusive", "shared")
UUID = b"u" * 16
Place = tuple[str, PoolName]
Operation = Literal["put", "get", "flush_page", "flush_object", "flush_pool"]
OPERATIONS: tuple[Operation, ...] = ("put", "get", "flush_page", "flush_object", "flush_pool")
names = st.sampled_from(VMS)
places = st.tuples(names, st.sampled_from(POOLS))
addresses = st.tuples(
    st.sampled_from([b"a" * 16, b"b" * 16, bytes(16)]),
    st.sampled_from([0, 1, 2, 63, 64, 65, 1 << 20, 0xFFFF_FFFF]),
)


def page(content: int) -> bytes:
    """Pages of every compressibility."""
    if content % 4 == 0:
        return content.to_bytes(8, "little") * 512
    state, out = content, bytearray()
    for _ in range(content % 4096):
        state = (state * 1_664_525 + 1_013_904_223) & 0xFFFF_FFFF
        out.append(state >> 24)
    return bytes(out).ljust(4096, b"\0")


class Stores(RuleBasedStateMachine):
    """The native store may refuse and evict where the model does not; nothing else may differ."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.arena = str(Path(self.directory.name) / "arena")
        self.model = ModelStore()
        self.boots = 0
        # Until a quota, a capacity or a freeze is set, no put is refused.
        self.roomy = True
        self.start()
        self.vms = {name: (self.model.add_vm(name), self.native.add_vm(name)) for name in VMS}
        for model, native in self.vms.values():
            self.model.grant_shared(UUID, model)
            self.native.grant_shared(UUID, native)
        self.find_pools()

    def start(self) -> None:
        self.process = StoreProcess(CAPACITY_BYTES, self.arena)
        self.native = cast("tmem_native.Store", self.process)

    def find_pools(self) -> None:
        self.pools = {}
        for name, (model, native) in self.vms.items():
            for pool in POOLS:
                kind: Kind = "ephemeral" if pool == "shared" else pool
                shared = UUID if pool == "shared" else None
                self.pools[name, pool] = (
                    (model, self.model.create_pool(model, pool, kind, shared=shared)),
                    (native, self.native.create_pool(native, pool, kind, shared=shared)),
                )

    def teardown(self) -> None:
        self.process.kill()
        self.directory.cleanup()

    @rule(place=places, address=addresses, content=st.integers(0, 50_000), as_lz4=st.booleans())
    def put(self, place: Place, address: Address, content: int, as_lz4: bool) -> None:
        model, native = self.pools[place]
        payload = page(content)
        block = lz4.block.compress(payload, store_size=False)
        kind: Encoding = "lz4" if as_lz4 and len(block) < len(payload) else "raw"
        payload, total = (block if kind == "lz4" else payload), checksum(payload)
        expected = self.model.put(*model, *address, payload, encoding=kind, checksum=total)
        answer = self.native.put(*native, *address, payload, encoding=kind, checksum=total)
        if answer in ("over_quota", "no_memory"):
            assert not self.roomy
            self.model.forget(*model, address)
        else:
            assert answer == expected

    @rule(place=places, address=addresses, accept_lz4=st.booleans())
    def get(self, place: Place, address: Address, accept_lz4: bool) -> None:
        model, native = self.pools[place]
        expected = self.model.get(*model, *address)
        status, encoding, payload, total = self.native.get(*native, *address, accept_lz4=accept_lz4)
        if status == "hit":
            assert (decode(encoding, payload), total) == (expected[2], expected[3])
        else:
            assert status == "miss"
            assert expected[0] == "miss" or place[1] != "persistent"
            self.model.forget(*model, address)

    @rule(place=places, address=addresses)
    def flush_page(self, place: Place, address: Address) -> None:
        model, native = self.pools[place]
        expected = self.model.flush_page(*model, *address)
        self.compare(expected, self.native.flush_page(*native, *address), place)

    @rule(place=places, address=addresses)
    def flush_object(self, place: Place, address: Address) -> None:
        model, native = self.pools[place]
        expected = self.model.flush_object(*model, address[0])
        self.compare(expected, self.native.flush_object(*native, address[0]), place)

    @rule(place=places)
    def flush_pool(self, place: Place) -> None:
        model, native = self.pools[place]
        self.compare(self.model.flush_pool(*model), self.native.flush_pool(*native), place)

    @staticmethod
    def compare(expected: int, answer: int, place: Place) -> None:
        assert answer <= expected
        assert answer == expected or place[1] != "persistent"

    @rule(name=names)
    def flush_ephemeral(self, name: str) -> None:
        model, native = self.vms[name]
        assert self.native.flush_ephemeral(native) <= self.model.flush_ephemeral(model)

    @rule(place=places)
    def destroy_pool(self, place: Place) -> None:
        model, native = self.pools[place]
        self.compare(self.model.destroy_pool(*model), self.native.destroy_pool(*native), place)
        self.find_pools()

    @rule(name=names, frozen=st.booleans())
    def freeze(self, name: str, frozen: bool) -> None:
        self.roomy = False
        model, native = self.vms[name]
        self.model.set_frozen(model, frozen)
        self.native.set_frozen(native, frozen)

    @rule(name=names, quota_kib=st.integers(0, 64), weight=st.integers(1, 1000))
    def set_limits(self, name: str, quota_kib: int, weight: int) -> None:
        self.roomy = False
        self.native.set_limits(self.vms[name][1], quota_bytes=quota_kib << 10, weight=weight)

    @rule(on=st.booleans())
    def set_compression(self, on: bool) -> None:
        self.native.set_compression(on)

    @rule(name=names)
    def reboot(self, name: str) -> None:
        self.boots += 1
        model, native = self.vms[name]
        boot_id = self.boots.to_bytes(16, "little")
        self.model.attach_boot(model, boot_id)
        assert self.native.attach_boot(native, boot_id) is not None
        self.find_pools()

    @rule(capacity_kib=st.integers(0, 4096))
    def resize(self, capacity_kib: int) -> None:
        self.roomy = False
        assert self.native.set_capacity(capacity_kib << 10) >= self.native.usage()["backed_bytes"]

    @rule(size_kib=st.integers(0, 512))
    def free_memory(self, size_kib: int) -> None:
        # With no empty slab left to give, ephemeral pages go.
        self.roomy &= size_kib == 0
        self.native.free_memory(size_kib << 10)

    @rule()
    def restart(self) -> None:
        self.process.close()
        self.return_to_service()

    @rule()
    def crash(self) -> None:
        self.process.kill()
        self.return_to_service()

    def return_to_service(self) -> None:
        self.start()
        for name, (_, native) in self.vms.items():
            assert self.native.find_vm(name) == native
        self.find_pools()

    @rule(
        place=places,
        operation=st.sampled_from(OPERATIONS),
        address=addresses,
        content=st.integers(0, 50_000),
        delay_us=st.integers(0, 400),
    )
    def crash_during(
        self, place: Place, operation: Operation, address: Address, content: int, delay_us: int
    ) -> None:
        """What was under way is done or not done; all else is untouched."""
        model, native = self.pools[place]
        before, new = self.model.pages(*model), page(content)
        details: dict[Operation, tuple[object, ...]] = {
            "put": (*address, new),
            "get": address,
            "flush_page": address,
            "flush_object": (address[0],),
            "flush_pool": (),
        }
        self.process.begin(operation, *native, *details[operation])
        time.sleep(delay_us * 1e-6)
        self.process.kill()
        self.return_to_service()
        model, native = self.pools[place]
        for each in {address, *before}:
            allowed = {before.get(each)}
            if operation == "put" and each == address:
                # Where there is no room for both, the old page goes before the new one comes.
                allowed |= {new} if self.roomy else {new, None}
            concerned = {"flush_object": each[0] == address[0], "flush_pool": True}
            if operation != "put" and concerned.get(operation, each == address):
                allowed |= set() if operation == "get" and place[1] != "exclusive" else {None}
            if place[1] != "persistent" and not self.roomy:
                allowed.add(None)
            status, encoding, payload, _ = self.native.get(*native, *each)
            found = decode(encoding, payload) if status == "hit" else None
            assert found in allowed
            if found is None or place[1] == "exclusive":
                self.model.forget(*model, each)
            elif found != before.get(each):
                self.model.learn(*model, each, found)
        if place[1] == "shared":
            # Of a page that was put again with the same content, either member may be the owner now.
            self.flush_pool(place)

    @rule(name=names, delay_us=st.integers(0, 400))
    def crash_during_reboot(self, name: str, delay_us: int) -> None:
        """The guest says again which boot it is in, and finds nothing of the former one."""
        self.boots += 1
        model, native = self.vms[name]
        boot_id = self.boots.to_bytes(16, "little")
        self.model.attach_boot(model, boot_id)
        self.process.begin("attach_boot", native, boot_id)
        time.sleep(delay_us * 1e-6)
        self.process.kill()
        self.start()
        self.native.attach_boot(native, boot_id)
        self.find_pools()

    @invariant()
    def quotas_hold_and_sums_agree(self) -> None:
        usage, pages, used = self.native.usage(), 0, 0
        for _, native in self.vms.values():
            stats = self.native.vm_stats(native)
            assert stats is not None
            pages += stats["ephemeral_pages"] + stats["persistent_pages"]
            used += stats["stored_bytes"]
        assert (usage["pages"], usage["used_bytes"]) == (pages, used)
        assert usage["backed_bytes"] <= usage["capacity_bytes"]


TestStores = Stores.TestCase
TestStores.settings = settings(
    max_examples=25, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
