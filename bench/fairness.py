"""One VM floods the server in every way it can; another one wants single pages. What does it notice?

Each way of flooding is measured after a quiet stretch, interleaved over `TMEM_BENCH_ROUNDS` rounds. Prints a
table; writes `build/bench/fairness.json` and `build/bench/fairness.svg`. The flooding processes run on this
machine and compete for its CPUs as virtual CPUs would. As libvirt gives each VM a control group with
an equal share of the CPUs, server, victim and flooder are sessions of their own, which Linux schedules alike.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).parent))
import transport_program
from ending import unwind_on_signals
from record import DIRECTORY, Record, machine, publish, record
from transport_program import ROUNDS, Samples, collect, median, program, serving

WAYS = ("max-batches", "tiny-batches", "connect-storm", "never-read", "half-frames", "garbage")
_FLOOD_S = 3.0
_VICTIM_S = 1.5
_RSS_GOAL_MIB = 256.0


def _rss_mib(pid: int) -> float:
    """Anonymous memory; the arena's pages are shared memory and not counted."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024


def measure(directory: Path) -> tuple[Samples, float]:
    """Times of the victim by what the flooder does, and the most memory the server had."""
    samples: Samples = {}
    largest = 0.0
    with serving(directory, "victim", "flooder", own_session=True) as server:
        socket = {vm: f"unix:{directory}/{vm}/vsock.sock_29805" for vm in ("victim", "flooder")}
        load = ["load", socket["victim"], "--pages", "1000", "--count", "1000000", "--pause-us", "200"]
        victim = [*load, "--seconds", str(_VICTIM_S)]
        for _ in range(ROUNDS):
            for way in WAYS:
                collect(samples, "quiet", victim, own_session=True)
                command = [str(program()), "flood", socket["flooder"], "--way", way]
                with subprocess.Popen(
                    [*command, "--seconds", str(_FLOOD_S)], stdout=subprocess.DEVNULL, start_new_session=True
                ) as flood:
                    time.sleep(0.3)
                    collect(samples, way, victim, own_session=True)
                    largest = max(largest, _rss_mib(server.pid))
                    flood.wait()
    return samples, largest


def records(samples: Samples, largest_mib: float) -> list[Record]:
    """The worst way of flooding, each of them, and the server's memory."""
    key = "p99_us"
    quiet = median(samples["quiet"], key)
    each = {way: median(samples[way], key) for way in WAYS}
    worst = max(each, key=lambda way: each[way])
    count = sum(int(report["samples"]) for report in samples[worst])
    found = [
        record(
            "victim_get_p99_under_flood_vs_quiet",
            "µs",
            each[worst],
            peer=f"quiet (worst flood: {worst})",
            peer_value=quiet,
            goal=2.0,
            samples=count,
        )
    ]
    found += [
        record(
            f"victim_get_p99_{way.replace('-', '_')}",
            "µs",
            value,
            peer="quiet",
            peer_value=quiet,
            samples=ROUNDS,
        )
        for way, value in each.items()
    ]
    found += [
        record(
            f"victim_get_p50_{way.replace('-', '_')}",
            "µs",
            median(samples[way], "p50_us"),
            peer="quiet",
            peer_value=median(samples["quiet"], "p50_us"),
            samples=ROUNDS,
        )
        for way in WAYS
    ]
    found.append(record("server_memory_under_flood", "MiB", largest_mib, goal=_RSS_GOAL_MIB, samples=ROUNDS))
    return found


def draw(samples: Samples, path: Path) -> None:
    """Percentiles of the victim, by what the flooder does."""
    figure, axes = pyplot.subplots(figsize=(10, 5))
    names = ["quiet", *WAYS]
    for percentile in ("p50_us", "p99_us", "p999_us"):
        values = [statistics.median(report[percentile] for report in samples[name]) for name in names]
        axes.plot(names, values, "o-", label=percentile.removesuffix("_us"))
    axes.set(yscale="log", ylabel="one get of the victim, µs", title=machine())
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Measure and publish."""
    unwind_on_signals()
    transport_program.build()
    with tempfile.TemporaryDirectory(prefix="tmem-bench-") as directory:
        samples, largest = measure(Path(directory))
    path = publish("fairness", records(samples, largest))
    draw(samples, DIRECTORY / "fairness.svg")
    print(path)


if __name__ == "__main__":
    main()
