"""One VM floods the server in every way it can; another one wants single pages. What does it notice?

Each way of flooding is measured after a quiet stretch, interleaved over `TMEM_BENCH_ROUNDS` rounds. Prints a
table; writes `build/bench/fairness.json` and `build/bench/fairness.svg`.

Server, victim and flooder are sessions of their own, among which Linux shares the CPUs alike, as it does
among VMs' control groups. They are measured twice. *Apart*, each VM has a CPU of its own and the server
has both: what the victim notices then is the server's doing. *Together*, the flooder's threads compete
with the victim's for both CPUs as well, which no server can prevent; a flooder that only computes and
asks for nothing shows how much of the victim's time that is. `fairness.py device` measures a flood
through the server's vsock device, from a real guest.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import psutil
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).parent))
import transport_program
import transport_vm
from ending import unwind_on_signals
from record import DIRECTORY, Record, machine, publish, record
from transport_program import ROUNDS, Samples, collect, median, pinned, program, serving

WAYS = (
    "max-batches",
    "max-puts",
    "tiny-batches",
    "connect-storm",
    "never-read",
    "half-frames",
    "garbage",
)
PARTS = ("apart", "together", "device")
_DEVICE_WAYS = ("max-batches", "max-puts", "tiny-batches")
_VICTIM_S = 1.2
_FLOOD_S = _VICTIM_S + 0.8
_START_S = 0.3
_RSS_GOAL_MIB = 256.0


def _rss_mib(pid: int) -> float:
    """Anonymous memory; the arena's pages are shared memory and not counted."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024


def _cpus(part: str) -> tuple[int | None, int | None]:
    """CPUs of victim and flooder; `None` for all."""
    usable = sorted(os.sched_getaffinity(0))
    return (None, None) if part == "together" else (usable[0], usable[-1])


def _victim(samples: Samples, name: str, socket: Path, cpu: int | None) -> None:
    load = ["load", f"unix:{socket}", "--pages", "1000", "--count", "1000000", "--pause-us", "200"]
    collect(samples, name, [*load, "--seconds", str(_VICTIM_S)], own_session=True, cpu=cpu)


def measure(part: str, directory: Path) -> tuple[Samples, float]:
    """Times of the victim by what the flooder does, and the most memory the server had."""
    samples: Samples = {}
    largest = 0.0
    ways = (*WAYS, "busy")
    victim_cpu, flooder_cpu = _cpus(part)
    with serving(directory, "victim", "flooder", own_session=True) as server:
        socket = {vm: directory / vm / "vsock.sock_29805" for vm in ("victim", "flooder")}
        for _ in range(ROUNDS):
            for way in ways:
                _victim(samples, f"{part} quiet", socket["victim"], victim_cpu)
                command = [str(program()), "flood", f"unix:{socket['flooder']}", "--way", way]
                command = pinned(flooder_cpu, [*command, "--seconds", str(_FLOOD_S)])
                with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as flood:
                    time.sleep(_START_S)
                    _victim(samples, f"{part} {way}", socket["victim"], victim_cpu)
                    largest = max(largest, _rss_mib(server.pid))
                    flood.wait()
    return samples, largest


def measure_device() -> Samples:
    """The same with a guest that floods through the device inside tmemd; its QEMU has a CPU of its own."""
    samples: Samples = {}
    victim_cpu, flooder_cpu = _cpus("device")
    with tempfile.TemporaryDirectory(prefix="tb-", dir="/dev/shm") as place, ExitStack() as stack:
        directory = Path(place)
        guest = stack.enter_context(transport_vm.machine_with_device(directory, "flooder"))
        transport_vm.register(directory, "victim")
        socket = directory / "vm" / "victim" / "vsock.sock_29805"
        for process in psutil.process_iter(["cmdline"]):
            if f"guest={guest.name}," in " ".join(process.info["cmdline"] or []):
                for thread in process.threads():
                    os.sched_setaffinity(thread.id, {flooder_cpu or 0})
        shell = stack.enter_context(guest.ssh())
        for _ in range(ROUNDS):
            for way in _DEVICE_WAYS:
                _victim(samples, "device quiet", socket, victim_cpu)
                flood = f"/usr/bin/tmem-bench flood vsock:2:29805 --way {way} --seconds {_FLOOD_S + 0.5}"
                shell.check(f"chmod 755 /usr/bin/tmem-bench; {flood} > /dev/null 2>&1 &", deadline_s=60)
                time.sleep(_START_S + 0.5)
                _victim(samples, f"device {way}", socket, victim_cpu)
                time.sleep(_FLOOD_S - _VICTIM_S)
    return samples


def records(samples: Samples, part: str) -> list[Record]:
    """What the victim notices of each way, as a multiple of its quiet value."""
    names = {
        "apart": "victim_get_{}_{}",
        "together": "victim_get_{}_{}_on_shared_cpus",
        "device": "victim_get_{}_{}_by_device",
    }
    ways = [name.partition(" ")[2] for name in samples if name.startswith(f"{part} ")]
    quiet = samples[f"{part} quiet"]
    found = []
    for percentile in ("p99", "p50"):
        for way in ways:
            if way == "quiet":
                continue
            key = f"{percentile}_us"
            reports = samples[f"{part} {way}"]
            goal = 2.0 if percentile == "p99" and part != "together" and way != "busy" else None
            found.append(
                record(
                    names[part].format(percentile, way.replace("-", "_")),
                    "µs",
                    median(reports, key),
                    peer="quiet",
                    peer_value=median(quiet, key),
                    goal=goal,
                    samples=sum(int(report["samples"]) for report in reports),
                )
            )
    return found


def worst(found: list[Record]) -> Record:
    """The flood that the victim notices most, of all those that the server answers for."""
    most = max((each for each in found if each.goal is not None), key=lambda each: each.ratio)
    return record(
        "victim_get_p99_under_flood_vs_quiet",
        "µs",
        most.ours,
        peer=f"quiet (worst: {most.name})",
        peer_value=most.peer_value,
        goal=most.goal,
        samples=most.samples,
    )


def draw(samples: Samples, path: Path) -> None:
    """Percentiles of the victim, by what the flooder does."""
    figure, axes = pyplot.subplots(figsize=(11, 6))
    names = list(samples)
    for percentile in ("p50_us", "p99_us", "p999_us"):
        values = [statistics.median(report[percentile] for report in samples[name]) for name in names]
        axes.plot(names, values, "o-", label=percentile.removesuffix("_us"))
    axes.set(yscale="log", ylabel="one get of the victim, µs", title=machine())
    axes.tick_params(axis="x", rotation=60)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Measure and publish."""
    unwind_on_signals()
    parts = sys.argv[1:] or list(PARTS)
    if not set(parts) <= set(PARTS):
        raise SystemExit(f"fairness.py: the parts are {', '.join(PARTS)}, not {' '.join(parts)}")
    transport_program.build()
    samples: Samples = {}
    found: list[Record] = []
    largest = 0.0
    for part in parts:
        if part == "device":
            samples |= measure_device()
        else:
            with tempfile.TemporaryDirectory(prefix="tmem-bench-") as directory:
                measured, most = measure(part, Path(directory))
            samples |= measured
            largest = max(largest, most)
        found += records(samples, part)
    if any(each.goal for each in found):
        found.insert(0, worst(found))
    if largest:
        found.append(record("server_memory_under_flood", "MiB", largest, goal=_RSS_GOAL_MIB, samples=ROUNDS))
    path = publish("fairness", found)
    draw(samples, DIRECTORY / "fairness.svg")
    print(path)


if __name__ == "__main__":
    main()
