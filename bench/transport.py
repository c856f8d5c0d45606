"""The transports' latency and throughput, beside their peers.

(a) Over a unix socket: a bare ping-pong of the same bytes, the store without transport, Redis, memcached.
(b) From inside a VM, over tmemd's own vsock device: `vhost-device-vsock` and a socket, a bare ping-pong over
    vsock, a virtio-blk read that the host answers from its page cache.

Prints a table; writes `build/bench/transport.json` and `build/bench/transport.svg`. With `unix` or `vm` as
argument, only that part is measured.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).parent))
import transport_program
import transport_unix
import transport_vm
from record import DIRECTORY, Record, machine, publish
from transport_program import Samples


def draw(samples: Samples, path: Path) -> None:
    """How many of the round trips took no longer than a time."""
    wanted = [name for name in samples if "histogram" in samples[name][0] and not name[-1].isdigit()]
    figure, axes = pyplot.subplots(figsize=(10, 6))
    for name in sorted(wanted):
        buckets: dict[float, float] = {}
        for report in samples[name]:
            for bound, count in report["histogram"]:  # type: ignore[attr-defined]
                buckets[bound] = buckets.get(bound, 0) + count
        bounds = sorted(buckets)
        total, seen, shares = sum(buckets.values()), 0.0, []
        for bound in bounds:
            seen += buckets[bound]
            shares.append(seen / total)
        axes.plot([bound * 1.125 for bound in bounds], shares, label=name)
    axes.set(xscale="log", xlabel="round trip, µs", ylabel="share of round trips", title=machine())
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Measure and publish."""
    parts = sys.argv[1:] or ["unix", "vm"]
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
    path = publish("transport", records)
    draw(samples, DIRECTORY / "transport.svg")
    print(path)


if __name__ == "__main__":
    main()
