"""Part (b) of the transport's benchmark: from inside a VM.

Two VMs of the image `mini`, one with tmemd's own device and one with `vhost-device-vsock`, are measured in
turn, each with `tmem-bench` inside it. Guests are emulated where there is no KVM; then only ratios count.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from record import Record, record
from tmem_host.api.client import Client
from tmem_host.api.types import VmSpec
from tmem_host.vm import images, libvirtd, machine, transport
from tmem_host.vm.machine import Machine
from tmem_host.vm.request import Registration, VmRequest
from tmem_host.vm.ssh import GuestShell
from tmem_host.vm.transport import TransportChoice
from transport_program import BATCHES, ROUNDS, Samples, median, parse, program, waiting_for

_MIB = 1 << 20
_PROGRAM = "/usr/bin/tmem-bench"
_COMMAND_S = 300.0
_PONG_PORT = 7000
_SINGLES = 2000
# vhost-device-vsock loses longer writes of recent kernels.
_PEER_WRITE_BYTES = 28 * 1024
# The data disk, whichever name it has; a regular file of that name would be timed as memory.
_FIND_DEVICE = "for d in /dev/vdb /dev/vda; do [ ! -b $d ] || { echo $d; exit; }; done; exit 1"


@contextmanager
def _tmemd(directory: Path) -> Iterator[Path]:
    """A tmemd of its own; yields its admin socket."""
    admin = directory / "admin.sock"
    command = ["tmemd", "--admin-socket", str(admin), "--memfd", "--capacity", "512M"]
    command += ["--vm-directory", str(directory / "vm"), "--state-directory", str(directory / "state")]
    quiet = subprocess.DEVNULL
    with subprocess.Popen([*_in_venv(command)], stdout=quiet, stderr=quiet) as process:
        try:
            waiting_for(admin, process)
            yield admin
        finally:
            process.terminate()


def _in_venv(command: list[str]) -> list[str]:
    import sys  # noqa: PLC0415

    return [str(Path(sys.executable).with_name(command[0])), *command[1:]]


@contextmanager
def machine_with_device(directory: Path, name: str) -> Iterator[Machine]:
    """A VM with tmemd's own device, and a tmemd with its sockets in `directory`/vm."""
    os.environ["TMEM_VM_DIRECTORY"] = str(directory / "vm")
    images.build("mini", progress=print)
    with ExitStack() as stack:
        admin = stack.enter_context(_tmemd(directory))
        stack.enter_context(libvirtd.running())
        yield stack.enter_context(machine.up(_request(name, "vhost-user", admin), print))


def register(directory: Path, name: str) -> None:
    """Make a VM known to that tmemd that nobody runs."""
    with Client(directory / "admin.sock") as client:
        client.add_vm(name, VmSpec(quota_bytes=200 * _MIB))


def _request(name: str, choice: TransportChoice, admin: Path) -> VmRequest:
    return VmRequest(
        name=f"bench-{name}",
        image="mini",
        memory_bytes=384 * _MIB,
        transport=choice,
        register=Registration(admin, quota_bytes=200 * _MIB),
        files={_PROGRAM: program().read_bytes()},
        # virtio-blk is to answer from the host's page cache.
        disk_cache="writeback",
    )


@contextmanager
def _machines(directory: Path) -> Iterator[dict[str, Machine]]:
    os.environ["TMEM_VM_DIRECTORY"] = str(directory / "vm")
    images.build("mini", progress=print)
    with ExitStack() as stack:
        admin = stack.enter_context(_tmemd(directory))
        stack.enter_context(libvirtd.running())
        found = {}
        wanted: tuple[tuple[str, TransportChoice], ...] = (
            ("ours", "vhost-user"),
            ("peer", "vhost-device-vsock"),
        )
        for name, choice in wanted:
            if choice == "vhost-device-vsock":
                try:
                    transport.find_program()
                except Exception as error:
                    print(f"without {choice}: {error}")
                    continue
            found[name] = stack.enter_context(machine.up(_request(name, choice, admin), print))
        yield found


def _run(shell: GuestShell, arguments: str) -> dict[str, float]:
    return parse(shell.check(f"{_PROGRAM} {arguments}", deadline_s=_COMMAND_S))


