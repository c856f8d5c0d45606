"""The demonstration: all of it, and that an interrupted one leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from tmem_host.vm import images

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("built")]

DEMO = [sys.executable, "-m", "tmem_host.demo"]


def traces() -> list[str]:
    """What of a demonstration is there now."""
    found = [str(path) for path in Path("/dev/shm").glob("tmem-demo-*")]
    found += [str(path) for path in (images.cache_directory() / "vm").glob("demo-*")]
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if "/tmem-demo-" in words or "guest=demo-" in words:
            found.append(f"process {process.pid}: {words[:100]}")
    return found


def start(output: Path) -> subprocess.Popen[bytes]:
    """A demonstration whose VMs boot; its output is in `log` in that directory."""
    images.build("debian")
    before = traces()
    output.mkdir()
    log = output / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen([*DEMO, "--output", str(output)], stdout=stream, stderr=stream)
    until_s = time.monotonic() + 120
    while not any("guest=demo-" in line for line in set(traces()) - set(before)):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until_s, f"no VM was started within 120 s: {log.read_text()}"
        threading.Event().wait(0.1)
    return process


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_one_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    before = set(traces())
    process = start(tmp_path / "demo")
    process.send_signal(number)
    assert process.wait(timeout=120) == 130
    assert set(traces()) <= before
    assert "left behind" not in (tmp_path / "demo" / "log").read_text()


@pytest.mark.timeout(600)
def test_what_a_killed_one_leaves_behind_is_removed_by_the_next(tmp_path: Path) -> None:
    before = set(traces())
    killed = start(tmp_path / "killed")
    killed.kill()
    killed.wait()
    left = {line for line in set(traces()) - before if line.startswith("/dev/shm/")}
    assert len(left) == 1
    process = start(tmp_path / "next")
    log = (tmp_path / "next" / "log").read_text()
    assert f"removing what is left of a demonstration that was killed: {left.pop()}" in log.replace("\n", "")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert set(traces()) <= before


def test_who_is_not_root_is_refused_at_once(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    code = "import os, sys; os.setuid(65534); from tmem_host.cli.main import run; sys.exit(run(sys.argv[1:]))"
    # Imported before the change of user, who may not be able to read the checkout.
    code = "import tmem_host.demo.main\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--output", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 7
    assert done.stderr.startswith("tmemctl: the demonstration starts virtual machines, which needs root")
    assert not (tmp_path / "none").exists()


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_all_of_it(tmp_path: Path) -> None:
    before = set(traces())
    done = subprocess.run([*DEMO, "--output", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {vm["workload"] for vm in report["vms"]} == {"fio mixed", "kernel-build small"}
    assert sum(vm["puts_refused"] for vm in report["vms"]) > 0
    for vm in report["vms"]:
        for counter in ("puts_accepted", "gets_hit", "swap_pages_in", "swap_pages_out", "sectors_read"):
            assert vm[counter] > 0, f"{vm['name']}: {counter}"
    assert set(traces()) <= before
