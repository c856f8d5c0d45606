"""How many different pages of a file guest and host hold together, with each way of putting them.

A guest reads single pages at random, for long, of a file that guest and host together cannot hold. All pages
are as likely, so the part of the reads that needs no disk is the part of the file that is held. A page that
both hold counts once: that is what is to be compared. Pages do not compress.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import vm_host
from record import Record, record
from tmem_host.vm import machine
from tmem_host.vm.request import Registration, VmRequest
from tmem_host.vm.ssh import GuestShell

_MIB = 1 << 20
MEMORY_MIB = 256
FILE_MIB = 256
QUOTA_MIB = 96
WARM_READS = 60_000
READS = 20_000
WAYS = {"guest alone": "--no-tmem", "read": "--put=read", "evicted": "--put=evicted"}
_PAGES = FILE_MIB << 8
_DEADLINE_S = 600.0
_STATUS = b"""
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("/run/effective.sock")
print(s.recv(4096).decode())
"""


class Guest:
    """The VM, and the file in it."""

    def __init__(self, shell: GuestShell) -> None:
        self.shell = shell
        shell.put(_STATUS, "/run/status.py", deadline_s=60)
        self._run(f"head -c {FILE_MIB << 20} /dev/urandom > /data/file; sync; mkdir -p /mnt/effective")

    def _run(self, line: str) -> str:
        return self.shell.check(line, deadline_s=_DEADLINE_S)

    @contextmanager
    def mounted(self, option: str) -> Iterator[None]:
        """Show /data through the file cache."""
        self._run(
            "echo 3 > /proc/sys/vm/drop_caches;"
            " systemd-run --quiet --unit=effective --service-type=notify tmem-guest fs"
            f" --lower /data --mount /mnt/effective --status-socket /run/effective.sock {option}"
        )
        try:
            yield
        finally:
            self._run("systemctl stop effective")

    def status(self) -> dict[str, int]:
        """Counters of the file cache."""
        told: dict[str, int] = json.loads(self._run("python3 /run/status.py"))
        return told

    def read(self, count: int) -> None:
        """Read so many pages at random."""
        self._run(
            f"fio --name=job --filename=/mnt/effective/file --readonly --rw=randread --bs=4k --norandommap"
            f" --randrepeat=0 --number_ios={count} --size={FILE_MIB}M --invalidate=0 --output-format=terse"
        )

    def held_pages(self) -> float:
        """Read until what is held is what stays held, then see how much that is."""
        self._run("cat /mnt/effective/file > /dev/null")
        self.read(WARM_READS)
        before = self.status()
        self.read(READS)
        after = self.status()
        missed = after["miss_pages"] - before["miss_pages"]
        kept = ("hit_pages", "miss_pages", "put_pages", "dropped_pages", "evicted_pages")
        print(
            f"  {missed} of {READS} from the disk; { ({name: after[name] - before[name] for name in kept}) }"
        )
        return _PAGES * (1 - missed / READS)


def measure() -> dict[str, float]:
    """Pages held, by way."""
    with ExitStack() as stack:
        tmemd = stack.enter_context(vm_host.running("512M"))
        request = VmRequest(
            name="bench-fe",
            memory_bytes=MEMORY_MIB * _MIB,
            register=Registration(tmemd.admin_socket, quota_bytes=QUOTA_MIB * _MIB),
            wait="agent",
        )
        up = stack.enter_context(machine.up(request, print))
        guest = Guest(stack.enter_context(up.ssh()))
        held = {}
        for way, option in WAYS.items():
            with tmemd.admin() as admin:
                admin.flush("bench-fe")
            with guest.mounted(option):
                held[way] = guest.held_pages()
            print(f"  {way}: {held[way]:.0f} of {_PAGES} pages held", flush=True)
        return held


def records(held: dict[str, float]) -> list[Record]:
    """Beside what the guest holds alone."""
    return [
        record(
            f"effective_cache_put_{way}_vs_guest_alone",
            "pages",
            held[way],
            peer="guest alone",
            peer_value=held["guest alone"],
            better="higher",
        )
        for way in ("read", "evicted")
    ]
