"""The page store against its codec, zram, Redis, memcached, LRU and Belady's optimum.

Prints a table and writes `build/bench/store.json` and `build/bench/store.svg`. What happens inside one
process is measured by `native/store/examples/bench`, the sockets by `native/store/examples/load`.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path

import lz4.block
import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).parent))
import corpus
from record import DIRECTORY, Record, machine, publish, record
from store_peers import Load, SkippedError, servers, zram_device

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "target" / "release" / "examples"
ZRAM_BYTES = 256 << 20
SOCKET_ROUNDS = 5

Samples = dict[str, list[float]]


def build() -> None:
    """Build the measuring programs."""
    command = ["cargo", "build", "--quiet", "--release", "-j2", "-p", "tmem-store", "--examples"]
    subprocess.run(command, cwd=ROOT, check=True)


def measure(pages: Path, *sections: str, zram: Path | None = None) -> Samples:
    """Run sections of the example; all samples by name."""
    environment = os.environ | ({"TMEM_BENCH_ZRAM": str(zram)} if zram else {})
    output = subprocess.check_output([str(EXAMPLES / "bench"), str(pages), *sections], env=environment)
    samples: Samples = json.loads(output)
    return samples


def paired(samples: Samples, ours: str, peer: str) -> float:
    """Median of the ratios of samples taken right after each other."""
    return statistics.median(a / b for a, b in zip(samples[ours], samples[peer], strict=True))


def of_codec(samples: Samples) -> list[Record]:
    """Put, get and same-filled pages against the codec alone."""
    median = statistics.median

    def compare(name: str, ours: str, peer: str, label: str, goal: float | None) -> Record:
        return record(
            name,
            "ns",
            median(samples[ours]),
            peer=label,
            peer_value=median(samples[peer]),
            ratio=paired(samples, ours, peer),
            goal=goal,
            samples=len(samples[ours]),
        )

    same_filled = [value / 1000 for value in samples["put_same_filled_ns"]]
    cold = ("cold_get_ns", "cold_codec_decompress_ns")
    return [
        compare("put_lz4_vs_codec", "put_ns", "codec_compress_ns", "LZ4 compression", 1.15),
        compare("get_lz4_vs_codec", "get_ns", "codec_decompress_ns", "LZ4 decompression", 1.4),
        compare("get_cold_lz4_vs_codec", *cold, "LZ4 decompression", None),
        record("put_same_filled_us", "µs", median(same_filled), goal=0.4, samples=len(same_filled)),
        record("get_as_lz4_ns", "ns", median(samples["get_lz4_ns"]), samples=len(samples["get_lz4_ns"])),
        record("flush_ns", "ns", median(samples["flush_ns"]), samples=len(samples["flush_ns"])),
    ]


def of_threads(samples: Samples) -> list[Record]:
    """Two threads against one, and all cores; beside what the machine gives threads that share nothing."""
    one, codec_one = samples["threads1_pages_per_s"], samples["codec_threads1_pages_per_s"]
    records = []
    for threads in sorted(
        int(name[7:-12]) for name in samples if re.fullmatch(r"threads\d+_pages_per_s", name)
    ):
        if threads == 1:
            continue
        rates, codec = (
            samples[f"threads{threads}_pages_per_s"],
            samples[f"codec_threads{threads}_pages_per_s"],
        )
        gain = statistics.median(b / a for a, b in zip(one, rates, strict=True))
        codec_gain = statistics.median(b / a for a, b in zip(codec_one, codec, strict=True))
        records += [
            record(
                f"threads{threads}_speedup",
                "put+get/s",
                statistics.median(rates),
                peer="one thread",
                peer_value=statistics.median(one),
                ratio=gain,
                better="higher",
                goal=1.8 if threads == 2 else None,
                samples=len(rates),
            ),
            record(
                f"threads{threads}_speedup_vs_codec",
                "times one thread",
                gain,
                peer="LZ4 both ways, sharing nothing",
                peer_value=codec_gain,
                better="higher",
                samples=len(rates),
            ),
        ]
    return records


def of_memory(samples: Samples) -> list[Record]:
    """Density after churn, metadata, recovery."""
    recovery = samples["recovery_1gib_s"]
    return [
        record(
            "payload_utilisation",
            "of the arena",
            samples["payload_utilisation"][0],
            better="higher",
            goal=0.92,
        ),
        record("metadata_bytes_per_page", "B", samples["metadata_bytes_per_page"][0], goal=48),
        record("recovery_1gib_s", "s", statistics.median(recovery), goal=1.0, samples=len(recovery)),
    ]


def of_traces(samples: Samples) -> list[Record]:
    """Hit ratios against LRU and the optimum."""
    records = []
    for key in sorted(samples):
        trace = key.removeprefix("hit_ratio_")
        if key == trace or trace.startswith(("lru_", "optimal_")):
            continue
        ours = samples[key][0]
        for peer, name in (("lru", "LRU"), ("optimal", "Belady's optimum")):
            value = samples[f"hit_ratio_{peer}_{trace}"][0]
            records.append(
                record(
                    f"hit_ratio_vs_{peer}_{trace}", "hits", ours, peer=name, peer_value=value, better="higher"
                )
            )
    return records


def of_zram(pages: Path) -> list[Record]:
    """Put and get against writes and reads of a zram device."""
    with zram_device(ZRAM_BYTES) as device:
        samples = measure(pages, "zram", zram=device)
    return [
        record(
            name,
            "ns",
            statistics.median(samples[ours]),
            peer="zram (lz4), direct I/O",
            peer_value=statistics.median(samples[peer]),
            ratio=paired(samples, ours, peer),
            samples=len(samples[ours]),
        )
        for name, ours, peer in (
            ("put_vs_zram", "zram_put_ns", "zram_write_ns"),
            ("get_vs_zram", "zram_get_ns", "zram_read_ns"),
        )
    ]


def of_sockets(pages: Path) -> list[Record]:
    """The store over its socket against Redis and memcached over theirs."""
    records = []
    for mode in ("raw", "lz4"):
        with tempfile.TemporaryDirectory(prefix="tmem-bench-") as directory:
            values = pages
            if mode == "raw":
                values = Path(directory) / "values"
                values.write_bytes(os.urandom(2048 * corpus.PAGE_BYTES))
            load, rates, memory = Load(values, mode), defaultdict(list), {}
            with servers(Path(directory), compression=mode != "raw") as found:
                for _ in range(SOCKET_ROUNDS):
                    for server in found:
                        for name, rate in load.run(EXAMPLES / "load", server).items():
                            rates[name, server.name].append(rate)
                memory = {server.name: server.memory_bytes() / load.pages for server in found}
        goal = 2.0 if mode == "raw" else None
        for operation in ("put", "get"):
            medians = {name: statistics.median(rates[f"{operation}_per_s", name]) for name in memory}
            ours = medians.pop("tmem")
            best = max(medians, key=lambda name: medians[name])
            records.append(
                record(
                    f"socket_{mode}_{operation}_vs_best_peer",
                    "pages/s",
                    ours,
                    peer=f"{best}, {load.clients} clients, batches of {load.batch}",
                    peer_value=medians[best],
                    better="higher",
                    goal=goal,
                    samples=SOCKET_ROUNDS,
                )
            )
        ours = memory.pop("tmem")
        best = min(memory, key=lambda name: memory[name])
        records.append(
            record(f"socket_{mode}_memory_bytes_per_page", "B", ours, peer=best, peer_value=memory[best])
        )
    return records


# What a guest may run side by side: programs that share libraries and little else.
_PROGRAMS = (
    "import matplotlib.pyplot, numpy; held = numpy.random.rand(1_000_000)",
    "import json, sqlite3, xml.dom.minidom; held = [{'id': i, 'name': f'user{i}'} for i in range(100_000)]",
    "import asyncio, email, http.server, ssl; held = {str(i): i for i in range(200_000)}",
    "import ast, json; held = [ast.parse(open(ast.__file__).read()) for _ in range(20)]",
)


def of_duplicates() -> Record:
    """Bytes of payload that deduplication would save of what programs side by side hold."""
    counts: Counter[bytes] = Counter()
    with ExitStack() as stack:
        for program in _PROGRAMS:
            command = [sys.executable, "-c", f"{program}; import sys; print(flush=True); sys.stdin.read()"]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            assert process.stdout is not None
            process.stdout.readline()
            counts.update(corpus.anonymous_pages(process.pid))
    sizes = {
        page: min(len(lz4.block.compress(page, store_size=False)), corpus.PAGE_BYTES)
        for page in counts
        if page[:-8] != page[8:]
    }
    total = sum(size * counts[page] for page, size in sizes.items())
    return record(
        "dedup_would_save",
        "of payload",
        1 - sum(sizes.values()) / total,
        better="higher",
        samples=counts.total(),
    )


def of_scale(samples: Samples) -> list[Record]:
    """What the extrapolation to large hosts rests on."""
    median = statistics.median
    least, largest = "scale_recovery_1gib_s", "scale_recovery_4gib_s"
    alone, crowd = "scale_put_1_vms_ns", "scale_put_500_vms_ns"
    apart, together = "scale_gets_2_apart_per_s", "scale_gets_2_one_shard_per_s"
    return [
        record(
            "scale_recovery_4gib_s",
            "s",
            median(samples[largest]),
            peer="1 GiB",
            peer_value=median(samples[least]),
            samples=len(samples[largest]),
        ),
        record(
            "scale_put_500_vms_ns",
            "ns",
            median(samples[crowd]),
            peer="one VM",
            peer_value=median(samples[alone]),
            ratio=paired(samples, crowd, alone),
            samples=len(samples[crowd]),
        ),
        record("scale_vm_bytes", "B", samples["scale_vm_bytes"][0]),
        record(
            "scale_gets_one_shard",
            "gets/s",
            median(samples[together]),
            peer="two threads, two shards",
            peer_value=median(samples[apart]),
            better="higher",
            samples=len(samples[together]),
        ),
    ]


def draw(records: list[Record], samples: Samples) -> None:
    """The figure: what a put and a get are made of, density over time, hit ratios."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    names = [
        "codec_compress_ns",
        "put_ns",
        "codec_decompress_ns",
        "get_ns",
        "get_lz4_ns",
        "put_same_filled_ns",
    ]
    left.barh(
        names[::-1], [statistics.median(samples[name]) / 1000 for name in names[::-1]], color="tab:blue"
    )
    left.set_xlabel("µs a page (CPU time, median)")
    density = samples["payload_utilisation_over_time"]
    middle.plot(range(1, len(density) + 1), density, marker="o")
    middle.axhline(0.92, color="grey", linestyle="--")
    middle.set_ylim(0.8, 1)
    middle.set_xlabel("capacities overwritten")
    middle.set_ylabel("payload / arena")
    traces = sorted({each.name.rsplit("optimal_")[1] for each in records if "optimal_" in each.name})
    for offset, (peer, label) in enumerate((("", "store"), ("lru_", "LRU"), ("optimal_", "Belady"))):
        heights = [samples[f"hit_ratio_{peer}{trace}"][0] for trace in traces]
        right.bar([at + offset * 0.27 for at in range(len(traces))], heights, 0.25, label=label)
    right.set_xticks([at + 0.27 for at in range(len(traces))], traces)
    right.set_ylabel("hit ratio")
    right.legend()
    figure.suptitle(machine())
    figure.tight_layout()
    figure.savefig(DIRECTORY / "store.svg")


def main() -> None:
    build()
    records: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="tmem-corpus-") as directory:
        pages = Path(directory) / "pages"
        corpus.write(pages)
        samples = measure(pages, "micro", "threads", "churn", "recovery", "traces", "scale")
        records += of_codec(samples)
        records += of_threads(samples)
        records += of_memory(samples) + of_traces(samples) + of_scale(samples)
        records.append(of_duplicates())
        for part in (of_zram, of_sockets):
            try:
                records += part(pages)
            except SkippedError as reason:
                print(f"skipped {part.__name__.removeprefix('of_')}: {reason}", file=sys.stderr)
    publish("store", records)
    draw(records, samples)


if __name__ == "__main__":
    main()
