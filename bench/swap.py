"""`make bench-swap`: swap to host memory beside a disk and zram, inside a VM; what the shim itself costs.

Prints tables; writes `build/bench/swap.json` and `build/bench/swap.svg`. With `native` or `vm` as argument,
only that part is measured. Guests are emulated where there is no KVM: there, only ratios count, and disks are
made slower as `disk_model` describes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("bench", "host", "guest", "native/py", "tests")]

import swap_native  # noqa: E402
import swap_vm  # noqa: E402
from disk_model import DiskModel  # noqa: E402
from ending import unwind_on_signals  # noqa: E402
from record import DIRECTORY, Record, machine, publish, record  # noqa: E402

_LABELS = {
    "ublk": "tmem, ublk",
    "nbd": "tmem, NBD",
    "clouddisk": "swap file, cloud disk",
    "swapfile": "swap file, unthrottled",
    "zram": "zram (lz4)",
}
_RATE = "pages_per_s"


class Table:
    """Medians over the rounds, and the records made of them."""

    def __init__(self, samples: swap_vm.Samples) -> None:
        self.samples = samples
        self.records: list[Record] = []

    def median(self, device: str, way: str, key: str) -> float:
        """Median over the rounds."""
        return statistics.median(figures[key] for figures in self.samples[device, way])

    def beside(
        self,
        name: str,
        way: str,
        ours: str,
        peer: str,
        *,
        key: str = _RATE,
        unit: str = "pages/s",
        goal: float | None = None,
    ) -> None:
        """A record of a figure beside a peer's, both of the same way."""
        self.records.append(
            record(
                name,
                unit,
                self.median(ours, way, key),
                peer=_LABELS[peer],
                peer_value=self.median(peer, way, key),
                better="lower" if unit == "µs" else "higher",
                goal=goal,
                samples=len(self.samples[ours, way]),
            )
        )


def vm_records(samples: swap_vm.Samples, found: DiskModel) -> list[Record]:
    """The figures of the VM part. Where a name says nothing else, vm.page-cluster is 3, as by default."""
    table = Table(samples)
    random = "rand_in/3"
    table.beside("rand_swapin_ublk_vs_clouddisk", random, "ublk", "clouddisk", goal=3.0)
    table.beside("rand_swapin_ublk_vs_swapfile", random, "ublk", "swapfile", goal=1.0)
    table.beside("rand_swapin_nbd_vs_clouddisk", random, "nbd", "clouddisk")
    table.beside("rand_swapin_nbd_vs_swapfile", random, "nbd", "swapfile")
    table.beside("rand_swapin_ublk_vs_zram", random, "ublk", "zram")
    for peer in ("clouddisk", "swapfile", "zram"):
        table.beside(f"rand_swapin_pc0_ublk_vs_{peer}", "rand_in/0", "ublk", peer)
    for peer in ("clouddisk", "swapfile", "zram"):
        table.beside(f"rand4_swapin_ublk_vs_{peer}", "rand_in4/3", "ublk", peer)
    for name, way in (
        ("rand_write", "rand_write/3"),
        ("seq_swapin", "seq_in/3"),
        ("seq_swapin_pc0", "seq_in/0"),
    ):
        for peer in ("clouddisk", "swapfile", "zram"):
            table.beside(f"{name}_ublk_vs_{peer}", way, "ublk", peer)
    table.beside("seq_swapout_ublk_vs_clouddisk", "fill", "ublk", "clouddisk")
    for peer in ("swapfile", "zram"):
        table.beside(f"seq_swapout_ublk_vs_{peer}", "fill", "ublk", peer)
    table.beside("seq_swapout_nbd_vs_clouddisk", "fill", "nbd", "clouddisk")
    for key, name in (("p50_us", "p50"), ("p99_us", "p99")):
        for peer in ("clouddisk", "swapfile", "zram", "nbd"):
            table.beside(f"rand_swapin_{name}_ublk_vs_{peer}", random, "ublk", peer, key=key, unit="µs")
    for peer in ("swapfile", "zram", "nbd"):
        table.beside(f"rand_swapin_guest_cpu_ublk_vs_{peer}", random, "ublk", peer, key="cpu_us", unit="µs")
    for job, _, _ in swap_vm.FIO_JOBS:
        if ("ublk", job) in samples:
            for peer in ("clouddisk", "swapfile", "zram", "nbd"):
                table.beside(f"fio_{job}_ublk_vs_{peer}", job, "ublk", peer, key="iops", unit="IOPS")
    table.records.append(found.record())
    # Of the serving process, a device of 512 MiB.
    rss_mib = table.median("ublk", "resident", "bytes") / (1 << 20)
    table.records.append(record("shim_rss_mib", "MiB", rss_mib, goal=6.0))
    return table.records


