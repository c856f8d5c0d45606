"""The roles on plain Debian VMs without network, by SSH over vsock: what they install serves.

`tmem_host` is tested in a VM, too, where tmemd runs under systemd as on a real host. Guests reach it there by
AF_VSOCK, through the kernel's loopback: the transport of hosts with /dev/vhost-vsock.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from framework.agent_guest import AgentGuest, until
from framework.daemon import ROOT
from framework.vms import COMMAND_S, MIB, Vms
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


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tmemd needs from an index, for the Python of Debian 13."""
    target = tmp_path_factory.mktemp("wheelhouse")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["host"]
    argv = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--only-binary=:all:",
        "--python-version=3.13",
    ]
    argv += [f"--platform=manylinux_2_{glibc}_{platform.machine()}" for glibc in (17, 28)]
    # libvirt's binding is Debian's.
    argv += [requirement for requirement in needed if not requirement.startswith("libvirt-python")]
    done = subprocess.run([*argv, "--dest", target], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return target


class Controller:
    """Where Ansible runs: an inventory of one machine, and the playbook for it."""

    def __init__(self, directory: Path, up: Machine, playbook: str, variables: dict[str, object]) -> None:
        proxy = f"{sys.executable} -m tmem_host.vm.proxy %h 22"
        known = directory / "known_hosts"
        known.write_text(f"{up.name} {up.state.host_key}\n")
        host = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(up.directory / "ssh_key"),
            "ansible_ssh_common_args": f'-o "ProxyCommand={proxy}" -o "UserKnownHostsFile={known}"',
        }
        self._playbook = playbook
        self._inventory = directory / "inventory.json"
        group = {"hosts": {up.name: host | variables}}
        self._inventory.write_text(json.dumps({"tmem_hosts": group, "tmem_guests": group}))

    def play(self) -> dict[str, int]:
        """Run the playbook; returns how many tasks were ok, changed, failed and so on."""
        done = subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "-i", self._inventory, self._playbook],
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
    mounts = [{"directory": "/data/files", "at": "/mnt/tmem"}]
    variables = {"tmem_guest_wheels": [str(wheel)], "tmem_guest_mounts": mounts}
    controller = Controller(tmp_path, guest.up, "guest.yml", variables)
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

    # sshd is not handed vsock's connections any more, and the one that the role came by has not ended early.
    with guest.up.ssh() as shell:
        accepting = "systemctl show -P Accept sshd-vsock.socket; systemctl is-active sshd-vsock.service"
        assert shell.check(accepting, deadline_s=COMMAND_S) == "no\nactive\n"

    # A second run finds nothing to change.
    second = controller.play()
    assert second["changed"] == 0
    assert second["failed"] == 0


