"""`make bench-fs`: the file cache beside the lower file system itself, bindfs and libfuse's passthrough_hp.

Natively on this machine, in one run, in interleaved rounds: every contender does a job before the next job
begins, and medians are compared. passthrough_hp runs as it comes, with its writeback cache and with names and
attributes that it never asks about again: it assumes that nobody else changes the directory, which ours does
not, but for `alone`: ours with `--changes none`, where opens are at issue. Reads are `cold` of a file that
was never read, `warm` if tmem has it, and `lost` if tmem lost it and the guest does not know.

Then, in VMs, how much guest and host hold together (`fs_effective`), and the headline (`fs_vm`). With
`native`, `effective` or `vm` as argument only that part is measured, and takes the place of that part's
figures in `build/bench/fs.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import fs_jobs as jobs
import matplotlib as mpl
from ending import unwind_on_signals
from fs_servers import Contenders, drop_caches
from record import DIRECTORY, Record, machine, publish, record

mpl.use("Agg")
import fs_effective
import fs_vm
from matplotlib import pyplot

Samples = dict[tuple[str, str], list[float]]
"""Figures by job and contender."""

# Name of the record, unit, our job, peer, peer's job, which is better, goal.
RECORDS = [
    (
        "native_randread_cold_vs_passthrough_hp",
        "IOPS",
        "randread_cold",
        "passthrough_hp",
        "randread_cold",
        "higher",
        1.0,
    ),
    (
        "native_randread_warm_vs_bindfs_cold",
        "IOPS",
        "randread_warm",
        "bindfs",
        "randread_cold",
        "higher",
        2.0,
    ),
    ("native_randread_warm_vs_lower_cold", "IOPS", "randread_warm", "lower", "randread_cold", "higher", None),
    ("native_randread_cold_vs_lower", "IOPS", "randread_cold", "lower", "randread_cold", "higher", None),
    (
        "native_randread_lost_vs_passthrough_hp",
        "IOPS",
        "randread_lost",
        "passthrough_hp",
        "randread_cold",
        "higher",
        None,
    ),
    (
        "native_randread_kernel_warm_vs_passthrough_hp",
        "IOPS",
        "randread_kernel",
        "passthrough_hp",
        "randread_kernel",
        "higher",
        1.0,
    ),
    (
        "native_seqread_cold_vs_passthrough_hp",
        "MB/s",
        "seqread_cold",
        "passthrough_hp",
        "seqread_cold",
        "higher",
        1.0,
    ),
    (
        "native_seqread_lost_vs_passthrough_hp",
        "MB/s",
        "seqread_lost",
        "passthrough_hp",
        "seqread_cold",
        "higher",
        None,
    ),
    ("native_seqread_warm_vs_lower_cold", "MB/s", "seqread_warm", "lower", "seqread_cold", "higher", None),
    ("native_write_vs_passthrough_hp", "MB/s", "write", "passthrough_hp", "write", "higher", 1.0),
    ("native_write_4k_vs_passthrough_hp", "IOPS", "write_4k", "passthrough_hp", "write_4k", "higher", None),
    ("native_create_vs_passthrough_hp", "files/s", "create", "passthrough_hp", "create", "higher", 1.0),
    ("native_stat_vs_passthrough_hp", "files/s", "stat", "passthrough_hp", "stat", "higher", 1.0),
    ("native_readdir_vs_passthrough_hp", "files/s", "readdir", "passthrough_hp", "readdir", "higher", 1.0),
    ("native_unlink_vs_passthrough_hp", "files/s", "unlink", "passthrough_hp", "unlink", "higher", 1.0),
    ("native_tar_vs_passthrough_hp", "s", "tar", "passthrough_hp", "tar", "lower", 1.0),
    ("native_walk_cold_vs_passthrough_hp", "s", "walk_cold", "passthrough_hp", "walk_cold", "lower", 1.0),
    ("native_walk_warm_vs_passthrough_hp", "s", "walk_warm", "passthrough_hp", "walk_warm", "lower", 1.0),
    ("native_compile_vs_lower", "s", "compile", "lower", "compile", "lower", 1.05),
    ("native_compile_vs_passthrough_hp", "s", "compile", "passthrough_hp", "compile", "lower", None),
]
# With `--changes none`.
RECORDS_ALONE = [
    ("native_alone_create_vs_passthrough_hp", "files/s", "create", "passthrough_hp", "create", "higher", 1.0),
    ("native_alone_tar_vs_passthrough_hp", "s", "tar", "passthrough_hp", "tar", "lower", 1.0),
    (
        "native_alone_walk_cold_vs_passthrough_hp",
        "s",
        "walk_cold",
        "passthrough_hp",
        "walk_cold",
        "lower",
        1.0,
    ),
    (
        "native_alone_walk_warm_vs_passthrough_hp",
        "s",
        "walk_warm",
        "passthrough_hp",
        "walk_warm",
        "lower",
        1.0,
    ),
    ("native_alone_compile_vs_lower", "s", "compile", "lower", "compile", "lower", 1.05),
    ("native_alone_compile_vs_passthrough_hp", "s", "compile", "passthrough_hp", "compile", "lower", None),
]


PARTS = ["native", "effective", "vm"]
PEERS = ("lower", "passthrough_hp", "ours", "alone")
"""Contenders of jobs that take long; `alone` is ours with `--changes none`."""
WALKS = 3
"""Walks in a row: they are short, and differ."""
COLD_READS = 3
"""The same for reads from the disk, whose own speed varies; contenders take turns."""
READERS = ("lower", "bindfs", "passthrough_hp", "ours")
"""Contenders of reads, which are the same for both of ours."""


Note = Callable[[str, str, float], None]
"""Keeps a job's figure of a contender."""