def measure() -> Samples:
    """Run everything `ROUNDS` times, the VMs in turn."""
    samples: Samples = {}
    with tempfile.TemporaryDirectory(prefix="tb-", dir="/dev/shm") as place, ExitStack() as stack:
        directory = Path(place)
        guests = stack.enter_context(_machines(directory))
        shells = {}
        for name, guest in guests.items():
            shells[name] = stack.enter_context(_shell(guest))
            shells[name].check(f"chmod 755 {_PROGRAM}", deadline_s=_COMMAND_S)
        pong = directory / "vm" / "bench-ours" / "vsock.sock"
        process = subprocess.Popen([str(program()), "pong", f"hybrid:{pong}:{_PONG_PORT}"])
        stack.callback(process.wait)
        stack.callback(process.kill)
        for _ in range(ROUNDS):
            for name, shell in shells.items():
                _round(samples, name, shell)
    return samples


def _shell(guest: Machine) -> GuestShell:
    for _ in range(50):
        try:
            return guest.ssh()
        except Exception as error:
            last = error
    raise last


def _round(samples: Samples, name: str, shell: GuestShell) -> None:
    limit = f" --write-bytes {_PEER_WRITE_BYTES}" if name == "peer" else ""

    def keep(run: str, arguments: str) -> None:
        samples.setdefault(f"{name}_{run}", []).append(_run(shell, arguments))

    for work in ("get", "put"):
        keep(work, f"load vsock:2:29805 --work {work} --count {_SINGLES} --pages 1000{limit}")
    if name == "ours":
        keep("pingpong", f"ping vsock:2:{_PONG_PORT} --there 44 --back 4128 --count {_SINGLES}")
        device = shell.check(_FIND_DEVICE, deadline_s=_COMMAND_S).strip()
        keep("block", f"block {device} --count {_SINGLES}")
    for batch in BATCHES:
        several = f"--batch {batch} --count {max(40, 2000 // batch)} --in-flight 2"
        keep(f"get{batch}", f"load vsock:2:29805 {several} --pages 1000{limit}")


def records(samples: Samples) -> list[Record]:
    """The figures of part (b)."""
    found = []

    def beside(name: str, ours: str, peer: str, label: str, *, key: str, goal: float | None = None) -> None:
        if ours not in samples or peer not in samples:
            return
        rate = key == "pages_per_s"
        found.append(
            record(
                name,
                "pages/s" if rate else "µs",
                median(samples[ours], key),
                peer=label,
                peer_value=median(samples[peer], key),
                ratio=statistics.median(
                    a[key] / b[key] for a, b in zip(samples[ours], samples[peer], strict=True)
                ),
                better="higher" if rate else "lower",
                goal=goal,
                samples=len(samples[ours]) if rate else sum(int(each["samples"]) for each in samples[ours]),
            )
        )

    for percentile, name in (("p50_us", "p50"), ("p99_us", "p99"), ("p999_us", "p999")):
        first = percentile == "p50_us"
        peer = "vhost-device-vsock and a socket"
        goals = (0.7, 1.0) if first else (None, None)
        beside(
            f"vm_get_{name}_vs_vhost_device_vsock",
            "ours_get",
            "peer_get",
            peer,
            key=percentile,
            goal=goals[0],
        )
        block = "virtio-blk read, 4 KiB"
        beside(f"vm_get_{name}_vs_virtio_blk", "ours_get", "ours_block", block, key=percentile, goal=goals[1])
        bare = "bare ping-pong over vsock"
        beside(f"vm_get_{name}_vs_pingpong", "ours_get", "ours_pingpong", bare, key=percentile)
        beside(f"vm_put_{name}_vs_vhost_device_vsock", "ours_put", "peer_put", peer, key=percentile)
    for batch in BATCHES:
        name = f"get{batch}"
        rate = "pages_per_s"
        beside(
            f"vm_batch{batch}_get_pages_per_s",
            f"ours_{name}",
            f"peer_{name}",
            "vhost-device-vsock and a socket",
            key=rate,
        )
        if f"peer_{name}" not in samples and f"ours_{name}" in samples:
            ours = samples[f"ours_{name}"]
            value = median(ours, rate)
            found.append(
                record(
                    f"vm_batch{batch}_get_pages_per_s", "pages/s", value, better="higher", samples=len(ours)
                )
            )
    return found
