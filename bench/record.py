"""Results of benchmarks: records, their table and their file."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

DIRECTORY = Path(__file__).resolve().parents[1] / "build" / "bench"


@dataclass(frozen=True)
class Record:
    """One figure beside its peer's.

    `ours` and `peer_value` are in `unit`; `ratio` is ours / peer_value, or `ours` where there is no peer.
    `goal` is what `ratio` is to reach, in the direction of `better`; `None` where none was set.
    """

    name: str
    unit: str
    ours: float
    peer: str | None
    peer_value: float | None
    ratio: float
    better: Literal["lower", "higher"]
    goal: float | None
    met: bool | None
    samples: int


def record(
    name: str,
    unit: str,
    ours: float,
    *,
    peer: str | None = None,
    peer_value: float | None = None,
    ratio: float | None = None,
    better: Literal["lower", "higher"] = "lower",
    goal: float | None = None,
    samples: int = 1,
) -> Record:
    """A record; `ratio` is computed unless the samples were paired and it is known better."""
    if ratio is None:
        ratio = ours / peer_value if peer_value else ours
    met = None if goal is None else (ratio <= goal if better == "lower" else ratio >= goal)
    return Record(name, unit, ours, peer, peer_value, ratio, better, goal, met, samples)


def machine() -> str:
    """The processor and kernel, for captions."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown processor",
    )
    return f"{cpu}, Linux {platform.release()}"


def publish(benchmark: str, records: Sequence[Record], *, keep: tuple[str, ...] = ()) -> Path:
    """Print the table and write `build/bench/BENCHMARK.json`; returns its path.

    Records of an earlier run whose names begin with one of `keep` stay in the file.
    """
    table = Table(title=f"{benchmark} ({machine()})")
    for column in ("figure", "ours", "peer", "peer's", "ratio", "goal", ""):
        table.add_column(column, justify="left" if column in {"figure", "peer"} else "right")
    for each in records:
        goal = "" if each.goal is None else f"{'≤' if each.better == 'lower' else '≥'} {each.goal:g}"
        mark = {None: "", True: "met", False: "MISSED"}[each.met]
        peer = "" if each.peer_value is None else f"{each.peer_value:.4g}"
        ours = f"{each.ours:.4g} {each.unit}".strip()
        table.add_row(each.name, ours, each.peer or "", peer, f"{each.ratio:.3g}", goal, mark)
    Console(width=140).print(table)
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    path = DIRECTORY / f"{benchmark}.json"
    written = [asdict(each) for each in records]
    if keep and path.exists():
        written += [each for each in json.loads(path.read_text()) if each["name"].startswith(keep)]
    path.write_text(json.dumps(written, indent=1) + "\n")
    return path
