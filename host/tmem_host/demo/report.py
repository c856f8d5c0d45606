"""What the demonstration found: `report.json`, the final table, and whether it succeeded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tmem_host.cli.output import table
from tmem_host.units import format_size

if TYPE_CHECKING:
    from rich.table import Table


class VmReport(msgspec.Struct, frozen=True, kw_only=True):
    """One VM. Counters are tmemd's; `swap_pages_*` the guest's own, `sectors_*` QEMU's for all its disks."""

    name: str
    workload: str
    seconds: float
    """Run time of the workload."""
    puts_accepted: int
    puts_refused: int
    gets_hit: int
    gets_missed: int
    pages_flushed: int
    pages_evicted: int
    stored_bytes: int
    """Host memory its pages took when the workload ended."""
    raw_bytes: int
    """The same pages before compression."""
    quota_bytes: int
    quota_changes: int
    swap_pages_in: int
    swap_pages_out: int
    sectors_read: int
    sectors_written: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole demonstration."""

    virt: str
    """`kvm` or `tcg`."""
    transport: str
    """How vsock reached the VMs."""
    seconds: float
    """From the start of the VMs to the end of the workloads."""
    vms: tuple[VmReport, ...]


def write(report: Report, path: Path) -> None:
    """Write the report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    os.replace(part, path)  # noqa: PTH105  # atomic, and says so


def failures(vms: Sequence[VmReport]) -> list[str]:
    """What should have happened and did not, one line each; empty if the demonstration shows what it
    should."""
    missing = [
        f"VM {vm.name}: {what} is zero"
        for vm in vms
        for what, count in (
            ("puts accepted", vm.puts_accepted),
            ("gets hit", vm.gets_hit),
            ("swap pages out", vm.swap_pages_out),
            ("swap pages in", vm.swap_pages_in),
        )
        if count == 0
    ]
    if not any(vm.puts_refused for vm in vms):
        missing.append("no VM had a put refused: memory was never short at the host")
    if not any(vm.quota_changes for vm in vms):
        missing.append("no quota was ever changed")
    return missing


def final_table(report: Report) -> Table:
    """The table at the end: a line for each figure, a column for each VM."""
    rows = [
        ("workload", [vm.workload for vm in report.vms]),
        ("run time", [f"{vm.seconds:.0f} s" for vm in report.vms]),
        ("puts accepted", [f"{vm.puts_accepted:,}" for vm in report.vms]),
        ("puts refused", [f"{vm.puts_refused:,}" for vm in report.vms]),
        ("gets hit", [f"{vm.gets_hit:,}" for vm in report.vms]),
        ("gets missed", [f"{vm.gets_missed:,}" for vm in report.vms]),
        ("pages flushed", [f"{vm.pages_flushed:,}" for vm in report.vms]),
        ("pages evicted", [f"{vm.pages_evicted:,}" for vm in report.vms]),
        ("stored, as pages", [format_size(vm.raw_bytes) for vm in report.vms]),
        ("stored, compressed", [format_size(vm.stored_bytes) for vm in report.vms]),
        ("quota", [format_size(vm.quota_bytes) for vm in report.vms]),
        ("quota changes", [f"{vm.quota_changes:,}" for vm in report.vms]),
        ("pages swapped in", [f"{vm.swap_pages_in:,}" for vm in report.vms]),
        ("pages swapped out", [f"{vm.swap_pages_out:,}" for vm in report.vms]),
        ("sectors read", [f"{vm.sectors_read:,}" for vm in report.vms]),
        ("sectors written", [f"{vm.sectors_written:,}" for vm in report.vms]),
    ]
    return table(("", *(vm.name for vm in report.vms)), [(heading, *values) for heading, values in rows])
