"""`tmemctl doctor`: every check answers, whatever the host lacks, and a failed one decides the exit code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tmem_host.cli import checks
from tmem_host.cli.checks import CHECKS, Result, run_all
from tmem_host.cli.context import Context
from tmem_host.cli.main import run
from tmem_host.errors import OperatorError


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path / "no.sock", "test:///default")


def test_every_check_answers_for_this_host(context: Context) -> None:
    results = {each.name: each for each in run_all(context)}
    assert list(results) == list(CHECKS)
    assert results["tmemd"].state == "warn", "no tmemd is no failure: an operator may be about to start it"
    assert results["tmemd"].hint
    assert results["libvirt"].state == "ok"
    assert all(each.found for each in results.values())
    assert all(each.hint for each in results.values() if each.state != "ok")


def test_a_missing_qemu_fails_with_the_package_to_install(
    context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    results = {each.name: each for each in run_all(context)}
    assert results["qemu"].state == "fail"
    assert "apt-get install qemu-system-x86" in results["qemu"].hint


def test_who_is_not_root_is_told_why_root(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    result = checks.CHECKS["root"](context)
    assert (result.state, result.found) == ("fail", "no, user 1000")


def test_a_check_that_raises_is_a_result(monkeypatch: pytest.MonkeyPatch, context: Context) -> None:
    def breaks(_: Context) -> Result:
        raise OperatorError("no program", hint="install it")

    monkeypatch.setitem(checks.CHECKS, "vsock", breaks)
    results = {each.name: each for each in run_all(context)}
    assert results["vsock"] == Result("fail", "vsock", "no program", "install it")


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_exit_code_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str, code: int
) -> None:
    monkeypatch.setattr(checks, "CHECKS", {"one": lambda _: Result(state, "one", "found", "hint")})  # type: ignore[arg-type]
    assert run(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == [
        {"state": state, "name": "one", "found": "found", "hint": "hint"}
    ]