def read_jobs(contenders: Contenders, names: Sequence[str], note: Note) -> None:
    """Reads, one contender after the other."""
    roots = contenders.roots
    for job, run in (("randread", jobs.random_read), ("seqread", jobs.sequential_read)):
        readers = [name for name in names if name in READERS]
        for name in readers * COLD_READS:
            contenders.forget_tmem()
            contenders.renew("data")
            drop_caches()
            note(f"{job}_cold", name, run(roots[name]))
        if job == "randread":
            for name in ("passthrough_hp", "ours"):
                subprocess.run(["cat", roots[name] / "data"], stdout=subprocess.DEVNULL, check=True)
                note(f"{job}_kernel", name, jobs.random_read_again(roots[name]))
        contenders.fill_tmem(roots["ours"] / "data", jobs.FILE_BYTES // 4096)
        drop_caches()
        note(f"{job}_warm", "ours", run(roots["ours"]))
        contenders.forget_tmem()
        drop_caches()
        note(f"{job}_lost", "ours", run(roots["ours"]))


def one_round(contenders: Contenders, tarball: Path, samples: Samples, number: int) -> None:
    """Every job, one contender after the other; another one begins each round."""
    roots = contenders.roots
    turn = number % len(roots)
    names = [*list(roots)[turn:], *list(roots)[:turn]]

    def note(job: str, name: str, value: float) -> None:
        samples[job, name].append(value)
        print(f"  {job:16} {name:15} {value:12.1f}", flush=True)

    read_jobs(contenders, names, note)
    for job, run in (("write", jobs.sequential_write), ("write_4k", jobs.small_write)):
        for name in names:
            drop_caches()
            note(job, name, run(roots[name]))
    for name in names:
        drop_caches()
        for job, value in jobs.metadata(roots[name]).items():
            note(job, name, value)
    for name in names:
        if name in PEERS:
            drop_caches()
            note("tar", name, jobs.unpack(roots[name], tarball))
            for _ in range(WALKS):
                drop_caches()
                note("walk_cold", name, jobs.walk(roots[name]))
            for _ in range(WALKS):
                note("walk_warm", name, jobs.walk(roots[name]))
            jobs.remove(roots[name])
    for name in names:
        if name in PEERS:
            note("compile", name, jobs.compile_sources(roots[name] / "project"))


def results(samples: Samples, resident_mib: float) -> list[Record]:
    def middle(job: str, name: str) -> float:
        return statistics.median(samples[job, name])

    records = []
    wanted = [("ours", row) for row in RECORDS] + [("alone", row) for row in RECORDS_ALONE]
    for who, (name, unit, our_job, peer, peer_job, better, goal) in wanted:
        ours, theirs = middle(our_job, who), middle(peer_job, peer)
        records.append(
            record(
                name,
                unit,
                ours,
                peer=f"{peer} {peer_job}",
                peer_value=theirs,
                better="lower" if better == "lower" else "higher",
                goal=goal,
                samples=len(samples[our_job, who]),
            )
        )
    records.append(record("daemon_rss_mib", "MiB", resident_mib, better="lower", goal=12.0))
    return records


def measure_native(rounds: int, options: Sequence[str]) -> list[Record]:
    """All native jobs, so many times."""
    samples: Samples = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="fs-", dir=DIRECTORY) as name:
        directory = Path(name)
        with Contenders(directory, *options) as contenders:
            tarball = directory / "tree.tar"
            tree = Path("/usr/lib/python3")
            subprocess.run(["tar", "cf", tarball, "-C", tree, "."], check=True)
            # Half of it compresses, as data does on the whole.
            with (contenders.lower / "data").open("wb") as file:
                for _ in range(jobs.FILE_BYTES >> 20):
                    file.write(os.urandom(1 << 19) + bytes(range(256)) * (1 << 11))
            jobs.make_sources(contenders.lower / "project")
            for number in range(rounds):
                print(f"round {number + 1} of {rounds}", flush=True)
                one_round(contenders, tarball, samples, number)
            return results(samples, contenders.resident_mib())


