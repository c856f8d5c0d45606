"""The controller with real domains: it follows what runs, and frees what stopped VMs kept."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from framework.vms import Vms
from tmem_host.api.types import Policy
from tmem_host.vm import libvirtd

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def eventually(what: str, holds: Callable[[], bool], deadline_s: float = 60.0) -> None:
    until_s = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < until_s, f"{what} did not happen within {deadline_s:g} s"
        threading.Event().wait(0.1)


@contextmanager
def controller(vms: Vms) -> Iterator[None]:
    argv = [sys.executable, "-m", "tmem_host.controller.main", "--no-register"]
    with (vms.directory / "controller.log").open("ab") as log:
        process = subprocess.Popen(
            [*argv, "--socket", str(vms.tmemd.admin_socket)], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0
        print((vms.directory / "controller.log").read_text())


def test_divides_between_running_vms_and_notices_one_that_is_destroyed(vms: Vms) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(vms.admin())
        client.set_policy(Policy(name="static"))
        names = [vms.up(wait="nothing").name for _ in range(2)]
        stack.enter_context(controller(vms))
        capacity_bytes = client.status().capacity_bytes
        half = capacity_bytes // 2

        def quotas() -> list[int]:
            return [client.vm(name).quota_bytes for name in names]

        eventually("half for each", lambda: quotas() == [half, half])
        with libvirtd.connection() as connection:
            connection.lookupByName(names[0]).destroy()
        eventually("all for the one that still runs", lambda: quotas() == [half, capacity_bytes])
        assert "stopped" in (vms.directory / "controller.log").read_text()
