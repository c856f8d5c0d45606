"""Invariants of the policies, and their behaviour over traces."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tmem_host.policies import Policy, PolicyError, Snapshot, VmSample, make, names
from tmem_host.policies.catalogue import UnknownPolicyError
from tmem_host.policies.replay import replay
from tmem_host.policies.share import Claim, by_weight, in_proportion

MIB = 1 << 20
GIB = 1 << 30

sizes = st.integers(0, 64 * GIB)


@st.composite
def samples(draw: st.DrawFn, name: str) -> VmSample:
    quota_bytes = draw(sizes)
    return VmSample(
        name=name,
        quota_bytes=quota_bytes,
        used_bytes=draw(st.integers(0, quota_bytes)),
        puts_accepted=draw(st.integers(0, 10**6)),
        puts_refused=draw(st.sampled_from([0, 0, 1, 50_000])),
        weight=draw(st.integers(0, 1000)),
        min_bytes=draw(st.one_of(st.just(0), sizes)),
        cap_bytes=draw(st.one_of(st.none(), sizes)),
        pinned=draw(st.booleans()),
        frozen=draw(st.booleans()),
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    vms = tuple(draw(samples(f"vm{index}")) for index in range(draw(st.integers(0, 8))))
    return Snapshot(total_bytes=draw(sizes), vms=vms)


bounded = st.one_of(
    st.builds(lambda: make("static")),
    st.builds(
        lambda percent, threshold: make("smart-alloc", {"percent": percent, "threshold_percent": threshold}),
        st.floats(0.1, 100),
        st.floats(0, 100),
    ),
)
every = st.one_of(bounded, st.builds(lambda: make("greedy")))


@given(every, snapshots())
def test_decides_for_exactly_the_unpinned(policy: Policy, snapshot: Snapshot) -> None:
    quotas = policy.decide(snapshot).quotas()
    assert set(quotas) == {vm.name for vm in snapshot.vms if not vm.pinned}
    assert all(quota_bytes >= 0 for quota_bytes in quotas.values())


@given(every, snapshots())
def test_is_a_function_of_the_snapshot(policy: Policy, snapshot: Snapshot) -> None:
    assert policy.decide(snapshot) == policy.decide(snapshot)


@given(bounded, snapshots())
def test_sum_stays_within_what_pinned_vms_leave(policy: Policy, snapshot: Snapshot) -> None:
    pinned_bytes = sum(vm.quota_bytes for vm in snapshot.vms if vm.pinned)
    quotas_bytes = sum(policy.decide(snapshot).quotas().values())
    assert quotas_bytes <= max(0, snapshot.total_bytes - pinned_bytes)


@given(every, snapshots())
def test_caps_hold(policy: Policy, snapshot: Snapshot) -> None:
    quotas = policy.decide(snapshot).quotas()
    for vm in snapshot.unpinned():
        assert vm.cap_bytes is None or quotas[vm.name] <= vm.cap_bytes


@given(bounded, snapshots())
def test_guaranteed_minimum_holds_while_the_sum_of_minimums_fits(policy: Policy, snapshot: Snapshot) -> None:
    def floor_bytes(vm: VmSample) -> int:
        return vm.min_bytes if vm.cap_bytes is None else min(vm.min_bytes, vm.cap_bytes)

    quotas = policy.decide(snapshot).quotas()
    if sum(map(floor_bytes, snapshot.unpinned())) <= snapshot.free_to_divide_bytes():
        for vm in snapshot.unpinned():
            assert quotas[vm.name] >= floor_bytes(vm)


@given(snapshots())
def test_static_is_fair_by_weight(snapshot: Snapshot) -> None:
    """Without limits, twice the weight gives twice the quota (to the byte lost in rounding down)."""
    vms = tuple(dataclasses.replace(vm, min_bytes=0, cap_bytes=None) for vm in snapshot.vms)
    snapshot = dataclasses.replace(snapshot, vms=vms)
    quotas = make("static").decide(snapshot).quotas()
    weights = sum(vm.weight for vm in snapshot.unpinned())
    for vm in snapshot.unpinned():
        if weights:
            assert abs(quotas[vm.name] - snapshot.free_to_divide_bytes() * vm.weight / weights) <= 1 + len(
                vms
            )


@given(snapshots(), st.floats(0.1, 100))
def test_smart_alloc_never_takes_from_a_refused_vm_while_all_fits(snapshot: Snapshot, percent: float) -> None:
    policy = make("smart-alloc", {"percent": percent})
    quotas = policy.decide(snapshot).quotas()
    grown_bytes = sum(
        vm.quota_bytes + snapshot.total_bytes * percent / 100 + vm.min_bytes for vm in snapshot.unpinned()
    )
    if grown_bytes <= snapshot.free_to_divide_bytes():
        for vm in snapshot.unpinned():
            if vm.puts_refused and not vm.frozen and vm.cap_bytes is None:
                assert quotas[vm.name] >= vm.quota_bytes


def test_smart_alloc_grows_by_percent_of_the_total() -> None:
    vm = VmSample("a", quota_bytes=100 * MIB, used_bytes=100 * MIB, puts_refused=1)
    decision = make("smart-alloc", {"percent": 10}).decide(Snapshot(1000 * MIB, (vm,)))
    assert decision.quotas() == {"a": 200 * MIB}
    assert decision.targets[0].reason == "1 puts refused"


def test_smart_alloc_shrinks_by_percent_but_not_below_what_is_used() -> None:
    idle = VmSample("idle", quota_bytes=500 * MIB, used_bytes=10 * MIB)
    nearly = VmSample("nearly", quota_bytes=200 * MIB, used_bytes=199 * MIB)
    policy = make("smart-alloc", {"percent": 10, "threshold_percent": 1})
    assert policy.decide(Snapshot(1000 * MIB, (idle, nearly))).quotas() == {
        "idle": 450 * MIB,
        "nearly": 200 * MIB,
    }
    half = dataclasses.replace(idle, used_bytes=480 * MIB)
    assert policy.decide(Snapshot(1000 * MIB, (half,))).quotas() == {"idle": 480 * MIB}


def test_smart_alloc_scales_down_in_proportion() -> None:
    vms = tuple(
        VmSample(name, quota_bytes=quota * MIB, used_bytes=quota * MIB, puts_refused=9)
        for name, quota in (("a", 500), ("b", 200))
    )
    decision = make("smart-alloc", {"percent": 50}).decide(Snapshot(850 * MIB, vms))
    quotas = decision.quotas()  # wanted 925 and 625 of 850
    assert quotas["a"] == pytest.approx(925 / 1550 * 850 * MIB, abs=2)
    assert quotas["b"] == pytest.approx(625 / 1550 * 850 * MIB, abs=2)
    assert "scaled" in decision.targets[0].reason


def test_refusals_of_a_frozen_vm_are_not_need() -> None:
    vm = VmSample("a", quota_bytes=10 * MIB, used_bytes=10 * MIB, puts_refused=1000, frozen=True)
    assert make("smart-alloc").decide(Snapshot(GIB, (vm,))).quotas() == {"a": 10 * MIB}


def test_pinned_vm_takes_from_the_total() -> None:
    vms = (
        VmSample("pinned", quota_bytes=300 * MIB, used_bytes=0, pinned=True),
        VmSample("a", quota_bytes=0, used_bytes=0),
        VmSample("b", quota_bytes=0, used_bytes=0, weight=3),
    )
    assert make("static").decide(Snapshot(700 * MIB, vms)).quotas() == {"a": 100 * MIB, "b": 300 * MIB}


def test_greedy_lets_every_vm_use_the_total() -> None:
    vms = (VmSample("a", 0, 0), VmSample("b", 5, 5), VmSample("c", 5, 5, cap_bytes=7))
    assert make("greedy").decide(Snapshot(GIB, vms)).quotas() == {"a": GIB, "b": GIB, "c": 7}


def test_replay_moves_quota_to_the_needy_and_back() -> None:
    """Demand moves to the other VM; smart-alloc follows, static does not, and pays in refused puts."""
    start = Snapshot(1000 * MIB, tuple(VmSample(name, 500 * MIB, 0) for name in ("a", "b")))
    demands = [{"a": 800 * MIB, "b": 50 * MIB}] * 40 + [{"a": 50 * MIB, "b": 800 * MIB}] * 40
    smart = list(replay(make("smart-alloc", {"percent": 10}), start, demands))
    static = list(replay(make("static"), start, demands))
    assert smart[39].decision.quotas()["a"] >= 800 * MIB
    assert smart[79].decision.quotas()["b"] >= 800 * MIB
    assert all(step.decision.quotas() == {"a": 500 * MIB, "b": 500 * MIB} for step in static)
    assert sum(step.refused_puts() for step in smart) < sum(step.refused_puts() for step in static) / 2


def test_policy_errors_say_what_there_is() -> None:
    with pytest.raises(UnknownPolicyError, match="static, greedy, smart-alloc"):
        make("clever")
    with pytest.raises(PolicyError, match="it takes percent, threshold_percent"):
        make("smart-alloc", {"p": 3})
    with pytest.raises(PolicyError, match=r"from 0\.1 to 100, not -2"):
        make("smart-alloc", {"percent": -2})
    with pytest.raises(PolicyError, match="it takes none"):
        make("static", {"percent": 3})
    assert set(names()) == {"static", "greedy", "smart-alloc"}


claims = st.lists(
    st.builds(Claim, st.integers(0, 10**6), st.integers(0, GIB), st.one_of(st.none(), st.integers(0, GIB)))
)


@given(st.integers(0, 8 * GIB), claims)
def test_divisions_never_exceed_what_is_there(available_bytes: int, wanted: list[Claim]) -> None:
    assert sum(by_weight(available_bytes, wanted)) <= available_bytes
    assert sum(in_proportion(available_bytes, wanted)) <= available_bytes


@given(st.integers(1, 8 * GIB), st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_by_weight_gives_everything_away(available_bytes: int, weights: list[int]) -> None:
    shares = by_weight(available_bytes, [Claim(weight) for weight in weights])
    assert available_bytes - sum(shares) <= len(weights)
