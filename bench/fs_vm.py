"""The headline: a kernel build in a VM with too little memory, three ways, on one model of a disk.

A Debian guest builds a part of the kernel with `make -j4`. Its memory holds neither four compilers' data nor
their program and the sources for long; it swaps, and reads files again that it evicted:

* `no_tmem`: disks past the host's page cache (`cache=none`), a swap file on one of them;
* `tmem`: the same disks, `tmem-agent swap on`, and `tmem-agent mount` over /usr, with the compiler and all it
  needs, and over the sources, which nobody changes behind the mounts;
* `host_page_cache`: the first way with `cache=writeback`.

Each once on the cloud disk of `disk_model`, made slower by the factor of `build_slowdown`, and once on the
disk as it is. Guests, tmem and the host's page cache are cold at each start. In the first two ways the limit
is libvirt's iotune; in the third the disk is slow below the page cache (see `fs_disk`), for iotune would
throttle the cache's hits too. Sectors are those that QEMU read from the host's disk.
"""

from __future__ import annotations

import json
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import build_slowdown
import fs_disk
import vm_host
from disk_model import DiskModel
from framework.daemon import Tmemd
from record import DIRECTORY, Record, record
from tmem_host.vm import machine
from tmem_host.vm.machine import Machine
from tmem_host.vm.request import Registration, VmRequest
from tmem_host.vm.ssh import GuestShell
from tmem_host.workloads import kernel
from tmem_host.workloads.shell import DATA

_MIB = 1 << 20
MEMORY_MIB = 192
SWAP_MIB = 256
QUOTA_MIB = 256
CPUS = 2
JOBS = 4
MOUNTS = ("/usr --changes none", f"{DATA}/linux --changes none")
TARGET = "kernel/time/"
WAYS = ("no_tmem", "tmem", "host_page_cache")
DISKS = ("cloud", "unthrottled")
_VM = "bench-fs"
_KEPT = DIRECTORY / "fs_builds.json"
_STEP_S = 180.0
_BUILD_S = 900.0


@dataclass(frozen=True)
class Build:
    """What one build took."""

    seconds: float
    sectors: float
    """Read from the host's disk by QEMU."""
    guest_sectors: float
    """Read by the guest from its virtio disks."""
    host_bytes: float
    """Host memory that held the guest's pages, when it was most: tmem's, or the host's page cache."""


Builds = dict[tuple[str, bool], list[Build]]
"""Builds by way and whether the disk was the cloud's."""


class Most:
    """The greatest value that a function had while the block ran, asked every other second."""

    def __init__(self, ask: Callable[[], int]) -> None:
        self.value = 0
        self._ask = ask
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="most")

    def _watch(self) -> None:
        while not self._done.wait(2.0):
            self.value = max(self.value, self._ask())

    def __enter__(self) -> Most:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


class Guest:
    """The VM, set up one of the ways."""

    def __init__(self, way: str, up: Machine, shell: GuestShell, tmemd: Tmemd) -> None:
        self.way = way
        self.up = up
        self.shell = shell
        self.tmemd = tmemd
        self.qemu = fs_disk.emulator(up)
        if way == "tmem":
            self._run(f"tmem-agent swap on --size {SWAP_MIB}M --file {DATA}/swap.tmem")
            for mount in MOUNTS:
                self._run(f"tmem-agent mount {mount}")
        else:
            self._run("systemctl stop tmem-agent")
            file = f"{DATA}/swap.plain"
            self._run(f"dd if=/dev/zero of={file} bs=1M count={SWAP_MIB} oflag=direct status=none")
            self._run(f"chmod 600 {file} && mkswap {file} && swapon {file}")

    def _run(self, line: str) -> str:
        return self.shell.check(line, deadline_s=_STEP_S)

    def build(self, model: DiskModel | None) -> Build:
        """Build from cold, on the cloud disk or, without a model, on the disk as it is."""
        self._run("sync; echo 3 > /proc/sys/vm/drop_caches")
        with self.tmemd.admin() as admin:
            admin.flush(_VM)
        fs_disk.forget(self.up)
        limit = fs_disk.below_the_page_cache if self.way == "host_page_cache" else fs_disk.iotune
        with limit(self.up, model.limits) if model else nullcontext(), Most(self._host_bytes) as most:
            before = fs_disk.sectors_read(self.qemu), self.up.block_stats().sectors_read
            done = kernel.run(
                self.shell,
                kernel.target(TARGET),
                source=f"{DATA}/linux",
                jobs=JOBS,
                deadline_s=_BUILD_S,
            )
            after = fs_disk.sectors_read(self.qemu), self.up.block_stats().sectors_read
        return Build(done.seconds, after[0] - before[0], after[1] - before[1], most.value)

    def _host_bytes(self) -> int:
        if self.way == "tmem":
            with self.tmemd.admin() as admin:
                return admin.vm(_VM).stored_bytes
        return fs_disk.cached_bytes(self.up) if self.way == "host_page_cache" else 0


