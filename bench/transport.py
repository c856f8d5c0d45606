"""The transports' latency and throughput, beside their peers.

(a) Over a unix socket: a bare ping-pong of the same bytes, the store without transport, Redis, memcached.
(b) From inside a VM, over tmemd's own vsock device: `vhost-device-vsock` and a socket, a bare ping-pong over
    vsock, a virtio-blk read that the host answers from its page cache.

Prints a table; writes `build/bench/transport.json` and, beside it, `transport.svg`: latency by percentile, as
HDR histograms are. With `unix` or `vm` as argument, only that part is measured; the file keeps the other
part's figures of before, and the drawing goes to `build/bench/transport-PART.svg`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).parent))
import transport_program
import transport_unix
import transport_vm
from ending import unwind_on_signals
from record import DIRECTORY, Record, machine, publish
from transport_program import Samples

PARTS = ("unix", "vm")


def _percentiles(reports: Sequence[dict[str, float]]) -> tuple[list[float], list[float]]:
    """How rare a round trip is (one in so many), and how long those take at least, µs."""
    buckets: dict[float, float] = {}
    for report in reports:
        for bound, count in report["histogram"]:  # type: ignore[attr-defined]
            buckets[bound] = buckets.get(bound, 0) + count
    total, seen = sum(buckets.values()), 0.0
    rarity, latency = [], []
    for bound in sorted(buckets):
        rarity.append(total / (total - seen))
        latency.append(bound)
        seen += buckets[bound]
    return rarity, latency


def draw(samples: Samples, path: Path) -> None:
    """Latency of single round trips by percentile."""
    wanted = [name for name in samples if "histogram" in samples[name][0] and not name[-1].isdigit()]
    figure, axes = pyplot.subplots(figsize=(10, 6))
    for name in sorted(wanted):
        axes.step(*_percentiles(samples[name]), where="post", label=name)
    marks = {2: "50", 10: "90", 100: "99", 1000: "99.9", 10000: "99.99"}
    axes.set(xscale="log", yscale="log", xlabel="percentile", ylabel="round trip, µs", title=machine())
    axes.set_xticks(list(marks), list(marks.values()))
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Measure and publish."""
    parts = sys.argv[1:] or list(PARTS)
    if not set(parts) <= set(PARTS):
        raise SystemExit(f"transport.py: the parts are {' and '.join(PARTS)}, not {' '.join(parts)}")
    unwind_on_signals()
    transport_program.build()
    records: list[Record] = []
    samples: Samples = {}
    if "unix" in parts:
        with tempfile.TemporaryDirectory(prefix="tmem-bench-") as directory:
            samples |= transport_unix.measure(Path(directory))
        records += transport_unix.records(samples)
    if "vm" in parts:
        found = transport_vm.measure()
        records += transport_vm.records(found)
        samples |= found
    others = [part for part in PARTS if part not in parts]
    path = publish("transport", records, keep=tuple(f"{part}_" for part in others))
    draw(samples, DIRECTORY / ("transport.svg" if not others else f"transport-{parts[0]}.svg"))
    print(path)


if __name__ == "__main__":
    main()