@pytest.mark.long  # installing tmemd's dependencies takes an emulated CPU some minutes
def test_the_host_role(
    wheel: Path, wheelhouse: Path, vms: Vms, built: Callable[[str], None], tmp_path: Path
) -> None:
    built("plain")
    host = AgentGuest(vms.up("plain", memory_bytes=768 * MIB))
    variables: dict[str, object] = {
        "tmem_host_wheel": str(wheel),
        "tmem_host_wheelhouse": str(wheelhouse),
        "tmem_host_controller": False,  # this host has no libvirtd
        "tmem_host_config": {"arena": {"capacity": "64M"}},
    }
    host.run("modprobe vsock_loopback")
    controller = Controller(tmp_path, host.up, "host.yml", variables)
    first = controller.play()
    assert first["changed"] > 0
    assert first["failed"] == 0
    assert host.run("systemctl is-enabled tmemd; systemctl is-active tmemd") == "enabled\nactive\n"

    _check_confinement(host)

    # A guest reaches it by AF_VSOCK, known by the CID its kernel says. A stranger is turned away.
    bin_directory = host.run("dirname $(readlink -f /usr/local/bin/tmemd)").strip()
    ping = f"{bin_directory}/tmem-guest ping --endpoint vsock:1:29805"
    assert host.run(f"{ping} 2>&1 || echo refused").endswith("refused\n")
    host.run("tmemctl vm register local --cid 1 --quota 48M")
    assert "quota_bytes=50331648" in host.run(ping)

    # Its file cache fills from there, across a kill -9 of the daemon, which systemd starts again.
    host.run("mkdir -p /data/files /mnt/tmem")
    host.run("dd if=/dev/urandom of=/data/files/file bs=1M count=16 status=none")
    expected = host.run("sha256sum < /data/files/file")
    host.run(
        f"systemd-run --quiet --unit tmem-fs {bin_directory}/tmem-guest fs "
        "--lower /data/files --mount /mnt/tmem --endpoint vsock:1:29805"
    )
    until(lambda: host.says("findmnt -n -o FSTYPE /mnt/tmem", "fuse.tmem"), "the mount is there")

    def read_from_tmemd() -> bool:
        """Read the file, not from the guest's page cache; whether tmemd had some of it."""
        before = hits()
        host.run("sync; echo 3 > /proc/sys/vm/drop_caches")
        assert host.run("sha256sum < /mnt/tmem/file") == expected
        return hits() > before

    def hits() -> int:
        return int(json.loads(host.run("tmemctl stats local --json"))["vms"][0]["gets_hit"])

    until(read_from_tmemd, "what was read once comes from tmemd")
    _check_turns(host)
    killed = host.run("systemctl show --value -p MainPID tmemd")
    host.run("systemctl kill --signal=KILL --kill-whom=main tmemd")
    until(lambda: host.says("systemctl is-active tmemd", "active"), "tmemd is back")
    assert host.run("systemctl show --value -p MainPID tmemd") != killed
    until(read_from_tmemd, "tmemd has pages again")
    host.run("systemctl stop tmem-fs")

    # Stopping drains and ends well, and a second run of the role finds nothing to change.
    host.run("systemctl restart tmemd")
    assert "failed" not in host.run("systemctl show --value -p Result,ActiveState tmemd")
    second = controller.play()
    assert second["changed"] == 0
    assert second["failed"] == 0


def _check_confinement(host: AgentGuest) -> None:
    """tmemd and its keeper have a user of their own and no privilege; QEMU's group reaches VMs' sockets."""
    for unit in ("tmemd", "tmem-keeper"):
        pid = host.run(f"systemctl show --value -p MainPID {unit}").strip()
        assert host.run(f"stat -c %U:%G /proc/{pid}") == "tmem:tmem\n"
        status = host.run(f"cat /proc/{pid}/status")
        for field in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert f"{field}:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status
    assert host.run("stat -c %U:%a /dev/shm/tmem /dev/shm/tmem/arena /var/lib/tmem /run/tmem/admin.sock") == (
        "tmem:700\ntmem:600\ntmem:700\ntmem:600\n"
    )
    directory = "/run/tmem/vm/boxed"
    register = (
        "from pathlib import Path; from tmem_host.api.client import ADMIN_SOCKET, Client;"
        " from tmem_host.api.types import VmSpec;"
        f" spec = VmSpec(vhost_user_socket='{directory}/vhost.sock', hybrid_socket='{directory}/vsock.sock',"
        " guest_cid=40, quota_bytes=1 << 20);"
        " Client(ADMIN_SOCKET).add_vm('boxed', spec)"
    )
    host.run(f'$(dirname $(readlink -f /usr/local/bin/tmemd))/python -c "{register}"')
    assert host.run(f"stat -c %U:%G:%a {directory}/*") == "tmem:libvirt-qemu:660\n" * 3
    connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    line = f"python3 -c '{connect}' {directory}/vhost.sock"
    host.run(f"setpriv --reuid=nobody --regid=libvirt-qemu --clear-groups {line}")
    assert not host.says(f"setpriv --reuid=nobody --regid=nogroup --clear-groups {line} && echo in", "in")
    # The keeper takes its device: what a tmemd of another user would be refused.
    assert "no keeper" not in host.run("journalctl --no-pager -u tmemd")
    host.run("tmemctl vm unregister boxed")


def _check_turns(host: AgentGuest) -> None:
    """The system call filter lets the threads that serve guests ask for short turns."""
    pid = host.run("systemctl show --value -p MainPID tmemd").strip()
    scheduled = host.run(f"grep -h -A99 '^vm local' /proc/{pid}/task/*/sched")
    (slice_ns,) = set(re.findall(r"^se\.slice\s+:\s+(\d+)", scheduled, re.MULTILINE))
    assert slice_ns == "100000"
