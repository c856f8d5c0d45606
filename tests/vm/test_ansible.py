"""The role `tmem_guest` on a plain Debian guest without network, by SSH over vsock, and what it installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from framework.daemon import MIB, ROOT, Tmemd
from tmem_host.errors import OperatorError
from tmem_host.vm import images, machine
from tmem_host.vm.machine import Machine
from tmem_host.vm.request import Registration, VmRequest

T = TypeVar("T")
PLAYBOOK_S = 900.0
COMMAND_S = 240.0
NAME = "ansible-test"
MEMORY_BYTES = 384 * MIB
QUOTA_BYTES = 64 * MIB

# Fills more memory than there is with words that tell their address, and reads them again.
VERIFY = """
import array, mmap, sys
pages = int(sys.argv[1]) << 8
memory = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
words = memoryview(memory).cast("Q")
for page in range(pages):
    words[page * 512] = page * 0x9E3779B97F4A7C15 % 2**64
    words[page * 512 + 511] = page
wrong = sum(
    words[page * 512] != page * 0x9E3779B97F4A7C15 % 2**64 or words[page * 512 + 511] != page
    for page in range(pages)
)
print("wrong pages:", wrong)
"""

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


class Guest:
    """A plain Debian guest, registered with a tmemd of its own."""

    def __init__(self, up: Machine) -> None:
        self.up = up

    def run(self, command: str) -> str:
        """A shell line that must succeed; its output."""
        with self.up.ssh() as shell:
            return shell.check(command, deadline_s=COMMAND_S)

    def says(self, command: str, text: str) -> bool:
        """Whether a command, for now, succeeds and says this."""
        try:
            return text in self.run(command)
        except OperatorError:
            return False

    def agent(self) -> dict[str, dict[str, object]]:
        """What `tmem-agent status` says."""
        answer: dict[str, dict[str, object]] = json.loads(self.run("tmem-agent status --json"))
        return answer

    def swap(self) -> dict[str, object]:
        """Swap, from that."""
        counters = self.agent()["swap"]["counters"]
        assert isinstance(counters, dict)
        return counters


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    images.build("plain")
    directory = Path(tempfile.mkdtemp(prefix="tm-", dir="/dev/shm"))
    try:
        with Tmemd(directory, capacity="256M") as tmemd:
            registration = Registration(admin_socket=tmemd.admin_socket, quota_bytes=QUOTA_BYTES)
            request = VmRequest(
                name=NAME, image="plain", memory_bytes=MEMORY_BYTES, register=registration, deadline_s=900
            )
            up = machine.up(request, print)
            try:
                yield Guest(up)
            finally:
                print("\n".join(up.console()))
                machine.down(NAME)
    finally:
        shutil.rmtree(directory)


class Controller:
    """Where Ansible runs: an inventory of one guest."""

    def __init__(self, directory: Path, up: Machine, wheel: Path) -> None:
        proxy = f"{sys.executable} -m tmem_host.vm.proxy %h 22"
        known = up.directory / "known_hosts"
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


def until(probe: Callable[[], T], what: str) -> T:
    deadline = time.monotonic() + COMMAND_S
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(1)
    return answer


@pytest.fixture(scope="module")
def set_up(guest: Guest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Controller:
    """The guest with the role applied once."""
    controller = Controller(tmp_path_factory.mktemp("ansible"), guest.up, wheel)
    first = controller.play()
    assert first["changed"] > 0
    assert first["failed"] == 0
    return controller


def test_the_agent_of_the_guest_role_serves(guest: Guest, set_up: Controller) -> None:
    assert guest.run("systemctl is-enabled tmem-agent; systemctl is-active tmem-agent") == "enabled\nactive\n"
    until(lambda: guest.agent()["host"]["connected"], "the guest is connected")
    until(lambda: guest.says("findmnt -n -o FSTYPE /mnt/tmem", "fuse.tmem"), "the mount is there")
    guest.run("dd if=/dev/urandom of=/mnt/tmem/file bs=1M count=8 status=none")
    expected = guest.run("sha256sum < /mnt/tmem/file")
    for _ in range(2):
        guest.run("sync; echo 3 > /proc/sys/vm/drop_caches")
        assert guest.run("sha256sum < /mnt/tmem/file") == expected
    assert guest.run("sha256sum < /data/files/file") == expected
    stats = guest.agent()["host"]["stats"]
    assert isinstance(stats, dict)
    assert stats["puts_accepted"] > 0
    assert "% hits" in guest.run("tmem-agent status")

    # A second run finds nothing to change.
    second = set_up.play()
    assert second["changed"] == 0
    assert second["failed"] == 0


def test_swap_is_one_command(guest: Guest, set_up: Controller) -> None:
    assert set_up
    guest.run("tmem-agent swap on --size 256M --file /data/swap.tmem")
    device = guest.agent()["swap"]["device"]
    assert guest.says("swapon --show=NAME,PRIO --noheadings", f"{device}")
    guest.run(f"cat > /tmp/verify.py <<'END'\n{VERIFY}END")
    assert guest.run(f"python3 /tmp/verify.py {(MEMORY_BYTES >> 20) + 32}") == "wrong pages: 0\n"
    swap = guest.swap()
    assert isinstance(swap["host_pages"], int)
    stats = guest.agent()["host"]["stats"]
    assert isinstance(stats, dict)
    assert stats["puts_accepted"] > 0
    assert "pages at the host" in guest.run("tmem-agent swap status")

    guest.run("tmem-agent swap off")
    assert guest.run("swapon --show --noheadings; ls /data/swap.tmem 2>/dev/null || true") == ""
    assert guest.run("tmem-agent swap status") == "swap    off\n"


def test_the_agent_killed_or_stopped(guest: Guest, set_up: Controller) -> None:
    assert set_up
    guest.run("tmem-agent swap on --size 64M --file /data/swap.tmem")
    before = guest.agent()
    guest.run("systemctl kill --kill-whom=main --signal=KILL tmem-agent")
    until(lambda: guest.says("tmem-agent status", "connected"), "the next agent answers")
    after = guest.agent()
    assert after["swap"]["pid"] == before["swap"]["pid"]
    assert after["swap"]["active"]
    mounts: object = after["mounts"]
    assert isinstance(mounts, list)
    assert [mount["state"] for mount in mounts] == ["up"]

    guest.run("systemctl stop tmem-agent")
    assert (
        guest.run("swapon --show --noheadings; findmnt /mnt/tmem || true; pgrep -f tmem-gues[t] || true")
        == ""
    )
    guest.run("systemctl start tmem-agent")
    until(lambda: guest.says("findmnt -n -o FSTYPE /mnt/tmem", "fuse.tmem"), "the mount is there again")
