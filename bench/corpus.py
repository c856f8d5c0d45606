"""Real pages to measure with: executables, text and the heap of a running program."""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

PAGE_BYTES = 4096
_LARGEST_BYTES = 64 << 20


def _file_pages(paths: Iterable[Path], pages_each: int) -> list[bytes]:
    pages = []
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                content = file.read(pages_each * PAGE_BYTES)
            pages += _split(content)
    return pages


def _split(content: bytes) -> list[bytes]:
    return [content[at : at + PAGE_BYTES] for at in range(0, len(content) - PAGE_BYTES + 1, PAGE_BYTES)]


def _heap_pages() -> list[bytes]:
    """Pages of this process's own heap, after giving it something to hold."""
    held = json.loads(
        json.dumps(
            [
                {
                    "id": i,
                    "name": f"user{i}",
                    "scores": [i / divisor for divisor in (3, 7, 11, 13, 17)],
                    "key": str(i) * 3,
                }
                for i in range(60_000)
            ]
        )
    )
    pages = anonymous_pages("self")
    assert held
    return pages


def anonymous_pages(process: int | Literal["self"]) -> list[bytes]:
    """Pages of a process that are in no file: what a kernel short of memory swaps out."""
    pages: list[bytes] = []
    with Path(f"/proc/{process}/mem").open("rb", 0) as memory:
        for line in Path(f"/proc/{process}/maps").read_text().splitlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(\[heap\])?$", line)
            if match is None:
                continue
            start, end = int(match[1], 16), int(match[2], 16)
            if end - start <= _LARGEST_BYTES:
                memory.seek(start)
                pages += _split(memory.read(end - start))
    return pages


def write(path: Path, pages_each: int = 4096) -> int:
    """Write up to `pages_each` pages of each sort to `path`, shuffled; returns how many pages there are."""
    random.seed(1)
    libraries = Path(f"/usr/lib/{sysconfig.get_config_var('MULTIARCH') or ''}")
    executables = [*Path("/usr/bin").iterdir(), *libraries.glob("*.so*")]
    executables = sorted(
        (path for path in executables if path.is_file()), key=lambda each: -each.stat().st_size
    )
    texts = [*Path("/usr/lib").glob("python3*/**/*.py"), *Path("/usr/share").glob("**/*.txt")]
    sorts = [_file_pages(executables[:60], 400), _file_pages(sorted(texts), 60), _heap_pages()]
    chosen: list[bytes] = []
    for pages in sorts:
        random.shuffle(pages)
        chosen += pages[:pages_each]
    random.shuffle(chosen)
    path.write_bytes(b"".join(chosen))
    return len(chosen)
