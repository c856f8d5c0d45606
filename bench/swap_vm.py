"""The part of the swap benchmark that runs inside a VM.

A Debian guest; a program larger than its memory (`guest/swapper.c`) is swapped to one device after the
other, in every round to each: tmem over ublk and over NBD, a swap file on the data disk as it is and as the
cloud disk of `disk_model`, zram. The devices of tmem are set up by `tmem-agent`, as an operator would. Then
fio on each. The cloud disk is one while something is measured, and a fast disk while memory is filled and
swap turned off.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import disk_model
import vm_host
from framework.daemon import Tmemd
from tmem_host.vm import machine
from tmem_host.vm.machine import Machine
from tmem_host.vm.request import Registration, VmRequest
from tmem_host.vm.ssh import GuestShell

_MIB = 1 << 20
MEMORY_MIB = 256
PROGRAM_MIB = 256
DEVICE_MIB = (
    640  # more than twice the program: the kernel then keeps what it brought in on the device as well
)
DEVICES = ("ublk", "nbd", "clouddisk", "swapfile", "zram")
CPUS = 2
SINGLE_DEVICES = ("ublk", "clouddisk", "swapfile")
"""What a guest with one processor is measured with."""
SMALL_DEVICE_MIB = 512
_COMMAND_S = 300.0
_WORRY_S = 60.0
"""Nothing takes so long when all is well: the benchmark says what it waits for."""
_FIO_S = 3
_FIO_MIB = 64
# Name, fio's pattern, requests at a time.
FIO_JOBS = (("randread", "randread", 1), ("randread16", "randread", 16), ("randwrite16", "randwrite", 16))
_GATE = "/run/tmem-bench/gate"
_TMEM_FILE = "/data/swap.tmem"
_PLAIN_FILE = "/data/swap.plain"

Figures = dict[str, float]
Samples = dict[tuple[str, str], list[Figures]]
"""Figures by device and way; a way of the program has the page-cluster behind it, like `rand_in/3`."""


class Guest:
    """The VM, and swap in it."""

    def __init__(self, up: Machine, shell: GuestShell, tmemd: Tmemd) -> None:
        self.up = up
        self.shell = shell
        self.tmemd = tmemd
        self.model = disk_model.measure(up, shell)
        self._swapper = disk_model.install(shell, "swapper")

    def run(self, line: str) -> str:
        """A shell line that must succeed."""
        with self._worrying(line):
            return self.shell.check(line, deadline_s=_COMMAND_S)

    @contextmanager
    def _worrying(self, line: str) -> Iterator[None]:
        def worry() -> None:
            with self.tmemd.admin() as admin:
                told = admin.vm(self.up.name)
            console = "\n    ".join(self.up.console(8))
            print(f"  waiting for {line!r} for {_WORRY_S:g} s; the host says {told}; the guest's console:")
            print(f"    {console}", flush=True)

        timer = threading.Timer(_WORRY_S, worry)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def prepare(self) -> None:
        """Make the plain swap file and the zram device."""
        self.run(f"dd if=/dev/zero of={_PLAIN_FILE} bs=1M count={DEVICE_MIB} oflag=direct status=none")
        self.run(f"chmod 600 {_PLAIN_FILE} && mkswap {_PLAIN_FILE} && modprobe zram")
        self.run(
            f"echo lz4 > /sys/block/zram0/comp_algorithm; echo {DEVICE_MIB}M > /sys/block/zram0/disksize"
        )

    @contextmanager
    def swap(self, device: str, size_mib: int = DEVICE_MIB) -> Iterator[str]:
        """Turn swap on on a device, of this size if it is one of tmem's; yields its path."""
        with ExitStack() as stack:
            if device in ("ublk", "nbd"):
                options = f"--size {size_mib}M --file {_TMEM_FILE} --device {device}"
                self.run(f"tmem-agent swap on {options}")
                stack.callback(self.run, "tmem-agent swap off --keep-file")
                path = str(json.loads(self.run("tmem-agent status --json"))["swap"]["device"])
            else:
                path = "/dev/zram0" if device == "zram" else _PLAIN_FILE
                self.run(f"mkswap {path} && swapon --priority 100 {path}")
                stack.callback(self.run, f"swapoff {path}")
            yield path

    def throttled(self, device: str) -> AbstractContextManager[None]:
        """While something is measured: what is the cloud disk is one."""
        return self.model.on(self.up) if device == "clouddisk" else nullcontext()

    def visit(self, device: str, seconds: float, tell: Callable[[str, Figures], None]) -> None:
        """Run the program and tell of each way. RuntimeError if it fails."""
        text, complaint = b"", b""
        line = f"{self._swapper} {PROGRAM_MIB} {seconds:g} {_GATE}"
        with ExitStack() as disk:

            def heard(name: str, data: bytes) -> None:
                nonlocal text, complaint
                if name == "stderr":
                    complaint += data
                    return
                *lines, text = (text + data).split(b"\n")
                for report in map(json.loads, lines):
                    way = report.pop("way")
                    if way != "filled":
                        cluster = report.pop("cluster")
                        tell(way if cluster == -1 else f"{way}/{cluster}", report)
                    if way == "fill":
                        disk.close()
                    elif way == "filled":
                        disk.enter_context(self.throttled(device))
                    if way in ("fill", "filled"):
                        self.run(f"touch {_GATE}")

            disk.enter_context(self.throttled(device))
            with self._worrying(line):
                code = self.shell.run(line, deadline_s=_COMMAND_S, on_output=heard)
            if code != 0:
                raise RuntimeError(f"the program ended with {code}: {complaint.decode(errors='replace')}")

    def shim(self) -> dict[str, float]:
        """What the swap shim says of itself."""
        counters = json.loads(self.run("tmem-agent status --json"))["swap"]["counters"]
        return {name: value for name, value in counters.items() if isinstance(value, int)}

    def fio(self, path: str, pattern: str, depth: int) -> Figures:
        """One fio job on a device (or file), past the page cache."""
        job = [
            f"fio --name=job --filename={path} --rw={pattern} --bs=4k --iodepth={depth} --ioengine=libaio",
            f"--direct=1 --size={_FIO_MIB}M --time_based --runtime={_FIO_S} --output-format=json",
            "--refill_buffers --buffer_compress_percentage=50 --randrepeat=1 --norandommap",
        ]
        report = json.loads(self.run(" ".join(job)))["jobs"][0]
        side = report["read" if "read" in pattern else "write"]
        percentiles = side["clat_ns"]["percentile"]
        return {
            "iops": side["iops"],
            "p50_us": percentiles["50.000000"] / 1000,
            "p99_us": percentiles["99.000000"] / 1000,
            "cpu": (report["usr_cpu"] + report["sys_cpu"]) / 100,
        }