def single_records(samples: swap_vm.Samples) -> list[Record]:
    """The figures of the guest with one processor."""
    table = Table(samples)
    for peer, goal in (("clouddisk", 3.0), ("swapfile", 1.0)):
        table.beside(f"rand_swapin_1cpu_ublk_vs_{peer}", "rand_in/3", "ublk", peer, goal=goal)
        table.beside(f"rand_swapin_1cpu_pc0_ublk_vs_{peer}", "rand_in/0", "ublk", peer)
        table.beside(f"rand4_swapin_1cpu_ublk_vs_{peer}", "rand_in4/3", "ublk", peer)
        table.beside(f"rand_write_1cpu_ublk_vs_{peer}", "rand_write/3", "ublk", peer)
    return table.records


def native_records(samples: swap_native.Samples) -> list[Record]:
    """The figures of the native part."""
    found = []
    for pattern in swap_native.PATTERNS:
        ours, peer = samples["shim", pattern], samples["qemu-nbd", pattern]
        name = "native_shim_iops_per_core" if pattern == "randread" else "native_shim_write_iops_per_core"
        found.append(
            record(
                name,
                "IOPS",
                statistics.median(each["per_core"] for each in ours),
                peer="qemu-nbd, file in memory",
                peer_value=statistics.median(each["per_core"] for each in peer),
                better="higher",
                samples=len(ours),
            )
        )
    return found


def draw(samples: swap_vm.Samples, path: Path) -> None:
    """Pages a second by way and device, on a logarithmic scale."""
    ways = [
        ("rand_in/3", "random in"),
        ("rand_in/0", "random in,\nno read-ahead"),
        ("rand_in4/3", "random in,\n4 threads"),
    ]
    ways += [("rand_write/3", "random rewrite"), ("seq_in/3", "sequential in"), ("fill", "sequential out")]
    figure, axes = pyplot.subplots(figsize=(11, 5))
    width = 0.8 / len(swap_vm.DEVICES)
    for place, device in enumerate(swap_vm.DEVICES):
        rates = [statistics.median(each[_RATE] for each in samples[device, way]) for way, _ in ways]
        at = [number + (place - len(swap_vm.DEVICES) / 2 + 0.5) * width for number in range(len(ways))]
        bars = axes.bar(at, rates, width, label=_LABELS[device])
        axes.bar_label(bars, fmt="%.0f", fontsize=6)
    axes.set_xticks(range(len(ways)), [label for _, label in ways])
    axes.set(yscale="log", ylabel="pages/s", title=f"Swap in a guest: {machine()}")
    axes.legend(fontsize="small")
    axes.grid(visible=True, axis="y", alpha=0.3)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="native, vm; both if none is named")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each way to visit pages")
    options = parser.parse_args()
    parts = set(options.parts) or {"native", "vm"}
    if parts - {"native", "vm"}:
        parser.error(f"no such part: {', '.join(sorted(parts - {'native', 'vm'}))}")
    unwind_on_signals()
    records: list[Record] = []
    if "native" in parts:
        records += native_records(swap_native.measure(options.rounds))
    if "vm" in parts:
        samples, single, found = swap_vm.measure(options.rounds, options.seconds)
        records += vm_records(samples, found)
        records += single_records(single)
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        draw(samples, DIRECTORY / "swap.svg")
    print(publish("swap", records))


if __name__ == "__main__":
    main()
