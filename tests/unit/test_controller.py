"""The controller's parts, and whole rounds against a tmemd that keeps its state in a dictionary."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import msgspec
import pytest
from tmem_host.api.client import Client
from tmem_host.api.types import Policy, VmSpec
from tmem_host.controller.domains import Domain
from tmem_host.controller.loop import Loop
from tmem_host.controller.metadata import MetadataError, parse_spec
from tmem_host.controller.registrar import Registrar
from tmem_host.controller.sampler import Sampler
from unit.tmemd_in_memory import Tmemd, pool, vm

MIB = 1 << 20


@dataclass
class Domains:
    """Domains as the watch tells them."""

    up: dict[str, Domain] | None = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)

    def start(self, name: str, spec: VmSpec | None = None) -> None:
        assert self.up is not None
        self.up[name] = Domain(name, spec, 256 * MIB, 0)

    def running(self) -> dict[str, Domain] | None:
        return self.up

    def take_stopped(self) -> list[str]:
        gone, self.gone = self.gone, []
        return gone

    def is_stopped(self, name: str) -> bool:
        return self.up is not None and name not in self.up


@pytest.fixture
def tmemd() -> Tmemd:
    return Tmemd()


@pytest.fixture
def domains() -> Domains:
    return Domains()


@pytest.fixture
def loop(tmemd: Tmemd, domains: Domains) -> Loop:
    clock: Iterator[int] = iter(range(10_000))
    return Loop(cast(Client, tmemd), domains, clock=lambda: float(next(clock)))


def test_registers_and_divides(tmemd: Tmemd, domains: Domains, loop: Loop) -> None:
    domains.start("a", VmSpec(weight=100))
    domains.start("b", VmSpec(weight=300))
    domains.start("not-ours")
    loop.round()
    assert {name: each.quota_bytes for name, each in tmemd.registered.items()} == {
        "a": 250 * MIB,
        "b": 750 * MIB,
    }
    assert loop.round() == 0, "nothing changed, so nothing is applied"
    assert loop.state == "static, 2 VMs"


def test_registers_nothing_if_told_so(tmemd: Tmemd, domains: Domains) -> None:
    domains.start("a", VmSpec())
    Loop(cast(Client, tmemd), domains, register=False).round()
    assert tmemd.registered == {}


def test_shrinks_before_it_grows(tmemd: Tmemd, loop: Loop) -> None:
    tmemd.registered = {"a": vm("a", quota_bytes=100 * MIB), "b": vm("b", quota_bytes=900 * MIB)}
    loop.round()
    assert tmemd.changes == [("b", 500 * MIB), ("a", 500 * MIB)]


def test_leaves_pinned_and_absent_vms_alone(tmemd: Tmemd, loop: Loop) -> None:
    tmemd.registered = {
        "pinned": vm("pinned", quota_bytes=300 * MIB, pinned=True),
        "off": vm("off", quota_bytes=50 * MIB, connections=0),
        "on": vm("on", quota_bytes=1),
    }
    loop.round()
    assert tmemd.changes == [("on", 700 * MIB)]


def test_a_pin_that_comes_between_snapshot_and_change_holds(domains: Domains) -> None:
    class PinsLate(Tmemd):
        def policy(self) -> Policy:
            self.registered["a"] = vm("a", quota_bytes=7 * MIB, pinned=True)
            return super().policy()

    late = PinsLate(registered={"a": vm("a", quota_bytes=1)})
    Loop(cast(Client, late), domains).round()
    assert late.registered["a"].quota_bytes == 7 * MIB
    assert late.changes == []


def test_smart_alloc_follows_refused_puts(tmemd: Tmemd, loop: Loop) -> None:
    tmemd.chosen = Policy(name="smart-alloc", parameters={"percent": 10})
    tmemd.registered = {
        "busy": vm("busy", quota_bytes=100 * MIB, stored_bytes=100 * MIB, puts_refused=5),
        "idle": vm("idle", quota_bytes=800 * MIB, stored_bytes=MIB),
    }
    loop.round()
    assert "busy" not in dict(tmemd.changes), "totals from before the first look say nothing"
    tmemd.registered["busy"] = msgspec.structs.replace(tmemd.registered["busy"], puts_refused=6)
    loop.round()
    assert tmemd.registered["busy"].quota_bytes == 200 * MIB
    assert tmemd.registered["idle"].quota_bytes < 800 * MIB


@pytest.mark.parametrize("lost", ["libvirt", "tmemd"])
def test_keeps_quotas_while_a_part_is_lost_and_goes_on_after(
    tmemd: Tmemd, domains: Domains, loop: Loop, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tmemd.registered = {"a": vm("a", quota_bytes=1)}
    loop.round()
    tmemd.changes.clear()
    tmemd.capacity_bytes = 500 * MIB
    tmemd.running = lost != "tmemd"
    up = domains.up
    if lost == "libvirt":
        domains.up = None
    for _ in range(3):
        assert loop.round() == 0
    assert tmemd.changes == []
    assert sum("waiting for" in record.message for record in caplog.records) == 1, "said once"
    tmemd.running, domains.up = True, up
    loop.round()
    assert tmemd.changes == [("a", 500 * MIB)]
    assert "rebalancing again" in caplog.text


def test_an_unusable_policy_leaves_the_one_before(
    tmemd: Tmemd, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    tmemd.registered = {"a": vm("a", quota_bytes=1)}
    loop.round()
    tmemd.chosen = Policy(name="clever")
    tmemd.capacity_bytes = 400 * MIB
    loop.round()
    loop.round()
    assert tmemd.registered["a"].quota_bytes == 400 * MIB
    assert caplog.text.count("policy clever cannot be used") == 1


def test_a_refused_registration_is_said_once_and_harms_nobody(
    tmemd: Tmemd, domains: Domains, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    domains.start("bad", msgspec.convert({"cid": 2}, VmSpec))
    domains.start("good", VmSpec())
    loop.round()
    loop.round()
    assert set(tmemd.registered) == {"good"}
    assert caplog.text.count("CID 2 is the host's") == 1


def test_a_stopped_vm_gives_its_memory_back(tmemd: Tmemd, domains: Domains, loop: Loop) -> None:
    domains.start("mine", VmSpec())
    loop.round()
    tmemd.registered["theirs"] = vm("theirs", connections=0)
    tmemd.registered["mine"] = msgspec.structs.replace(tmemd.registered["mine"], connections=0)
    for name in ("mine", "theirs"):
        tmemd.pool_list[name] = [pool(name, 1), pool(name, 2)]
    domains.up = {}
    domains.gone = ["mine", "theirs", "unknown"]
    loop.round()
    assert "mine" not in tmemd.registered, "what the controller registered it forgets"
    assert "theirs" in tmemd.registered
    assert tmemd.pool_list["theirs"] == []


@pytest.mark.parametrize("why", ["runs again", "connected", "libvirt lost"])
def test_pages_are_never_released_on_doubt(tmemd: Tmemd, domains: Domains, why: str) -> None:
    tmemd.registered["a"] = vm("a", connections=1 if why == "connected" else 0)
    tmemd.pool_list["a"] = [pool("a", 1)]
    if why == "runs again":
        domains.start("a")
    if why == "libvirt lost":
        domains.up = None
    registrar = Registrar()
    assert not registrar.release(tmemd, domains, "a")
    assert tmemd.pool_list["a"] == [pool("a", 1)]


def test_counters_that_go_back_count_as_nothing() -> None:
    sampler = Sampler()
    sampler.sample(1, [vm("a", puts_refused=100)], {}, 0.0)
    snapshot = sampler.sample(1, [vm("a", puts_refused=3)], {}, 2.0)
    assert snapshot.vms[0].puts_refused == 0
    assert snapshot.interval_s == 2.0
    assert sampler.sample(1, [vm("a", puts_refused=5)], {}, 3.0).vms[0].puts_refused == 2


DOMAIN = """<domain type='qemu'><name>a</name><memory unit='MiB'>256</memory>
<metadata>{}</metadata>
<devices><vsock model='virtio'><cid auto='yes' address='7'/></vsock></devices></domain>"""
VM_ELEMENT = '<t:vm xmlns:t="https://tmem.invalid/vm/1" {}/>'


def test_metadata_with_and_without_a_socket() -> None:
    assert parse_spec(DOMAIN.format("")) is None
    assert parse_spec(DOMAIN.format(VM_ELEMENT.format(""))) == msgspec.convert({"cid": 7}, VmSpec)
    attributes = 'hybrid-socket="/s" quota="64M" minimum="8M" weight="7" maximum="1G"'
    assert parse_spec(DOMAIN.format(VM_ELEMENT.format(attributes))) == VmSpec(
        hybrid_socket="/s",
        quota_bytes=64 * MIB,
        min_bytes=8 * MIB,
        weight=7,
        persistent_max_bytes=(1024 - 256) * MIB,
    )


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ('qouta="1G"', "unknown attribute 'qouta'"),
        ('quota="lots"', "quota: 'lots' is not a size"),
        ('maximum="128M"', "below the domain's memory"),
        ('weight="-1"', "weight: '-1' is not a whole number"),
    ],
)
def test_wrong_metadata_is_explained(attributes: str, says: str) -> None:
    with pytest.raises(MetadataError, match=says):
        parse_spec(DOMAIN.format(VM_ELEMENT.format(attributes)))