def measure(
    rounds: int = 1, ways: Sequence[str] = WAYS, on: Sequence[str] = DISKS, *, more: bool = False
) -> tuple[DiskModel, Builds]:
    """Boot the guest each way, and build in it, on each disk.

    Of ways left out, the last run's builds are taken; with `more`, of all, on the same disk.
    """
    builds: Builds = defaultdict(list)
    kept = json.loads(_KEPT.read_text()) if _KEPT.exists() and (more or len(ways) < len(WAYS)) else {}
    model = DiskModel(**kept["model"]) if kept else None
    for way, on_model, fields in kept.get("builds", []):
        if more or way not in ways:
            builds[way, on_model].append(Build(**fields))
    with vm_host.running() as tmemd:
        if model is None:
            model = build_slowdown.measure(tmemd, TARGET, cpus=CPUS)
            print(model, flush=True)
        for way in [way for _ in range(rounds) for way in ways]:
            request = VmRequest(
                name=_VM,
                cpus=CPUS,
                memory_bytes=MEMORY_MIB * _MIB,
                register=Registration(tmemd.admin_socket, quota_bytes=QUOTA_MIB * _MIB),
                disk_cache="writeback" if way == "host_page_cache" else "none",
                wait="agent",
            )
            with machine.up(request, print) as up, up.ssh() as shell:
                guest = Guest(way, up, shell, tmemd)
                for on_model in (disk == "cloud" for disk in on):
                    done = guest.build(model if on_model else None)
                    builds[way, on_model].append(done)
                    print(f"  {way}, {'cloud disk' if on_model else 'unthrottled'}: {done}", flush=True)
                    _keep(model, builds)
    return model, builds


def _keep(model: DiskModel, builds: Builds) -> None:
    """For a later run of some of the ways."""
    found = [(way, on_model, asdict(each)) for (way, on_model), made in builds.items() for each in made]
    _KEPT.write_text(json.dumps({"model": asdict(model), "builds": found}, indent=1) + "\n")


def records(model: DiskModel, builds: Builds) -> list[Record]:
    """The figures; those on the disk as it is have `_unthrottled` in their names."""

    def middle(way: str, on_model: bool, field: str) -> float:
        return float(statistics.median(getattr(done, field) for done in builds[way, on_model]))

    found = [model.record()]
    goals = {
        ("no_tmem", "sectors"): 0.2,
        ("no_tmem", "seconds"): 0.75,
        ("host_page_cache", "sectors"): 1.0,
        ("host_page_cache", "seconds"): 1.0,
        ("host_page_cache", "host_bytes"): 0.5,
    }
    for on_model in (True, False):
        for (peer, field), goal in goals.items():
            if ("tmem", on_model) not in builds or (peer, on_model) not in builds:
                continue
            name = f"kernel_build_{field}_vs_{peer}{'' if on_model else '_unthrottled'}"
            scale, unit = {"host_bytes": (_MIB, "MiB"), "sectors": (1, "sectors"), "seconds": (1, "s")}[field]
            found.append(
                record(
                    name,
                    unit,
                    middle("tmem", on_model, field) / scale,
                    peer=peer.replace("_", " "),
                    peer_value=middle(peer, on_model, field) / scale,
                    better="lower",
                    goal=goal if on_model else None,
                    samples=len(builds["tmem", on_model]),
                )
            )
    return found
