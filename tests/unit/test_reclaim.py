"""When guests are asked to take pages back."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tmem_host.service.reclaim import EXPIRY_S, REPEAT_S, Reclaimer, Use, excess_pages


def use(*, quota: int = 100, stored: int = 0, pages: int = 0, connections: int = 1) -> Use:
    return Use(
        quota_bytes=quota, persistent_bytes=stored, persistent_pages=pages, connections_opened=connections
    )


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.integers(0, 1 << 24))
def test_the_excess_is_enough_and_not_more_than_needed(quota: int, stored: int, pages: int) -> None:
    excess = excess_pages(use(quota=quota, stored=stored, pages=pages))
    assert 0 <= excess <= pages
    if stored <= quota or pages == 0:
        assert excess == 0
    else:
        left = stored * (pages - excess)
        assert left <= quota * pages
        assert left + stored > quota * pages


def test_a_vm_within_its_quota_is_left_alone() -> None:
    assert Reclaimer().decide({"a": use(stored=100, pages=10)}, 0) == {}


def test_it_is_asked_once_and_again_without_progress() -> None:
    reclaimer = Reclaimer()
    over = use(stored=200, pages=10)
    assert reclaimer.decide({"a": over}, 0) == {"a": 5}
    assert reclaimer.decide({"a": over}, 1) == {}
    assert reclaimer.decide({"a": over}, REPEAT_S) == {"a": 5}
    # Progress earns patience.
    better = use(stored=180, pages=9)
    assert reclaimer.decide({"a": better}, REPEAT_S + 2) == {}
    assert reclaimer.decide({"a": better}, 2 * REPEAT_S) == {}
    assert reclaimer.decide({"a": better}, 2 * REPEAT_S + 2) == {"a": 4}
    assert reclaimer.decide({"a": use(stored=100, pages=5)}, 100) == {}


def test_a_new_connection_and_a_lower_quota_are_told_at_once() -> None:
    reclaimer = Reclaimer()
    over = use(stored=200, pages=10)
    reclaimer.decide({"a": over}, 0)
    assert reclaimer.decide({"a": msgspec.structs.replace(over, connections_opened=2)}, 0.1) == {"a": 5}
    assert reclaimer.decide({"a": use(quota=50, stored=200, pages=10, connections=2)}, 0.2) == {"a": 8}


def test_a_request_is_pursued_until_it_is_met_or_old() -> None:
    reclaimer = Reclaimer()
    small = use(stored=50, pages=10)
    reclaimer.request("a", 4, small, 0)
    assert reclaimer.pending("a", small) == 4
    assert reclaimer.decide({"a": small}, 0) == {"a": 4}
    fewer = use(stored=40, pages=8)
    assert reclaimer.pending("a", fewer) == 2
    assert reclaimer.decide({"a": fewer}, 1) == {}
    assert reclaimer.decide({"a": use(stored=30, pages=6)}, 2) == {}
    assert reclaimer.pending("a", small) == 0
    reclaimer.request("a", 4, small, 10)
    assert reclaimer.decide({"a": small}, 10) == {"a": 4}
    assert reclaimer.decide({"a": small}, 11 + EXPIRY_S) == {}


def test_a_request_for_more_than_there_is() -> None:
    reclaimer = Reclaimer()
    small = use(stored=50, pages=10)
    reclaimer.request("a", 1000, small, 0)
    assert reclaimer.decide({"a": small}, 0) == {"a": 10}


def test_vms_that_are_gone_are_forgotten() -> None:
    reclaimer = Reclaimer()
    over = use(stored=200, pages=10)
    reclaimer.request("a", 1, over, 0)
    reclaimer.decide({"a": over, "b": over}, 0)
    reclaimer.decide({}, 1)
    assert reclaimer.decide({"b": over}, 1.5) == {"b": 5}
    assert reclaimer.pending("a", use(stored=10, pages=10)) == 0
