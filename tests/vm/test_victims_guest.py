"""Pages that a guest's kernel evicts reach the host, and no page is both here and there."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from framework.agent_guest import AgentGuest
from framework.vms import MIB, Vms
from tmem_host.vm.request import Registration

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

# More than the guest keeps of it, less than guest and host together.
FILE_MIB = 176
MEMORY_MIB = 256
QUOTA_MIB = 120
# Reads a file in random order, so often, without read-ahead; tells the sums of what it read each time.
READER = b"""
import hashlib, os, random, sys
path, passes, size = sys.argv[1], int(sys.argv[2]), 1 << 16
fd = os.open(path, os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
order = list(range(os.fstat(fd).st_size // size))
for seed in range(passes):
    random.Random(seed).shuffle(order)
    sums = {n: hashlib.blake2b(os.pread(fd, size, n * size)).digest() for n in order}
    print(hashlib.blake2b(b"".join(sums[n] for n in sorted(sums))).hexdigest())
"""
STATUS = b"""
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("/run/v.sock")
print(s.recv(4096).decode())
"""
WRITER = f"head -c {FILE_MIB << 20} /dev/urandom > /data/victims; sync"


class Mount:
    """A file cache of /data in the guest."""

    def __init__(self, guest: AgentGuest, put: str) -> None:
        self.guest = guest
        self.put = put

    def __enter__(self) -> Mount:
        self.guest.run(
            "mkdir -p /mnt/v && systemd-run --quiet --unit=victims --service-type=notify"
            f" tmem-guest fs --lower /data --mount /mnt/v --status-socket /run/v.sock --put {self.put}"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.guest.run("systemctl stop victims")

    def status(self) -> dict[str, object]:
        told: dict[str, object] = json.loads(self.guest.run("python3 /run/status.py"))
        return told

    def count(self, name: str) -> int:
        value = self.status()[name]
        assert isinstance(value, int)
        return value

    def read(self, passes: int) -> list[str]:
        return self.guest.run(f"python3 /run/reader.py /mnt/v/victims {passes}").split()


@pytest.fixture(scope="module")
def guest(module_vms: Vms, built: Callable[[str], None]) -> AgentGuest:
    built("debian")
    register = Registration(module_vms.tmemd.admin_socket, quota_bytes=QUOTA_MIB * MIB)
    up = module_vms.up("debian", memory_bytes=MEMORY_MIB * MIB, register=register, wait="agent")
    with up.ssh() as shell:
        shell.put(READER, "/run/reader.py", deadline_s=60)
        shell.put(STATUS, "/run/status.py", deadline_s=60)
        shell.check(WRITER, deadline_s=300)
    return AgentGuest(up)


def test_evicted_pages_come_back_from_the_host(guest: AgentGuest) -> None:
    """A file larger than the guest's memory is read three times in random order; every byte is right."""
    sums = set()
    for put in ("read", "evicted"):
        with Mount(guest, put) as mount:
            assert mount.status()["put"] == put, "this kernel did not take the program"
            sums |= {*mount.read(2)}
            before = mount.count("miss_pages")
            sums |= {*mount.read(1)}
            assert len(sums) == 1, "a page that came back was not the page that went"
            missed = mount.count("miss_pages") - before
            print(f"put when {put}: {missed} of {FILE_MIB << 8} pages from the disk; {mount.status()}")
            assert mount.count("hit_pages") > 0
            assert (mount.count("evicted_pages") > 1000) == (put == "evicted")


@pytest.mark.long
def test_a_changed_file_is_never_seen_as_it_was(guest: AgentGuest) -> None:
    """Changes through the mount and behind it, while pages are evicted all the time."""
    with Mount(guest, "evicted") as mount:
        mount.read(1)
        for where in ("/mnt/v", "/data", "/mnt/v"):
            guest.run(
                f"head -c 8M /dev/urandom | dd of={where}/victims bs=1M seek=16 conv=notrunc status=none"
            )
            expected = guest.run("python3 /run/reader.py /data/victims 1").split()
            assert mount.read(3) == expected * 3
