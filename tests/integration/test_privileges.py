"""tmemd as a user of its own, without any capability: what the documentation says it can do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.client import PAGE_BYTES, Put, key
from framework.daemon import NOBODY, Unprivileged

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


@pytest.fixture
def daemon(short_directory: Path) -> Iterator[Unprivileged]:
    with Unprivileged(short_directory) as made:
        yield made


def test_it_serves_restarts_and_keeps_what_it_accepted(daemon: Unprivileged) -> None:
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    assert f"Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}" in status
    assert "CapBnd:\t0000000000000000" in status
    daemon.add_vm("a")
    page = os.urandom(PAGE_BYTES)
    with daemon.guest("a") as guest:
        pool = guest.create_pool("p", persistent=True)
        assert guest.put(pool, [(key(1), page)]) == [Put.STORED]
    daemon.restart(kill=True)
    with daemon.guest("a") as guest:
        pool = guest.create_pool("p", persistent=True)
        assert guest.get(pool, [key(1)]) == [page]
