"""tmem-agent as a systemd unit of a Debian guest: boot, swap in one command, its death, stop, shutdown."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable

import pytest
from framework.agent_guest import AgentGuest, until
from framework.vms import COMMAND_S, MIB, Vms
from tmem_host.errors import OperatorError

MEMORY_BYTES = 256 * MIB
WORK_MIB = 160  # more than the 120 MiB that kernel and services leave
SHUTDOWN_S = 240.0
CONFIGURATION = b"""
[[mount]]
directory = "/data/files"
at = "/mnt/tmem"
"""

# Fills more memory than there is with pages that tell their number, and reads them again.
VERIFY = """
import mmap, sys
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

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def guest(module_vms: Vms, built: Callable[[str], None]) -> AgentGuest:
    """A Debian guest whose agent has a mount configured. The tests follow each other in it."""
    built("debian")
    files = {"/etc/tmem/agent.toml": CONFIGURATION, "/data/files/hello": b"hello\n", "/mnt/tmem/.keep": b""}
    return AgentGuest(module_vms.up("debian", memory_bytes=MEMORY_BYTES, files=files))


def test_the_mount_is_there_from_boot_on(guest: AgentGuest) -> None:
    until(lambda: guest.says("cat /mnt/tmem/hello", "hello"), "the mount serves")
    assert guest.run("findmnt -n -o FSTYPE /mnt/tmem") == "fuse.tmem\n"
    assert guest.status()["host"]["connected"]
    assert "host connected; mounts /mnt/tmem; swap off" in guest.run("systemctl status tmem-agent")


def test_swap_is_one_command(guest: AgentGuest) -> None:
    guest.run("tmem-agent swap on --size 256M --file /data/swap.tmem")
    device = guest.status()["swap"]["device"]
    assert guest.run("swapon --show=NAME,PRIO --noheadings").split() == [device, "100"]
    guest.run(f"cat > /root/verify.py <<'END'\n{VERIFY}END")
    assert guest.run(f"python3 /root/verify.py {WORK_MIB}") == "wrong pages: 0\n"
    assert guest.counters("host", "stats")["puts_accepted"] > 0
    assert int(guest.run("grep -w pswpout /proc/vmstat").split()[1]) > 0
    assert "pages at the host" in guest.run("tmem-agent swap status")

    guest.run("tmem-agent swap off")
    assert guest.run("swapon --show --noheadings; ls /data/swap.tmem 2>/dev/null || true") == ""
    assert guest.run("tmem-agent swap status") == "swap    off\n"


def test_the_file_cache_is_not_swapped_out_to_tmem(guest: AgentGuest) -> None:
    """A page fault while it receives would hold up all of vsock, also the page it waits for: it hung.

    The agent is swapped out, all but what it receives into, and goes on reporting.
    """
    guest.run("tmem-agent swap on --size 128M --file /data/swap.tmem")
    guest.run(
        "head -c 32M /dev/urandom > /data/files/large && sync && sha1sum < /data/files/large > /root/sum"
    )
    agent = guest.run("systemctl show -P MainPID tmem-agent").strip()
    before = guest.status()["host"]["reports"]
    assert isinstance(before, int)
    swapped = 0
    group = guest.run("echo -n /sys/fs/cgroup$(systemctl show -P ControlGroup tmem-agent)")
    guest.run(f"test -w {group}/memory.reclaim")
    for _ in range(6):
        # Fails unless it gets all of what is asked, and takes what it can all the same.
        guest.run(f"echo '64M swappiness=200' > {group}/memory.reclaim || true")
        swapped += int(guest.run(f"grep VmSwap /proc/{agent}/status").split()[1])
        guest.run("echo 3 > /proc/sys/vm/drop_caches; sha1sum < /mnt/tmem/large | cmp - /root/sum")
    assert guest.run("grep VmSwap /proc/$(pgrep -f '^@tmem-guest fs')/status").split() == [
        "VmSwap:",
        "0",
        "kB",
    ]
    assert swapped > 0
    assert guest.counters("host", "stats")["gets_hit"] > 8192, "pages came over vsock"
    until(lambda: guest.status()["host"]["reports"] not in range(before, before + 6), "the agent reports")
    guest.run("tmem-agent swap off; rm /data/files/large")


def test_a_swapped_out_sshd_does_not_hold_up_vsock(guest: AgentGuest) -> None:
    """It did, as soon as it received into a page that had to come over vsock: the guest hung for good."""
    guest.run("tmem-agent swap on --size 128M --file /data/swap.tmem")
    before = int(guest.run("grep -w pswpin /proc/vmstat").split()[1])
    groups = "/sys/fs/cgroup/system.slice"
    reclaim = f"for g in {groups}/system-sshd.slice {groups}/sshd-vsock.service; do "
    reclaim += 'echo "64M swappiness=200" > $$g/memory.reclaim; done'
    guest.run(f"systemd-run --quiet --unit=squeeze sh -c 'while true; do {reclaim}; sleep 0.5; done'")
    data = bytes(range(256)) * 4096
    with guest.up.ssh() as shell:
        for _ in range(16):
            told = shell.check("sha1sum", deadline_s=COMMAND_S, stdin=data)
            assert told.split()[0] == hashlib.sha1(data).hexdigest()  # noqa: S324  # no secret
    guest.run("systemctl stop squeeze")
    assert int(guest.run("grep -w pswpin /proc/vmstat").split()[1]) > before + 1000
    guest.run("tmem-agent swap off")


def test_the_agents_death_takes_nothing_with_it(guest: AgentGuest) -> None:
    guest.run("tmem-agent swap on --size 64M --file /data/swap.tmem")
    before = guest.status()
    guest.run("systemctl kill --kill-whom=main --signal=KILL tmem-agent")
    until(lambda: guest.says("tmem-agent status", "connected"), "the next agent answers")
    until(lambda: guest.status()["swap"]["state"] == "up", "swap is taken over")
    after = guest.status()
    assert after["swap"]["pid"] == before["swap"]["pid"]
    assert after["swap"]["active"]
    assert guest.says("cat /mnt/tmem/hello", "hello")


def test_stopping_releases_everything(guest: AgentGuest) -> None:
    guest.run("systemctl stop tmem-agent")
    left = guest.run("swapon --show --noheadings; findmnt /mnt/tmem || true; pgrep -f tmem-gues[t] || true")
    assert left == ""
    guest.run("systemctl start tmem-agent")
    until(lambda: guest.says("cat /mnt/tmem/hello", "hello"), "the mount serves again")


def test_the_guest_shuts_down_with_swap_and_mounts_in_use(guest: AgentGuest) -> None:
    guest.run("tmem-agent swap on --size 128M --file /data/swap.tmem")
    # Something swapped out, and something that holds a file of the mount open until it is killed.
    guest.run(f"python3 /root/verify.py {WORK_MIB}")
    guest.run("nohup tail -f /mnt/tmem/hello > /dev/null 2>&1 < /dev/null &")
    with contextlib.suppress(OperatorError):  # the connection ends with the guest, sooner or later
        guest.run("systemctl poweroff --no-block")
    guest.up.wait_until_down(SHUTDOWN_S)
