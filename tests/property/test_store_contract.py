"""One conformance suite for the contract of a store, run against the native store and against the model."""

from __future__ import annotations

import os
from collections.abc import Callable

import lz4.block
import pytest
import tmem_native
from property.store_model import Kind, ModelStore, checksum, decode

Store = ModelStore | tmem_native.Store
OBJECT = b"an object's name"
KINDS: tuple[Kind, ...] = ("persistent", "ephemeral", "exclusive")


@pytest.fixture(params=[ModelStore, lambda: tmem_native.Store(16 << 20)], ids=["model", "native"])
def store(request: pytest.FixtureRequest) -> Store:
    make: Callable[[], Store] = request.param
    return make()


def page(number: int, noise_bytes: int = 300) -> bytes:
    noise = (number * 7919).to_bytes(8, "little") * (noise_bytes // 8)
    return noise.ljust(4096, b"\0")


def fetch(store: Store, vm: int, pool: int, index: int, *, accept_lz4: bool = False) -> bytes | None:
    status, encoding, payload, total = store.get(vm, pool, OBJECT, index, accept_lz4=accept_lz4)
    if status == "miss":
        assert (encoding, payload) == ("none", b"")
        return None
    assert status == "hit"
    got = decode(encoding, payload)
    assert got is not None
    assert checksum(got) == total
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [page(1), bytes(4096), b"\xff" * 4096, os.urandom(4096)])
def test_a_page_comes_back_byte_exact(store: Store, kind: Kind, content: bytes) -> None:
    vm = store.add_vm("guest")
    pool = store.create_pool(vm, "pool", kind)
    assert fetch(store, vm, pool, 7) is None
    assert store.put(vm, pool, OBJECT, 7, content) == "stored"
    assert fetch(store, vm, pool, 7) == content
    assert (fetch(store, vm, pool, 7) == content) == (kind != "exclusive")


@pytest.mark.parametrize("kind", KINDS)
def test_put_put_get_gives_the_new_page(store: Store, kind: Kind) -> None:
    vm = store.add_vm("guest")
    pool = store.create_pool(vm, "pool", kind)
    for number in range(20):
        assert store.put(vm, pool, OBJECT, 1, page(number, number * 200)) == "stored"
    assert fetch(store, vm, pool, 1) == page(19, 19 * 200)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_put_leaves_no_old_page(store: Store, kind: Kind) -> None:
    vm = store.add_vm("guest")
    pool = store.create_pool(vm, "pool", kind)
    store.put(vm, pool, OBJECT, 1, page(1))
    store.put(vm, pool, OBJECT, 2, page(2))
    store.put(vm, pool, OBJECT, 3, page(3))
    assert store.put(vm, pool, OBJECT, 1, page(4), checksum=1 ^ checksum(page(4))) == "corrupt"
    assert store.put(vm, pool, OBJECT, 2, b"no block", encoding="lz4") == "corrupt"
    store.set_frozen(vm, True)
    assert store.put(vm, pool, OBJECT, 3, page(4)) == "frozen"
    assert [fetch(store, vm, pool, index) for index in (1, 2, 3)] == [None, None, None]


def test_frozen_still_gets_and_flushes(store: Store) -> None:
    vm = store.add_vm("guest")
    pool = store.create_pool(vm, "pool", "persistent")
    store.put(vm, pool, OBJECT, 1, page(1))
    store.set_frozen(vm, True)
    assert fetch(store, vm, pool, 1) == page(1)
    assert store.flush_page(vm, pool, OBJECT, 1)
    store.set_frozen(vm, False)
    assert store.put(vm, pool, OBJECT, 1, page(2)) == "stored"


def test_lz4_goes_in_and_comes_out(store: Store) -> None:
    vm = store.add_vm("guest")
    pool = store.create_pool(vm, "pool", "persistent")
    block = lz4.block.compress(page(5, 1000), store_size=False)
    assert store.put(vm, pool, OBJECT, 1, block, encoding="lz4", checksum=checksum(page(5, 1000))) == "stored"
    for accept_lz4 in (False, True):
        assert fetch(store, vm, pool, 1, accept_lz4=accept_lz4) == page(5, 1000)
    store.put(vm, pool, OBJECT, 2, b"\1\2\3\4\5\6\7\x08", encoding="same_filled")
    assert fetch(store, vm, pool, 2) == b"\1\2\3\4\5\6\7\x08" * 512


def test_flushes_take_effect_and_may_be_repeated(store: Store) -> None:
    vm = store.add_vm("guest")
    pool = store.create_pool(vm, "pool", "persistent")
    other = b"x" * 16
    for index in (0, 63, 64, 0xFFFF_FFFF):
        store.put(vm, pool, OBJECT, index, page(index % 97))
        store.put(vm, pool, other, index, page(index % 97))
    assert [store.flush_page(vm, pool, OBJECT, 63) for _ in range(2)] == [True, False]
    assert [store.flush_object(vm, pool, OBJECT) for _ in range(2)] == [3, 0]
    assert [store.flush_pool(vm, pool) for _ in range(2)] == [4, 0]


def test_pools_and_vms_do_not_see_each_other(store: Store) -> None:
    one, two = store.add_vm("one"), store.add_vm("two")
    pools = [store.create_pool(vm, "pool", "persistent") for vm in (one, two)]
    second = store.create_pool(one, "second", "persistent")
    store.put(one, pools[0], OBJECT, 1, page(1))
    assert fetch(store, two, pools[1], 1) is None
    assert fetch(store, one, second, 1) is None
    with pytest.raises(KeyError):
        store.get(two, pools[0], OBJECT, 1)
    with pytest.raises(KeyError):
        store.flush_pool(two, pools[0])
    assert store.remove_vm(two) == 0
    assert fetch(store, one, pools[0], 1) == page(1)


def test_a_shared_pool_needs_a_grant(store: Store) -> None:
    one, two = store.add_vm("one"), store.add_vm("two")
    uuid = b"u" * 16
    with pytest.raises(Exception, match=r".") as refusal:
        store.create_pool(one, "shared", "ephemeral", shared=uuid)
    assert not isinstance(refusal.value, KeyError)
    store.grant_shared(uuid, one)
    store.grant_shared(uuid, two)
    pools = [store.create_pool(vm, "shared", "exclusive", shared=uuid) for vm in (one, two)]
    store.put(one, pools[0], OBJECT, 1, page(1))
    assert fetch(store, two, pools[1], 1) == page(1)
    assert fetch(store, one, pools[0], 1) == page(1)


def test_a_new_boot_starts_empty(store: Store) -> None:
    vm = store.add_vm("guest")
    store.attach_boot(vm, b"1" * 16)
    pool = store.create_pool(vm, "pool", "persistent")
    store.put(vm, pool, OBJECT, 1, page(1))
    assert store.attach_boot(vm, b"1" * 16) is None
    assert fetch(store, vm, pool, 1) == page(1)
    assert store.attach_boot(vm, b"2" * 16) == (1, 1)
    pool = store.create_pool(vm, "pool", "persistent")
    assert fetch(store, vm, pool, 1) is None
