"""The domain watch against libvirt's own test driver: real connections, statistics and events, no VM."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest
from tmem_host.api.types import VmSpec
from tmem_host.controller.domains import DomainWatch

NODE = """<node><domain type='test'><name>a</name><memory>262144</memory><os><type>hvm</type></os>
<metadata><t:vm xmlns:t='https://tmem.invalid/vm/1' hybrid-socket='/s'
quota='64M'/></metadata></domain></node>"""


def eventually(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not happen within 10 s"
        threading.Event().wait(0.02)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    (tmp_path / "node.xml").write_text(NODE)
    return f"test://{tmp_path / 'node.xml'}"


@pytest.fixture
def wake() -> threading.Event:
    return threading.Event()


@pytest.fixture
def watch(uri: str, wake: threading.Event) -> Iterator[DomainWatch]:
    # An interval this long shows that events, not the next look, make the watch notice.
    with DomainWatch(uri, wake=wake, interval_s=1.0) as followed:
        eventually("the first look", lambda: followed.running() is not None)
        yield followed


def the_watchs_own(watch: DomainWatch) -> libvirt.virConnect:
    # Each connection of the test driver has domains of its own.
    connection = watch._connection
    assert connection is not None
    return connection


def test_sees_domains_with_their_metadata(watch: DomainWatch, wake: threading.Event) -> None:
    running = watch.running()
    assert running is not None
    assert running["a"].spec == VmSpec(hybrid_socket="/s", quota_bytes=64 << 20)
    assert wake.is_set()


def test_notices_a_stop_and_a_start_by_event(watch: DomainWatch, wake: threading.Event) -> None:
    domain = the_watchs_own(watch).lookupByName("a")
    wake.clear()
    domain.destroy()
    eventually("the stop", lambda: watch.running() == {})
    assert wake.is_set()
    assert watch.take_stopped() == ["a"]
    assert watch.take_stopped() == []
    assert watch.is_stopped("a")
    assert watch.is_stopped("never-there")
    domain.create()
    eventually("the start", lambda: "a" in (watch.running() or {}))
    assert not watch.is_stopped("a")


def test_a_saved_domain_has_not_stopped_for_good(watch: DomainWatch, tmp_path: Path) -> None:
    the_watchs_own(watch).lookupByName("a").save(str(tmp_path / "saved"))
    eventually("the save", lambda: watch.running() == {})
    assert watch.take_stopped() == []


def test_without_libvirt_it_knows_nothing_and_waits(caplog: pytest.LogCaptureFixture) -> None:
    with DomainWatch("test:///nowhere.xml", interval_s=0.05) as watch:
        eventually("the complaint", lambda: "libvirt cannot be asked" in caplog.text)
        assert watch.running() is None
        assert not watch.is_stopped("a")


def test_what_is_stale_is_not_told(uri: str) -> None:
    with DomainWatch(uri, interval_s=30.0, stale_after_s=0.2) as watch:
        eventually("the first look", lambda: watch.running() is not None)
        eventually("staleness", lambda: watch.running() is None)
