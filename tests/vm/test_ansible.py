"""The role `tmem_guest` on a plain Debian guest without network, by SSH over vsock: its agent serves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from framework.agent_guest import AgentGuest, until
from framework.daemon import ROOT
from framework.vms import MIB, Vms
from tmem_host.vm.machine import Machine

PLAYBOOK_S = 1200.0

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tmem's wheel, as an operator builds it."""
    target = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*argv, "--wheel-dir", target, ROOT], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("tmem-*.whl")
    return built


class Controller:
    """Where Ansible runs: an inventory of one guest."""

    def __init__(self, directory: Path, up: Machine, wheel: Path) -> None:
        proxy = f"{sys.executable} -m tmem_host.vm.proxy %h 22"
        known = directory / "known_hosts"
        known.write_text(f"{up.name} {up.state.host_key}\n")
        host = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(up.directory / "ssh_key"),
            "ansible_ssh_common_args": f'-o "ProxyCommand={proxy}" -o "UserKnownHostsFile={known}"',
            "tmem_guest_wheels": [str(wheel)],
            "tmem_guest_mounts": [{"directory": "/data/files", "at": "/mnt/tmem"}],
        }
        self._inventory = directory / "inventory.json"
        self._inventory.write_text(json.dumps({"tmem_guests": {"hosts": {up.name: host}}}))

    def play(self) -> dict[str, int]:
        """Run the playbook; returns how many tasks were ok, changed, failed and so on."""
        done = subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "-i", self._inventory, "guest.yml"],
            cwd=ROOT / "ansible",
            env=os.environ | {"PYTHONPATH": str(ROOT / "host"), "ANSIBLE_NOCOLOR": "1"},
            capture_output=True,
            text=True,
            timeout=PLAYBOOK_S,
            check=False,
        )
        print(done.stdout, done.stderr)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        recap = done.stdout.rpartition("PLAY RECAP")[2]
        return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", recap)}


def test_the_guest_role(wheel: Path, vms: Vms, built: Callable[[str], None], tmp_path: Path) -> None:
    built("plain")
    guest = AgentGuest(vms.up("plain", memory_bytes=384 * MIB))
    controller = Controller(tmp_path, guest.up, wheel)
    first = controller.play()
    assert first["changed"] > 0
    assert first["failed"] == 0

    # The agent serves.
    assert guest.run("systemctl is-enabled tmem-agent; systemctl is-active tmem-agent") == "enabled\nactive\n"
    until(lambda: guest.status()["host"]["connected"], "the guest is connected")
    until(lambda: guest.says("findmnt -n -o FSTYPE /mnt/tmem", "fuse.tmem"), "the mount is there")
    guest.run("dd if=/dev/urandom of=/mnt/tmem/file bs=1M count=8 status=none")
    expected = guest.run("sha256sum < /mnt/tmem/file")
    for _ in range(2):
        guest.run("sync; echo 3 > /proc/sys/vm/drop_caches")
        assert guest.run("sha256sum < /mnt/tmem/file") == expected
    assert guest.run("sha256sum < /data/files/file") == expected
    assert guest.counters("host", "stats")["puts_accepted"] > 0
    assert "% hits" in guest.run("tmem-agent status")

    # A second run finds nothing to change.
    second = controller.play()
    assert second["changed"] == 0
    assert second["failed"] == 0
