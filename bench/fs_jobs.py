"""What is measured on each file system. Every job returns its figure."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

FILE_BYTES = 256 << 20
FILES = 10_000
RUNTIME_S = 2


def fio(directory: Path, *options: str) -> dict[str, float]:
    """Run a job; reads and writes a second, bytes a second, median latency in µs."""
    done = subprocess.run(
        [
            "fio",
            "--name=job",
            f"--directory={directory}",
            "--output-format=json",
            "--group_reporting",
            *options,
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    job = json.loads(done.stdout)["jobs"][0]
    kind = "read" if job["read"]["total_ios"] else "write"
    return {
        "iops": job[kind]["iops"],
        "mb_s": job[kind]["bw_bytes"] / 1e6,
        "p50_us": job[kind]["clat_ns"].get("percentile", {}).get("50.000000", 0) / 1e3,
    }


def random_read(directory: Path, *options: str) -> float:
    """Random 4 KiB reads by four readers of a quarter each, in reads a second. No page is read twice."""
    return fio(
        *(directory, "--filename=data", "--readonly", "--rw=randread", "--bs=4k", "--numjobs=4"),
        *(f"--size={FILE_BYTES // 4}", f"--offset_increment={FILE_BYTES // 4}", f"--runtime={RUNTIME_S}"),
        *(f"--randseed={time.time_ns() % (1 << 30)}", "--invalidate=0", *options),
    )["iops"]


def random_read_again(directory: Path) -> float:
    """The same from the page cache, again and again: once would be over in a moment."""
    return random_read(directory, "--time_based")


def sequential_read(directory: Path) -> float:
    """One reader from start to end, in MB/s."""
    return fio(
        *(directory, "--filename=data", f"--size={FILE_BYTES}", "--readonly", "--rw=read", "--bs=128k"),
        "--invalidate=0",
    )["mb_s"]


def sequential_write(directory: Path) -> float:
    """A new file, 128 KiB at a time, with a final fsync, in MB/s."""
    try:
        return fio(directory, "--filename=new", "--size=128m", "--rw=write", "--bs=128k", "--end_fsync=1")[
            "mb_s"
        ]
    finally:
        (directory / "new").unlink()


def small_write(directory: Path) -> float:
    """Random 4 KiB writes to an existing file with a final fsync, in writes a second."""
    path = directory / "small"
    path.write_bytes(bytes(32 << 20))
    try:
        return fio(directory, "--filename=small", "--size=32m", "--rw=randwrite", "--bs=4k", "--end_fsync=1")[
            "iops"
        ]
    finally:
        path.unlink()


def metadata(directory: Path) -> dict[str, float]:
    """Create, stat, list and unlink 10 000 files, in operations a second."""
    root = directory / "files"
    root.mkdir()
    names = [f"{n:05d}" for n in range(FILES)]
    random.Random(1).shuffle(names)  # noqa: S311 - an order, not a secret

    def each(action: Callable[[str], object]) -> float:
        start = time.perf_counter()
        for name in names:
            action(f"{root}/{name}")
        return FILES / (time.perf_counter() - start)

    def listing(_: str) -> object:
        with os.scandir(root) as entries:
            return [entry.stat(follow_symlinks=False).st_size for entry in entries]

    figures = {"create": each(lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)))}
    figures["stat"] = each(os.stat)
    start = time.perf_counter()
    listing("")
    figures["readdir"] = FILES / (time.perf_counter() - start)
    figures["unlink"] = each(os.unlink)
    root.rmdir()
    return figures


def make_sources(directory: Path, units: int = 24, headers: int = 200) -> None:
    """A C project of many small files that include many headers, and its Makefile."""
    chance = random.Random(3)  # noqa: S311 - a project, not a secret
    include = directory / "include"
    include.mkdir(parents=True)
    for n in range(headers):
        needs = "".join(f'#include "h{chance.randrange(n)}.h"\n' for _ in range(min(n, 3)))
        body = "".join(f"struct s{n}_{k} {{ int a[{k + 1}]; long b; }};\n" for k in range(40))
        (include / f"h{n}.h").write_text(f"#pragma once\n{needs}{body}")
    for n in range(units):
        needs = "".join(f'#include "h{chance.randrange(headers)}.h"\n' for _ in range(20))
        body = "".join(
            f"int f{n}_{k}(int x) {{ for (int i = 0; i < x; i++) x += i * {k + 1} ^ (x >> 3); return x; }}\n"
            for k in range(60)
        )
        (directory / f"u{n}.c").write_text(f"#include <stdio.h>\n#include <stdlib.h>\n{needs}{body}")
    (directory / "main.c").write_text("int main(void) { return 0; }\n")
    (directory / "Makefile").write_text(
        "CFLAGS = -O2 -Iinclude\nOBJECTS = $(patsubst %.c,%.o,$(wildcard *.c))\n"
        "program: $(OBJECTS)\n\t$(CC) -o $@ $(OBJECTS)\n"
    )


def compile_sources(sources: Path) -> float:
    """Build the project on two processors, in seconds."""
    subprocess.run("rm -f *.o program", shell=True, cwd=sources, check=True)  # noqa: S602
    start = time.perf_counter()
    subprocess.run(["make", "-s", "-j2"], cwd=sources, check=True, capture_output=True)
    return time.perf_counter() - start


def unpack(directory: Path, tarball: Path) -> float:
    """Unpack a source tree, in seconds."""
    target = directory / "unpacked"
    target.mkdir()
    start = time.perf_counter()
    subprocess.run(["tar", "xf", tarball, "-C", target], check=True)
    return time.perf_counter() - start


def walk(directory: Path) -> float:
    """Look at every name of the unpacked tree, as `git status` does, in seconds."""
    start = time.perf_counter()
    count = 0
    for root, _, names in os.walk(directory / "unpacked"):
        for name in names:
            os.lstat(f"{root}/{name}")
            count += 1
    assert count > 100
    return time.perf_counter() - start


def remove(directory: Path) -> None:
    shutil.rmtree(directory / "unpacked")
