"""The programs themselves, without VMs: tmem-controller against a real tmemd and libvirt's test driver."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tmem_host.api.client import Client
from tmem_host.api.types import VmChange
from tmem_host.cli.main import run
from tmem_host.errors import OperatorError

pytest.importorskip("tmem_native", reason="the native engine is not built")

MIB = 1 << 20
NODE = """<node>{}</node>"""
DOMAIN = """<domain type='test'><name>{name}</name><memory>262144</memory><os><type>hvm</type></os>
<metadata><t:vm xmlns:t='https://tmem.invalid/vm/1'
 hybrid-socket='{directory}/{name}.sock' weight='{weight}'/>
</metadata></domain>"""


def eventually(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            if holds():
                return
        except OperatorError:
            pass  # tmemd is on its way up
        assert time.monotonic() < deadline, f"{what} did not happen within 15 s"
        threading.Event().wait(0.05)


@contextmanager
def program(module: str, *arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=15)


class Host:
    """A tmemd that may be killed and started again."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.socket = directory / "admin.sock"
        self.log = directory / "log"
        self._stack = stack
        self._tmemd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "--arena": "memfd",
            "--capacity": "64M",
            "--admin-socket": self.socket,
            "--vm-directory": self.directory / "vm",
            "--state-directory": self.directory / "state",
        }
        arguments = [str(word) for option in options.items() for word in option]
        self._tmemd = self._stack.enter_context(program("tmem_host.service.main", *arguments, log=self.log))
        eventually("tmemd's answer", lambda: self.quotas() is not None)

    def kill(self) -> None:
        assert self._tmemd is not None
        self._tmemd.send_signal(signal.SIGKILL)
        self._tmemd.wait()

    def quotas(self) -> dict[str, int]:
        with Client(self.socket) as client:
            return {vm.name: vm.quota_bytes for vm in client.vms()}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        made = Host(tmp_path, stack)
        made.start()
        yield made


def test_registers_divides_obeys_the_cli_and_survives_a_killed_tmemd(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    node = host.directory / "node.xml"
    domains = [
        DOMAIN.format(name=name, directory=host.directory, weight=weight)
        for name, weight in (("a", 100), ("b", 300))
    ]
    node.write_text(NODE.format("".join(domains)))
    arguments = ["--socket", str(host.socket), "--connect", f"test://{node}", "--interval", "0.1"]
    with program("tmem_host.controller.main", *arguments, log=host.log) as controller:
        eventually("registration by weight", lambda: host.quotas() == {"a": 16 * MIB, "b": 48 * MIB})

        def ctl(*words: str) -> int:
            return run(["--socket", str(host.socket), *words])

        assert ctl("quota", "set", "a", "32M") == 0
        eventually("the rest going to b", lambda: host.quotas() == {"a": 32 * MIB, "b": 32 * MIB})
        assert ctl("policy", "set", "greedy") == 0
        eventually("greed", lambda: host.quotas() == {"a": 32 * MIB, "b": 64 * MIB})

        host.kill()
        eventually("the complaint", lambda: "waiting for tmemd" in host.log.read_text())
        host.start()
        assert host.quotas() == {"a": 32 * MIB, "b": 64 * MIB}, "tmemd keeps quotas and policy"
        assert ctl("quota", "set", "a", "--unpin") == 0
        eventually("greed for a too", lambda: host.quotas() == {"a": 64 * MIB, "b": 64 * MIB})
        assert ctl("policy", "get") == 0
        assert capsys.readouterr().out.splitlines()[-1] == "greedy"

        controller.terminate()
        assert controller.wait(timeout=15) == 0
    log = host.log.read_text()
    assert log.count("rebalancing again") == 1
    assert "stopping on SIGTERM" in log
    assert "Traceback" not in log


def test_quotas_stay_where_the_controller_left_them(host: Host) -> None:
    node = host.directory / "node.xml"
    node.write_text(NODE.format(DOMAIN.format(name="a", directory=host.directory, weight=1)))
    arguments = ["--socket", str(host.socket), "--connect", f"test://{node}", "--interval", "0.1"]
    with program("tmem_host.controller.main", *arguments, log=host.log):
        eventually("registration", lambda: host.quotas() == {"a": 64 * MIB})
    with Client(host.socket) as client:
        client.change_vm("a", VmChange(quota_bytes=MIB))
        assert client.vm("a").quota_bytes == MIB
