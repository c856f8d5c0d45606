"""Random operations on the native store and on the model, every answer compared, with restarts in between."""

from __future__ import annotations

import tempfile
from pathlib import Path

import lz4.block
import tmem_native
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from property.store_model import Encoding, Kind, ModelStore, checksum, decode

CAPACITY_BYTES = 3 << 20
VMS = ("one", "two")
KINDS: tuple[Kind, ...] = ("persistent", "ephemeral", "exclusive")
places = st.tuples(st.sampled_from(VMS), st.sampled_from(KINDS))
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
        self.native: tmem_native.Store | None = None
        self.open()
        self.boots = 0

    def open(self) -> None:
        self.native = tmem_native.Store(CAPACITY_BYTES, arena=self.arena)
        self.vms = {name: (self.model.add_vm(name), self.native.add_vm(name)) for name in VMS}
        self.find_pools()

    def find_pools(self) -> None:
        assert self.native is not None
        self.pools = {
            (name, kind): (
                (vm, self.model.create_pool(vm, kind, kind)),
                (native_vm, self.native.create_pool(native_vm, kind, kind)),
            )
            for name, (vm, native_vm) in self.vms.items()
            for kind in KINDS
        }

    def teardown(self) -> None:
        self.native = None
        self.directory.cleanup()

    @rule(place=places, address=addresses, content=st.integers(0, 50_000), as_lz4=st.booleans())
    def put(self, place: tuple[str, Kind], address: tuple[bytes, int], content: int, as_lz4: bool) -> None:
        assert self.native is not None
        model, native = self.pools[place]
        payload = page(content)
        block = lz4.block.compress(payload, store_size=False)
        kind: Encoding = "lz4" if as_lz4 and len(block) < len(payload) else "raw"
        payload, total = (block if kind == "lz4" else payload), checksum(payload)
        expected = self.model.put(*model, *address, payload, encoding=kind, checksum=total)
        answer = self.native.put(*native, *address, payload, encoding=kind, checksum=total)
        if answer in ("over_quota", "no_memory"):
            self.model.forget(*model, address)
        else:
            assert answer == expected

    @rule(place=places, address=addresses, accept_lz4=st.booleans())
    def get(self, place: tuple[str, Kind], address: tuple[bytes, int], accept_lz4: bool) -> None:
        assert self.native is not None
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
    def flush_page(self, place: tuple[str, Kind], address: tuple[bytes, int]) -> None:
        assert self.native is not None
        model, native = self.pools[place]
        self.compare(
            self.model.flush_page(*model, *address), self.native.flush_page(*native, *address), place
        )

    @rule(place=places, address=addresses)
    def flush_object(self, place: tuple[str, Kind], address: tuple[bytes, int]) -> None:
        assert self.native is not None
        model, native = self.pools[place]
        self.compare(
            self.model.flush_object(*model, address[0]), self.native.flush_object(*native, address[0]), place
        )

    @rule(place=places)
    def flush_pool(self, place: tuple[str, Kind]) -> None:
        assert self.native is not None
        model, native = self.pools[place]
        self.compare(self.model.flush_pool(*model), self.native.flush_pool(*native), place)

    @staticmethod
    def compare(expected: int, answer: int, place: tuple[str, Kind]) -> None:
        assert answer <= expected
        assert answer == expected or place[1] != "persistent"

    @rule(name=st.sampled_from(VMS), frozen=st.booleans())
    def freeze(self, name: str, frozen: bool) -> None:
        assert self.native is not None
        model, native = self.vms[name]
        self.model.set_frozen(model, frozen)
        self.native.set_frozen(native, frozen)

    @rule(name=st.sampled_from(VMS), quota_kib=st.integers(0, 64))
    def set_quota(self, name: str, quota_kib: int) -> None:
        assert self.native is not None
        self.native.set_limits(self.vms[name][1], quota_bytes=quota_kib << 10)

    @rule(name=st.sampled_from(VMS))
    def reboot(self, name: str) -> None:
        assert self.native is not None
        self.boots += 1
        model, native = self.vms[name]
        boot_id = self.boots.to_bytes(16, "little")
        self.model.attach_boot(model, boot_id)
        assert self.native.attach_boot(native, boot_id) is not None
        self.find_pools()

    @rule(capacity_kib=st.integers(0, 4096))
    def resize(self, capacity_kib: int) -> None:
        assert self.native is not None
        self.native.set_capacity(capacity_kib << 10)

    @rule()
    def restart(self) -> None:
        self.native = None
        self.native = tmem_native.Store(CAPACITY_BYTES, arena=self.arena)
        for name, (_, native) in self.vms.items():
            assert self.native.find_vm(name) == native
        self.find_pools()

    @invariant()
    def quotas_hold_and_sums_agree(self) -> None:
        assert self.native is not None
        usage, pages, used = self.native.usage(), 0, 0
        for _, native in self.vms.values():
            stats = self.native.vm_stats(native)
            assert stats is not None
            pages += stats["ephemeral_pages"] + stats["persistent_pages"]
            used += stats["used_bytes"]
        assert (usage["pages"], usage["used_bytes"]) == (pages, used)


TestStores = Stores.TestCase
TestStores.settings = settings(
    max_examples=40, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
