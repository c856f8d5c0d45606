"""`make bench-fs`: the file cache beside the lower file system itself, bindfs and libfuse's passthrough_hp.

Natively on this machine, in one run, in interleaved rounds: every contender does a job before the next job
begins, and medians are compared. passthrough_hp runs as it comes, with its writeback cache and with names and
attributes that it never asks about again: it assumes that nobody else changes the directory, which ours does
not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import fs_jobs as jobs
from fs_servers import ROOT, Contenders, drop_caches
from record import Record, publish, record

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


def one_round(contenders: Contenders, tarball: Path, samples: Samples, number: int) -> None:
    roots = contenders.roots
    # Another one begins each round: who comes first pays for what the machine below us has not cached.
    names = [*list(roots)[number % len(roots) :], *list(roots)[: number % len(roots)]]

    def note(job: str, name: str, value: float) -> None:
        samples[job, name].append(value)
        print(f"  {job:16} {name:15} {value:12.1f}", flush=True)

    for job, run in (("randread", jobs.random_read), ("seqread", jobs.sequential_read)):
        for name in names:
            contenders.forget_tmem()
            drop_caches()
            note(f"{job}_cold", name, run(roots[name]))
        for name in names:
            run(roots[name])
            subprocess.run(["cat", roots[name] / "data"], stdout=subprocess.DEVNULL, check=True)
            note(f"{job}_kernel", name, run(roots[name]))
        contenders.fill_tmem(roots["ours"] / "data", jobs.FILE_BYTES // 4096)
        drop_caches()
        note(f"{job}_warm", "ours", run(roots["ours"]))
    for job, run in (("write", jobs.sequential_write), ("write_4k", jobs.small_write)):
        for name in names:
            drop_caches()
            note(job, name, run(roots[name]))
    for name in names:
        drop_caches()
        for job, value in jobs.metadata(roots[name]).items():
            note(job, name, value)
    for name in names:
        drop_caches()
        note("tar", name, jobs.unpack(roots[name], tarball))
        drop_caches()
        note("walk_cold", name, jobs.walk(roots[name]))
        note("walk_warm", name, jobs.walk(roots[name]))
        jobs.remove(roots[name])
    for name in names:
        note("compile", name, jobs.compile_sources(roots[name] / "project"))


def results(samples: Samples, resident_mib: float) -> list[Record]:
    def middle(job: str, name: str) -> float:
        return statistics.median(samples[job, name])

    records = []
    for name, unit, our_job, peer, peer_job, better, goal in RECORDS:
        ours, theirs = middle(our_job, "ours"), middle(peer_job, peer)
        records.append(
            record(
                name,
                unit,
                ours,
                peer=f"{peer} {peer_job}",
                peer_value=theirs,
                better="lower" if better == "lower" else "higher",
                goal=goal,
                samples=len(samples[our_job, "ours"]),
            )
        )
    records.append(record("daemon_rss_mib", "MiB", resident_mib, better="lower", goal=12.0))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--option", action="append", default=[], help="option for tmem-guest fs")
    options = parser.parse_args()
    parent = ROOT / "build" / "bench"
    parent.mkdir(parents=True, exist_ok=True)
    samples: Samples = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="fs-", dir=parent) as name:
        directory = Path(name)
        with Contenders(directory, *options.option) as contenders:
            tarball = directory / "tree.tar"
            tree = Path("/usr/lib/python3")
            subprocess.run(["tar", "cf", tarball, "-C", tree, "."], check=True)
            # Half of it compresses, as data does on the whole.
            with (contenders.lower / "data").open("wb") as file:
                for _ in range(jobs.FILE_BYTES >> 20):
                    file.write(os.urandom(1 << 19) + bytes(range(256)) * (1 << 11))
            jobs.make_sources(contenders.lower / "project")
            for number in range(options.rounds):
                print(f"round {number + 1} of {options.rounds}", flush=True)
                one_round(contenders, tarball, samples, number)
            records = results(samples, contenders.resident_mib())
    publish("fs", records)


if __name__ == "__main__":
    main()
