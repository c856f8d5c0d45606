"""What the file cache makes of a host that is slow: readers do without it, and nobody connects anew."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from framework.daemon import Tmemd
from integration.fs_mount import PAGE_BYTES, FileCache, fresh_lower_directory

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

_PAGES = 256
_READ_S = 2.0
_PAUSE_S = 0.8
"""Long for a reader, whose patience is 0.1 s; short for a connection."""


@pytest.fixture
def cache(tmemd: Tmemd, tmp_path: Path) -> Iterator[FileCache]:
    with ExitStack() as stack:
        lower = stack.enter_context(fresh_lower_directory("ext4"))
        endpoint = f"unix:{tmemd.vm_socket('a')}"
        mounted = stack.enter_context(FileCache(tmp_path, lower, endpoint=endpoint))
        mounted.wait_for("connected", 1)
        yield mounted


def test_a_slow_host_is_waited_for_and_not_connected_to_again(tmemd: Tmemd, cache: FileCache) -> None:
    data = os.urandom(_PAGES * PAGE_BYTES)
    (cache.lower / "file").write_bytes(data)
    time.sleep(0.1)  # until a file just written may be cached
    assert (cache.mount / "file").read_bytes() == data
    cache.wait_for("put_pages", _PAGES)
    cache.forget("file")
    assert (cache.mount / "file").read_bytes() == data
    hits = cache.wait_for("hit_pages", _PAGES)
    connected = tmemd.log.count("guest connected")
    for _ in range(2):
        cache.forget("file")
        tmemd.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert (cache.mount / "file").read_bytes() == data
            assert time.monotonic() - began < _READ_S
            time.sleep(_PAUSE_S)
        finally:
            tmemd.signal(signal.SIGCONT)
        assert cache.status()["link_failures"] > 0
        deadline = time.monotonic() + 10
        while cache.status()["hit_pages"] < hits + _PAGES:
            assert time.monotonic() < deadline, cache.status()
            cache.forget("file")
            assert (cache.mount / "file").read_bytes() == data
        hits = cache.status()["hit_pages"]
    assert tmemd.log.count("guest connected") == connected, tmemd.log
