"""Part (a) of the transport's benchmark: over a unix socket on the host."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from record import Record, record
from transport_program import BATCHES, ROUNDS, Run, Samples, collect, median, program, serving, waiting_for

_GET_BYTES = (44, 4128)
_PUT_BYTES = (24 + 28 + 4096, 25)


@contextmanager
def _peer(command: list[str], socket: Path) -> Iterator[None]:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([*command, str(socket)], stdout=quiet, stderr=quiet)
    try:
        waiting_for(socket, process)
        yield
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class _Peers:
    """Sockets of the peers; Redis and memcached are left out where they are not installed."""

    pong: Path
    keyvalue: dict[str, Path]


@contextmanager
def _peers(directory: Path) -> Iterator[_Peers]:
    with ExitStack() as stack:
        pong = directory / "pong"
        process = subprocess.Popen([str(program()), "pong", f"unix:{pong}"])
        stack.callback(process.wait)
        stack.callback(process.kill)
        waiting_for(pong, process)
        keyvalue = {}
        commands = {
            "redis": ["redis-server", "--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"],
            "memcached": ["memcached", "-u", "root", "-t", "1", "-m", "1024", "-s"],
        }
        for name, command in commands.items():
            try:
                stack.enter_context(_peer(command, directory / name))
                keyvalue[name] = directory / name
            except FileNotFoundError:
                print(f"without {name}: {command[0]} is not installed")
        yield _Peers(pong, keyvalue)


def measure(directory: Path) -> Samples:
    """Run everything `ROUNDS` times, interleaved."""
    samples: Samples = {}
    with ExitStack() as stack:
        stack.enter_context(serving(directory, "a"))
        peers = stack.enter_context(_peers(directory))
        tmem = f"unix:{directory}/a/vsock.sock_29805"
        singles: dict[str, Run] = {}
        for work, (there, back) in (("get", _GET_BYTES), ("put", _PUT_BYTES)):
            sizes = ["--there", str(there), "--back", str(back)]
            singles[f"ping_{work}"] = ["ping", f"unix:{peers.pong}", *sizes]
            singles[f"tmem_{work}"] = ["load", tmem, "--work", work]
            for name, socket in peers.keyvalue.items():
                singles[f"{name}_{work}"] = ["keyvalue", f"unix:{socket}", "--server", name, "--work", work]
        batches: dict[str, Run] = {}
        for work in ("get", "put"):
            batches[f"store_{work}"] = ["store", "--work", work]
            for batch in BATCHES:
                several = ["--batch", str(batch), "--seconds", "0.7", "--count", "1000000"]
                load = ["load", tmem, "--work", work, *several]
                batches[f"tmem_{work}{batch}"] = [*load, "--in-flight", str(max(2, 64 // batch))]
                for name, socket in peers.keyvalue.items():
                    arguments = ["keyvalue", f"unix:{socket}", "--server", name, "--work", work, *several]
                    batches[f"{name}_{work}{batch}"] = arguments
        for _ in range(ROUNDS):
            for name, run in (singles | batches).items():
                collect(samples, name, run)
    return samples


def records(samples: Samples) -> list[Record]:
    """The figures of part (a)."""
    found = []
    for work in ("get", "put"):
        ours, bare = samples[f"tmem_{work}"], samples[f"ping_{work}"]
        for percentile in ("p50", "p99", "p999"):
            key = f"{percentile}_us"
            ratios = [a[key] / b[key] for a, b in zip(ours, bare, strict=True)]
            found.append(
                record(
                    f"unix_{work}_{percentile}_vs_pingpong",
                    "µs",
                    median(ours, key),
                    peer="bare ping-pong",
                    peer_value=median(bare, key),
                    ratio=statistics.median(ratios),
                    goal=1.15 if (work, percentile) == ("get", "p50") else None,
                    samples=sum(int(each["samples"]) for each in ours),
                )
            )
        best = min(
            (name for name in ("redis", "memcached") if f"{name}_{work}" in samples),
            key=lambda name: median(samples[f"{name}_{work}"], "p50_us"),
            default=None,
        )
        if best is not None:
            found.append(
                record(
                    f"unix_{work}_vs_best_peer",
                    "µs",
                    median(ours, "p50_us"),
                    peer=best,
                    peer_value=median(samples[f"{best}_{work}"], "p50_us"),
                    goal=1.0,
                    samples=len(ours),
                )
            )
        found += _batches(samples, work)
    return found


def _batches(samples: Samples, work: str) -> list[Record]:
    found = []
    key = "pages_per_s"
    for batch in BATCHES:
        ours = samples[f"tmem_{work}{batch}"]
        store = samples[f"store_{work}"]
        ratios = [a[key] / b[key] for a, b in zip(ours, store, strict=True)]
        found.append(
            record(
                f"unix_batch{batch}_{work}_vs_store",
                "pages/s",
                median(ours, key),
                peer="the store, no transport",
                peer_value=median(store, key),
                ratio=statistics.median(ratios),
                better="higher",
                goal=0.9 if (work, batch) == ("get", 32) else None,
                samples=len(ours),
            )
        )
        peers = {name: samples.get(f"{name}_{work}{batch}") for name in ("redis", "memcached")}
        found += [
            record(
                f"unix_batch{batch}_{work}_vs_{name}",
                "pages/s",
                median(ours, key),
                peer=name,
                peer_value=median(peer, key),
                better="higher",
                samples=len(ours),
            )
            for name, peer in peers.items()
            if peer
        ]
    return found
