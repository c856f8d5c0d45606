"""tmemctl's commands against a tmemd in memory: what they ask, print and exit with."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tmem_host.api.types import Policy
from tmem_host.cli.context import Context
from tmem_host.cli.main import COMMANDS, run
from tmem_host.errors import ExitCode
from unit.tmemd_in_memory import Tmemd, pool, vm

MIB = 1 << 20


@pytest.fixture
def tmemd(monkeypatch: pytest.MonkeyPatch) -> Tmemd:
    made = Tmemd(registered={"a": vm("a", quota_bytes=100 * MIB), "b": vm("b", quota_bytes=5 * MIB)})
    monkeypatch.setattr(Context, "client", lambda _: made)
    return made


def test_quota_set_pins_and_unpin_hands_back(tmemd: Tmemd, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quota", "set", "a", "64M"]) == 0
    assert tmemd.registered["a"].quota_bytes == 64 * MIB
    assert tmemd.registered["a"].pinned
    assert "a: quota 64 MiB, pinned" in capsys.readouterr().out
    assert run(["quota", "set", "a", "--unpin"]) == 0
    assert not tmemd.registered["a"].pinned
    assert tmemd.registered["a"].quota_bytes == 64 * MIB
    assert run(["quota", "set", "a", "--weight", "7", "--min", "8M"]) == 0
    assert (tmemd.registered["a"].weight, tmemd.registered["a"].min_bytes) == (7, 8 * MIB)
    assert not tmemd.registered["a"].pinned


def test_quota_get_as_text_and_json(tmemd: Tmemd, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quota", "get"]) == 0
    assert "100 MiB" in capsys.readouterr().out
    assert run(["quota", "get", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(tmemd.registered)
    assert run(["quota", "get", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quota_bytes"] == 5 * MIB


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("quota get nope", ExitCode.NOT_FOUND, "VM 'nope': not registered"),
        ("quota set a -5M", ExitCode.USAGE, "'-5M' is not a size; write for instance 512M"),
        ("quota set a lots", ExitCode.USAGE, "'lots' is not a size"),
        ("quota set a 1001M", ExitCode.USAGE, "VM 'a': 1001 MiB is more than tmemd may lend, 1000 MiB"),
        ("quota set a", ExitCode.USAGE, "nothing to set"),
        ("quota set", ExitCode.USAGE, "Missing argument 'VM'"),
        ("quota set a 5M --weight 0", ExitCode.USAGE, "0 is not in the range"),
        ("pool list nope", ExitCode.NOT_FOUND, "VM 'nope'"),
        ("policy set clever", ExitCode.NOT_FOUND, "no policy is called 'clever'"),
        ("policy set smart-alloc percent=1000", ExitCode.USAGE, "from 0.1 to 100"),
        ("policy set smart-alloc percent", ExitCode.USAGE, "not of the form NAME=VALUE"),
        ("policy set smart-alloc percent=x", ExitCode.USAGE, "'x' is not a number"),
        ("vm register c --cid 2", ExitCode.CONFLICT, "VM 'c': CID 2 is the host's"),
        ("vm register c --quota much", ExitCode.USAGE, "'much' is not a size"),
        ("vm unregister nope", ExitCode.NOT_FOUND, "VM 'nope'"),
        ("freeze nope", ExitCode.NOT_FOUND, "VM 'nope'"),
        ("reclaim a much", ExitCode.USAGE, "'much' is not a size"),
        ("nonsense", ExitCode.USAGE, "No such command 'nonsense'"),
        ("stats --interval 0", ExitCode.USAGE, "--interval"),
    ],
)
def test_bad_input_is_one_line_and_a_code(
    tmemd: Tmemd, capsys: pytest.CaptureFixture[str], line: str, code: ExitCode, says: str
) -> None:
    before = dict(tmemd.registered)
    assert run(line.split()) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("tmemctl: ")
    assert captured.out == ""
    assert tmemd.registered == before


def test_without_tmemd_every_command_says_so(tmemd: Tmemd, capsys: pytest.CaptureFixture[str]) -> None:
    tmemd.running = False
    for line in (
        "quota get",
        "quota set a 1M",
        "pool list",
        "stats",
        "policy get",
        "freeze a",
        "reclaim a 1M",
    ):
        assert run(line.split()) == ExitCode.UNAVAILABLE
        assert capsys.readouterr().err == "tmemctl: tmemd is not running\n"


def test_without_a_socket_the_real_client_says_where_it_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--socket", str(tmp_path / "no.sock"), "stats"]) == ExitCode.UNAVAILABLE
    assert f"nothing answers on {tmp_path}/no.sock" in capsys.readouterr().err


def test_stats_and_pools(tmemd: Tmemd, capsys: pytest.CaptureFixture[str]) -> None:
    tmemd.registered["a"] = vm("a", puts_accepted=12345, frozen=True, pinned=True)
    tmemd.pool_list["a"] = [pool("a", 41)]
    assert run(["stats"]) == 0
    out = capsys.readouterr().out
    assert "12345" in out
    assert "pinned, frozen" in out
    assert run(["stats", "a", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["vms"][0]["puts_accepted"] == 12345
    assert answer["status"]["capacity_bytes"] == 1000 * MIB
    assert run(["pool", "list"]) == 0
    out = capsys.readouterr().out
    assert "persistent, private" in out
    assert "41" in out
    assert run(["pool", "list", "b"]) == 0
    assert capsys.readouterr().out == "no pools\n"


def test_register_and_unregister(tmemd: Tmemd, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["vm", "register", "c", "--cid", "7", "--quota", "8M", "--weight", "3"]) == 0
    assert "c: registered, quota 8 MiB" in capsys.readouterr().out
    assert tmemd.registered["c"].weight == 3
    assert run(["vm", "unregister", "c"]) == 0
    assert "c" not in tmemd.registered


def test_freeze_thaw_reclaim(tmemd: Tmemd) -> None:
    assert run(["freeze", "a"]) == 0
    assert tmemd.registered["a"].frozen
    assert run(["thaw", "a"]) == 0
    assert not tmemd.registered["a"].frozen
    assert run(["reclaim", "a", "1M"]) == 0
    assert tmemd.reclaims == [("a", 256)]


def test_policy(tmemd: Tmemd, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policy", "set", "smart-alloc", "percent=4"]) == 0
    assert tmemd.chosen == Policy(name="smart-alloc", parameters={"percent": 4.0})
    assert run(["policy", "get"]) == 0
    assert capsys.readouterr().out.endswith("smart-alloc percent=4.0\n")
    assert run(["policy", "list", "--json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == [
        "static",
        "greedy",
        "smart-alloc",
    ]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_in_the_table_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert "Usage: tmemctl" in capsys.readouterr().out


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys; from tmem_host.cli.main import run; run(['--help']);"
        "print({'httpx', 'rich', 'paramiko', 'libvirt', 'msgspec'} & set(sys.modules))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    assert time.monotonic() - started < 2