@contextmanager
def booted(cpus: int) -> Iterator[Guest]:
    """The guest, with a tmemd of its own."""
    with ExitStack() as stack:
        tmemd = stack.enter_context(vm_host.running())
        register = Registration(tmemd.admin_socket, quota_bytes=800 * _MIB, persistent_max_bytes=4096 * _MIB)
        request = VmRequest(
            name="bench-swap", memory_bytes=MEMORY_MIB * _MIB, cpus=cpus, register=register, wait="agent"
        )
        up = stack.enter_context(machine.up(request, print))
        yield Guest(up, stack.enter_context(up.ssh()), tmemd)


def one_round(guest: Guest, devices: tuple[str, ...], samples: Samples, seconds: float, number: int) -> None:
    """Swap to each device once; another one begins each round."""
    turn = number % len(devices)
    for device in (*devices[turn:], *devices[:turn]):

        def tell(way: str, figures: Figures, device: str = device) -> None:
            samples.setdefault((device, way), []).append(figures)
            print(
                f"  {device:10} {way:14} {figures['pages_per_s']:9.0f} pages/s"
                f"  p50 {figures.get('p50_us', 0):7.0f} µs  p99 {figures.get('p99_us', 0):8.0f} µs"
                f"  guest CPU {figures['cpu']:5.0%}",
                flush=True,
            )

        with guest.swap(device):
            guest.visit(device, seconds, tell)
            if device in ("ublk", "nbd"):
                shim = guest.shim()
                kept = ("puts", "refused", "hedged", "reads_host", "reads_file", "writes_file")
                samples.setdefault((device, "shim"), []).append({name: shim[name] for name in kept})


def fio_round(guest: Guest, samples: Samples) -> None:
    """Fio on each device, which is no swap meanwhile."""
    for device in DEVICES:
        with guest.swap(device, SMALL_DEVICE_MIB) as path:
            if device in ("ublk", "nbd"):
                samples.setdefault((device, "resident"), []).append({"bytes": guest.shim()["rss_bytes"]})
            guest.run(f"swapoff {path}")
            fill = "--rw=write --bs=64k --direct=1 --refill_buffers --buffer_compress_percentage=50"
            guest.run(f"fio --name=fill --filename={path} {fill} --size={_FIO_MIB}M --output-format=terse")
            with guest.throttled(device):
                for name, pattern, depth in FIO_JOBS:
                    figures = guest.fio(path, pattern, depth)
                    samples.setdefault((device, name), []).append(figures)
                    rate = f"{figures['iops']:8.0f} IOPS  p50 {figures['p50_us']:6.0f} µs"
                    print(f"  {device:10} fio {name:12} {rate}", flush=True)
            guest.run(f"mkswap {path} && swapon {path}")


def measure(rounds: int, seconds: float) -> tuple[Samples, Samples, disk_model.DiskModel]:
    """Do everything `rounds` times; fio once. The time of each way is at most `seconds`.

    Returns what was measured in a guest with `CPUS` processors, and in one with a single one.
    """
    samples: Samples = {}
    single: Samples = {}
    started = time.monotonic()
    for cpus, devices, taken in ((CPUS, DEVICES, samples), (1, SINGLE_DEVICES, single)):
        with booted(cpus) as guest:
            print(guest.model, flush=True)
            guest.prepare()
            for number in range(rounds):
                one_round(guest, devices, taken, seconds, number)
                print(f"{cpus} CPUs, round {number + 1} done, {time.monotonic() - started:.0f} s", flush=True)
            if taken is samples:
                fio_round(guest, samples)
                model = guest.model
    return samples, single, model
