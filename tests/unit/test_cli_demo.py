"""The demonstration's verdict, report and search for leftovers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tmem_host.demo import leftovers
from tmem_host.demo.report import Report, VmReport, failures, write

COUNTERS = {key: 7 for key in VmReport.__struct_fields__ if key not in ("name", "workload", "seconds")}
GOOD = msgspec.convert({"name": "a", "workload": "fio", "seconds": 1.5, **COUNTERS}, VmReport)


def test_the_report_has_exactly_the_promised_fields(tmp_path: Path) -> None:
    path = tmp_path / "demo" / "report.json"
    write(Report(virt="tcg", transport="vhost-user", seconds=2.0, vms=(GOOD, GOOD)), path)
    written = msgspec.json.decode(path.read_bytes())
    assert list(written) == ["virt", "transport", "seconds", "vms"]
    assert list(written["vms"][0]) == [
        "name",
        "workload",
        "seconds",
        "puts_accepted",
        "puts_refused",
        "gets_hit",
        "gets_missed",
        "pages_flushed",
        "pages_evicted",
        "stored_bytes",
        "raw_bytes",
        "quota_bytes",
        "quota_changes",
        "swap_pages_in",
        "swap_pages_out",
        "sectors_read",
        "sectors_written",
    ]
    assert [each.name for each in path.parent.iterdir()] == ["report.json"]


def test_a_good_run_passes() -> None:
    assert failures([GOOD, GOOD]) == []
    calm = msgspec.structs.replace(GOOD, name="b", puts_refused=0, quota_changes=0)
    assert failures([GOOD, calm]) == [], "one VM of the two is enough for refusals and quota changes"


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("gets_hit", "VM a: gets hit is zero"),
        ("swap_pages_in", "VM a: swap pages in is zero"),
        ("swap_pages_out", "VM a: swap pages out is zero"),
        ("puts_accepted", "VM a: puts accepted is zero"),
        ("puts_refused", "no VM had a put refused"),
        ("quota_changes", "no quota was ever changed"),
    ],
)
def test_what_did_not_happen_is_named(field: str, says: str) -> None:
    bad = msgspec.structs.replace(GOOD, **{field: 0})
    found = failures([bad])
    assert len(found) == 1
    assert found[0].startswith(says)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run"
    path.mkdir()
    yield path


def test_leftovers_are_found_and_waited_for(directory: Path) -> None:
    by_argument = subprocess.Popen(["sleep", "60", "--", f"{directory}/x"], stderr=subprocess.DEVNULL)
    by_argument.wait()  # sleep refuses the argument: an ended process is no leftover
    held = subprocess.Popen(["sh", "-c", "sleep 60; :", f"{directory}/arena"])
    marked = subprocess.Popen(["sleep", "60"], env={**os.environ, leftovers.ENVIRONMENT_KEY: str(directory)})
    try:
        found = leftovers.find(directory)
        assert len(found) >= 3
        assert any(f"process {held.pid} " in line for line in found)
        assert any(f"process {marked.pid} " in line for line in found)
        assert f"{directory} still exists" in found
    finally:
        subprocess.run(["pkill", "-P", str(held.pid)], check=False)
        for process in (held, marked):
            process.kill()
            process.wait()
    directory.rmdir()
    assert leftovers.wait_until_none(directory, deadline_s=5) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_mount_is_a_leftover(directory: Path) -> None:
    point = directory / "mnt"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(point)], check=True)
    try:
        assert f"{point} is still mounted" in leftovers.find(directory)
    finally:
        subprocess.run(["umount", str(point)], check=True)
