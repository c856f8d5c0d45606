"""tmemd as a user of its own, without any capability: what the documentation says it can do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.client import PAGE_BYTES, Put, key
from framework.daemon import Tmemd

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")

_NOBODY = 65534


class Unprivileged(Tmemd):
    """A `tmemd` that may do nothing but what any user may."""

    def command(self) -> list[str]:
        user = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
        return [*user, "--bounding-set=-all", "--no-new-privs", "--", *super().command()]

    def start(self) -> None:
        """The socket on which it says that it is ready is made by root, and must be open to it."""
        umask = os.umask(0)
        try:
            super().start()
        finally:
            os.umask(umask)


@pytest.fixture
def daemon(short_directory: Path) -> Iterator[Unprivileged]:
    made = Unprivileged(short_directory)
    shutil.chown(short_directory, _NOBODY, _NOBODY)
    with made:
        yield made


def test_it_serves_restarts_and_keeps_what_it_accepted(daemon: Unprivileged) -> None:
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    assert f"Uid:\t{_NOBODY}\t{_NOBODY}\t{_NOBODY}\t{_NOBODY}" in status
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