def draw(records: Sequence[Record], path: Path) -> None:
    """How many times better than its peer each figure is, on a logarithmic scale."""
    shown = [each for each in records if each.peer_value][::-1]
    better = [each.ratio if each.better == "higher" else 1 / max(each.ratio, 1e-3) for each in shown]
    colours = {None: "tab:grey", True: "tab:green", False: "tab:red"}
    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(shown) + 1))
    bars = axes.barh([each.name for each in shown], better, color=[colours[each.met] for each in shown])
    axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times better than the peer", title=f"The file cache: {machine()}")
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(visible=True, axis="x", alpha=0.3)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def earlier(path: Path) -> list[Record]:
    """The figures of an earlier run."""
    return [Record(**each) for each in json.loads(path.read_text())] if path.exists() else []


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=3, help="of the native part")
    parser.add_argument("--vm-rounds", type=int, default=1)
    parser.add_argument("--way", action="append", choices=fs_vm.WAYS, help="only this way in a VM")
    parser.add_argument("--disk", action="append", choices=fs_vm.DISKS, help="only this one in a VM")
    parser.add_argument("--more", action="store_true", help="in VMs, add to the last run's builds")
    parser.add_argument("--option", action="append", default=[], help="option for tmem-guest fs")
    options = parser.parse_args()
    # argparse takes no part at all for a part that is not among the choices.
    parts = options.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    unwind_on_signals()
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    before = earlier(DIRECTORY / "fs.json")
    native = [each for each in before if each.name.startswith(("native_", "daemon_"))]
    effective = [each for each in before if each.name.startswith("effective_")]
    headline = [each for each in before if each not in native and each not in effective]
    if "native" in parts:
        native = measure_native(options.rounds, options.option)
    if "vm" in parts:
        ways, on = options.way or fs_vm.WAYS, options.disk or fs_vm.DISKS
        headline = fs_vm.records(*fs_vm.measure(options.vm_rounds, ways, on, more=options.more))
    if "effective" in parts:
        effective = fs_effective.records(fs_effective.measure())
    records = [*native, *effective, *headline]
    print(publish("fs", records))
    draw(records, DIRECTORY / "fs.svg")


if __name__ == "__main__":
    main()
