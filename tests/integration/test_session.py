"""The contract of put, get and flush, over a real socket, by a client written from the specification."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable

import pytest
from framework.client import (
    MAX_BATCH,
    PAGE_BYTES,
    Client,
    ClosedError,
    Encoding,
    Feature,
    Key,
    Op,
    Put,
    RefusedError,
    Role,
    Status,
    key,
)
from framework.daemon import MIB, Tmemd
from tmem_host.api.types import VmChange


def page(seed: int, *, noise: int = 1024) -> bytes:
    """A page of which `noise` bytes do not compress."""
    return random.Random(seed).randbytes(noise) + bytes(PAGE_BYTES - noise)


def word_page(word: int) -> bytes:
    return word.to_bytes(8, "little") * (PAGE_BYTES // 8)


@pytest.mark.parametrize("accept_lz4", [False, True])
@pytest.mark.parametrize(
    ("stored", "encoding"),
    [
        (page(1), Encoding.RAW),
        (page(2), Encoding.LZ4),
        (page(3, noise=PAGE_BYTES), Encoding.RAW),
        (word_page(0), Encoding.RAW),
        (word_page(0x0123_4567_89AB_CDEF), Encoding.SAME_FILLED),
        (word_page(7), Encoding.LZ4),
    ],
)
@pytest.mark.parametrize("persistent", [False, True])
def test_a_page_comes_back_byte_exact(
    tmemd: Tmemd, stored: bytes, encoding: Encoding, persistent: bool, accept_lz4: bool
) -> None:
    with tmemd.guest("a") as guest:
        pool = guest.create_pool("p", persistent=persistent)
        assert guest.put(pool, [(key(1), stored)], encoding) == [Put.STORED]
        for _ in range(2):
            assert guest.get(pool, [key(1), key(1, 1)], accept_lz4=accept_lz4) == [stored, None]


def test_a_full_batch(tmemd: Tmemd) -> None:
    pages = [(key(9, index), page(index, noise=PAGE_BYTES)) for index in range(MAX_BATCH)]
    keys = [page_key for page_key, _ in pages]
    with tmemd.guest("a") as guest:
        pool = guest.create_pool("p", persistent=True)
        assert guest.put(pool, pages) == [Put.STORED] * MAX_BATCH
        assert guest.get(pool, keys) == [data for _, data in pages]
        assert guest.flush_page(pool, keys) == [True] * MAX_BATCH
        assert guest.flush_page(pool, keys) == [False] * MAX_BATCH


def test_a_put_replaces(tmemd: Tmemd) -> None:
    with tmemd.guest("a") as guest:
        pool = guest.create_pool("p", persistent=True)
        guest.put(pool, [(key(1), page(1))])
        guest.put(pool, [(key(1), page(2))])
        assert guest.get(pool, [key(1)]) == [page(2)]


def test_a_corrupt_put_is_refused_and_the_old_data_is_gone(tmemd: Tmemd) -> None:
    with tmemd.guest("a") as guest:
        pool = guest.create_pool("p", persistent=True)
        guest.put(pool, [(key(1), page(1))])
        wrong = guest.call(
            Op.PUT,
            # An entry whose checksum is not that of its page.
            b"".join([key(1).object, bytes(4), b"\x01\x00", (4096).to_bytes(2, "little"), b"\xff" * 4])
            + page(2),
            flags=2,
            pool=pool,
            count=1,
        )
        assert wrong.body == bytes([Put.CORRUPT])
        assert guest.get(pool, [key(1)]) == [None]


def test_an_exclusive_get_removes_and_an_inclusive_one_does_not(tmemd: Tmemd) -> None:
    with tmemd.guest("a") as guest:
        exclusive = guest.create_pool("x", exclusive=True)
        inclusive = guest.create_pool("i")
        for pool, second in ((exclusive, None), (inclusive, page(1))):
            guest.put(pool, [(key(1), page(1))])
            assert guest.get(pool, [key(1)]) == [page(1)]
            assert guest.get(pool, [key(1)]) == [second]


def test_flush_object_and_pool(tmemd: Tmemd) -> None:
    with tmemd.guest("a") as guest:
        pool = guest.create_pool("p", persistent=True)
        for number in (1, 2, 3):
            guest.put(pool, [(key(number, index), page(index)) for index in range(5)])
        assert guest.flush_object(pool, [key(1).object, key(4).object]) == [True, False]
        assert guest.get(pool, [key(1, 0), key(2, 0)]) == [None, page(0)]
        guest.flush_pool(pool)
        assert guest.get(pool, [key(2, 0), key(3, 4)]) == [None, None]
        assert guest.stats()["persistent_pages"] == 0


def test_frozen_puts_are_refused_duplicates_flushed_and_gets_served(tmemd: Tmemd) -> None:
    with tmemd.guest("a") as guest, tmemd.guest("a", role=Role.CONTROL) as agent, tmemd.admin() as admin:
        pool = guest.create_pool("p", persistent=True)
        guest.put(pool, [(key(1), page(1)), (key(2), page(2))])
        assert admin.change_vm("a", VmChange(frozen=True)).frozen
        assert agent.next_notice() == (Op.FROZEN, 1, 0)
        assert guest.put(pool, [(key(1), page(3)), (key(3), page(3))]) == [Put.FROZEN, Put.FROZEN]
        assert guest.get(pool, [key(1), key(2), key(3)]) == [None, page(2), None]
        assert guest.flush_page(pool, [key(2)]) == [True]
        with tmemd.guest("a", role=Role.CONTROL) as later:
            assert later.next_notice() == (Op.FROZEN, 1, 0)
        admin.change_vm("a", VmChange(frozen=False))
        assert agent.next_notice() == (Op.FROZEN, 0, 0)
        assert guest.put(pool, [(key(1), page(3))]) == [Put.STORED]


def test_the_quota_holds_and_is_told(tmemd: Tmemd) -> None:
    with tmemd.guest("a") as guest, tmemd.guest("a", role=Role.CONTROL) as agent, tmemd.admin() as admin:
        quota = 2 * MIB
        vm = admin.change_vm("a", VmChange(quota_bytes=quota))
        assert (vm.quota_bytes, vm.quota_changes) == (quota, 1)
        assert agent.next_notice()[:2] == (Op.QUOTA, quota)
        pool = guest.create_pool("p", persistent=True)
        statuses = []
        for start in range(0, 1024, 64):
            pages = [(key(1, start + index), os.urandom(PAGE_BYTES)) for index in range(64)]
            statuses += guest.put(pool, pages)
        stored = statuses.count(Put.STORED)
        assert 400 < stored < 512
        assert statuses[stored:] == [Put.OVER_QUOTA] * (1024 - stored)
        vm = admin.vm("a")
        assert vm.stored_bytes <= quota
        assert vm.puts_refused == 1024 - stored
        # Half the quota: nothing persistent is dropped, and the agent is asked for the excess.
        admin.change_vm("a", VmChange(quota_bytes=quota // 2))
        assert agent.next_notice()[:2] == (Op.QUOTA, quota // 2)
        op, pages_wanted, _ = agent.next_notice()
        assert op is Op.RECLAIM
        assert stored * 0.4 < pages_wanted < stored * 0.6
        assert admin.vm("a").persistent_pages == stored
        assert admin.vm("a").reclaim_pending_pages == pages_wanted
        guest.flush_page(pool, [key(1, index) for index in range(256)])
        assert admin.vm("a").reclaim_pending_pages == max(0, pages_wanted - 256)


def test_reclaim_is_repeated_until_it_is_met(tmemd: Tmemd) -> None:
    with tmemd.guest("a") as guest, tmemd.admin() as admin:
        pool = guest.create_pool("p", persistent=True)
        guest.put(pool, [(key(1, index), page(index)) for index in range(100)])
        admin.reclaim("a", 60)
        with tmemd.guest("a", role=Role.CONTROL) as agent:
            # An agent that comes later is asked, and asked again.
            assert agent.next_notice() == (Op.RECLAIM, 60, 0)
            assert agent.next_notice() == (Op.RECLAIM, 60, 0)
            guest.flush_page(pool, [key(1, index) for index in range(60)])
            assert admin.vm("a").reclaim_pending_pages == 0


def test_a_new_boot_gets_fresh_pools_and_ends_the_old_connections(tmemd: Tmemd) -> None:
    with tmemd.guest("a", boot=1) as old, tmemd.admin() as admin:
        pool = old.create_pool("p", persistent=True)
        old.put(pool, [(key(1), page(1))])
        with tmemd.guest("a", boot=1) as same:
            assert same.create_pool("p", persistent=True) == pool
            assert same.get(pool, [key(1)]) == [page(1)]
            old.ping()
        with tmemd.guest("a", boot=2) as new:
            assert admin.vm("a").persistent_pages == 0
            assert admin.vm("a").boot_id == (2).to_bytes(16, "little").hex()
            with pytest.raises(RefusedError) as gone:
                new.get(pool, [key(1)])
            assert gone.value.status is Status.NO_SUCH_POOL
            with pytest.raises((ClosedError, BrokenPipeError)):
                old.ping()
            # A connection of the old boot that was delayed must not destroy the new one's pools.
            fresh = new.create_pool("p", persistent=True)
            new.put(fresh, [(key(1), page(2))])
            with pytest.raises(RefusedError) as late:
                tmemd.guest("a", boot=1)
            assert late.value.status is Status.DENIED
            assert new.get(fresh, [key(1)]) == [page(2)]


def test_pool_conflicts_and_unknown_pools(tmemd: Tmemd) -> None:
    with tmemd.guest("a") as guest:
        guest.create_pool("p", persistent=True)
        with pytest.raises(RefusedError) as conflict:
            guest.create_pool("p")
        assert conflict.value.status is Status.CONFLICT
        for request in (lambda: guest.get(999, [key(1)]), lambda: guest.put(999, [(key(1), page(1))])):
            with pytest.raises(RefusedError) as unknown:
                request()
            assert unknown.value.status is Status.NO_SUCH_POOL
        guest.destroy_pool(999)
        guest.ping()


def test_one_vm_cannot_touch_another_s_pool(tmemd: Tmemd) -> None:
    tmemd.add_vm("b")
    with tmemd.guest("a") as a, tmemd.guest("b") as b:
        pool = a.create_pool("p", persistent=True)
        a.put(pool, [(key(1), page(1))])
        b.create_pool("p", persistent=True)
        for request in (
            lambda: b.get(pool, [key(1)]),
            lambda: b.put(pool, [(key(1), page(2))]),
            lambda: b.flush_page(pool, [key(1)]),
            lambda: b.flush_pool(pool),
        ):
            with pytest.raises(RefusedError) as refused:
                request()
            assert refused.value.status is Status.NO_SUCH_POOL
        b.destroy_pool(pool)
        assert a.get(pool, [key(1)]) == [page(1)]


def test_a_shared_pool_needs_a_grant(tmemd: Tmemd) -> None:
    tmemd.add_vm("b")
    name = uuid.uuid4()
    with tmemd.guest("a") as a, tmemd.guest("b") as b, tmemd.admin() as admin:
        admin.grant_shared(str(name), "a")
        pool = a.create_pool("s", shared=name)
        a.put(pool, [(key(1), page(1))])
        with pytest.raises(RefusedError) as refused:
            b.create_pool("s", shared=name)
        assert refused.value.status is Status.DENIED
        admin.grant_shared(str(name), "b")
        joined = b.create_pool("s", shared=name)
        assert b.get(joined, [key(1)]) == [page(1)]
        assert [pool.shared for pool in admin.pools("b")] == [name.hex]


def test_pipelined_requests_are_answered_in_order(tmemd: Tmemd) -> None:
    with tmemd.guest("a") as guest:
        pool = guest.create_pool("p", persistent=True)
        guest.put(pool, [(key(1), page(1))])
        tags = [guest.send(Op.PING) for _ in range(50)]
        gets = [guest.send(Op.GET, key(1).object + bytes(4), pool=pool, count=1) for _ in range(50)]
        for tag in tags:
            guest.answer(tag, Op.PING)
        for tag in gets:
            assert guest.pages(guest.answer(tag, Op.GET), 1) == [page(1)]


def test_without_lz4_pages_come_raw(tmemd: Tmemd) -> None:
    with tmemd.guest("a", features=Feature(0)) as guest:
        assert guest.hello.features == Feature(0)
        pool = guest.create_pool("p")
        guest.put(pool, [(key(1), page(1))])
        answer = guest.call(Op.GET, key(1).object + bytes(4), flags=4, pool=pool, count=1)
        assert answer.body[1] == Encoding.RAW


def test_an_answer_larger_than_the_guest_accepts_is_refused(tmemd: Tmemd) -> None:
    with tmemd.guest("a", max_frame_bytes=10_000) as guest:
        pool = guest.create_pool("p")
        assert guest.get(pool, [key(1), key(2)]) == [None, None]
        with pytest.raises(RefusedError) as refused:
            guest.get(pool, [key(index) for index in range(3)])
        assert refused.value.status is Status.LIMIT


def test_reports_and_statistics(tmemd: Tmemd) -> None:
    with tmemd.guest("a", role=Role.CONTROL) as agent, tmemd.admin() as admin:
        agent.report(1234, 56, 1 << 30, 1 << 29)
        report = admin.vm("a").report
        assert report is not None
        assert (report.psi_some_avg10, report.psi_full_avg10) == (12.34, 0.56)
        assert (report.mem_total_bytes, report.mem_available_bytes) == (1 << 30, 1 << 29)
        assert report.age_s < 10
        pool = agent.create_pool("p", persistent=True)
        agent.put(pool, [(key(1), page(1))])
        agent.get(pool, [key(1), key(2)])
        stats, vm = agent.stats(), admin.vm("a")
        for name in ("puts_accepted", "gets_hit", "gets_missed", "persistent_pages", "quota_bytes"):
            assert stats[name] == getattr(vm, name)
        assert (stats["puts_accepted"], stats["gets_hit"], stats["gets_missed"]) == (1, 1, 1)
        assert stats["used_bytes"] == vm.stored_bytes
        text = admin.metrics()
        assert 'tmem_vm_gets_hit_total{vm="a"} 1.0' in text
        assert 'tmem_vm_page_seconds_count{operation="get",vm="a"} 2.0' in text
        assert 'tmem_guest_psi_some_avg10{vm="a"} 12.34' in text


def test_many_connections_at_once(start_tmemd: Callable[..., Tmemd]) -> None:
    tmemd = start_tmemd()
    vms = [f"vm{number}" for number in range(8)]
    clients: list[tuple[Client, int]] = []
    try:
        for vm in vms:
            tmemd.add_vm(vm)
            for role in Role:
                guest = tmemd.guest(vm, role=role)
                clients.append((guest, guest.create_pool("p", persistent=True)))
        for number, (guest, pool) in enumerate(clients):
            guest.put(pool, [(Key(bytes([number] * 16), 0), page(number))])
        for number, (guest, pool) in enumerate(clients):
            assert guest.get(pool, [Key(bytes([number] * 16), 0)]) == [page(number)]
    finally:
        for guest, _ in clients:
            guest.close()
