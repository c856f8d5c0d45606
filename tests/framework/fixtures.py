"""Fixtures of all tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from framework.daemon import ROOT, Tmemd


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A temporary directory whose path is short enough for sockets, on tmpfs where there is one."""
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="tm-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def start_tmemd(short_directory: Path) -> Iterator[Callable[..., Tmemd]]:
    """Starts `tmemd` with a configuration; all are stopped at the end."""
    with ExitStack() as stack:
        count = 0

        def start(**options: str) -> Tmemd:
            nonlocal count
            count += 1
            directory = short_directory / str(count)
            directory.mkdir()
            return stack.enter_context(Tmemd(directory, **options))

        yield start


@pytest.fixture
def tmemd(start_tmemd: Callable[..., Tmemd]) -> Tmemd:
    """A `tmemd` of 64 MiB with a VM `a` registered."""
    daemon = start_tmemd()
    daemon.add_vm("a")
    return daemon


@pytest.fixture(scope="session")
def bench_program() -> Path:
    """`tmem-bench`, whose `check` is what every transport is held to."""
    search = f"{os.environ['PATH']}:{os.environ.get('CARGO_HOME', Path.home() / '.cargo')}/bin"
    build = ["cargo", "build", "--quiet", "--profile", "test-fast", "-j2", "-p", "tmem-bench"]
    subprocess.run(build, cwd=ROOT, env=os.environ | {"PATH": search}, check=True)
    return ROOT / "target/test-fast/tmem-bench"
