"""What goes wrong outside our control is still one line and an exit code, in every program."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path

import pytest
from tmem_host.cli.context import Context
from tmem_host.cli.main import run
from tmem_host.config import TmemdConfig, load
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm import images, libvirtd, machine, state
from tmem_host.vm.request import VmRequest
from tmem_host.vm.state import VmState

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user who is not root, and the directory of VMs; libvirtd's records cannot be written."""
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setenv("TMEM_VM_DIRECTORY", str(tmp_path))
    return tmp_path


def record(directory: Path, name: str) -> VmState:
    recorded = VmState(
        name=name,
        image="mini",
        cid=100,
        memory_bytes=1,
        cpus=1,
        virt="tcg",
        virt_reason="r",
        transport="vhost-user",
        host_key="k",
    )
    (directory / name).mkdir()
    state.save(recorded)
    return recorded


def test_who_is_not_root_brings_no_vm_up(
    nobody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del nobody
    # A libvirtd of root's runs: its record is there, and not this user's to lock or to end.
    record_file = tmp_path / "supervisor.json"
    record_file.write_text("{}")
    monkeypatch.setattr(libvirtd, "_RECORD", record_file)
    monkeypatch.setattr(libvirtd, "_USERS", tmp_path / "none" / "users")
    monkeypatch.setattr(images, "get", lambda _: None)
    with pytest.raises(OperatorError, match="needs root") as caught:
        machine.up(VmRequest(name="a", image="mini"))
    assert caught.value.code is ExitCode.PRIVILEGE


def test_who_is_not_root_takes_no_vm_down(nobody: Path) -> None:
    recorded = record(nobody, "a")
    with pytest.raises(OperatorError, match="needs root") as caught:
        machine.down("a")
    assert caught.value.code is ExitCode.PRIVILEGE
    assert state.every() == [recorded]


def test_a_record_of_another_version_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMEM_VM_DIRECTORY", str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/vm.json").write_text('{"name": "a"}')
    for line in ("vm list", "vm console a", "vm down a"):
        assert run(line.split()) == ExitCode.FAILED
        captured = capsys.readouterr()
        assert captured.err.startswith("tmemctl: VM 'a': its record is not to be understood: ")
        assert f"rm -r {tmp_path}/a" in captured.err
        assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x"), ExitCode.PRIVILEGE, "/x: Permission"),
        (OSError(errno.ENOSPC, "No space left on device", "/y"), ExitCode.NO_SPACE, "/y: No space"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/z"), ExitCode.FAILED, "/z: Not a directory"),
        (ValueError("two\nlines"), ExitCode.FAILED, "unexpected failure: ValueError: two lines"),
    ],
)
def test_what_nobody_expected_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: ExitCode,
    says: str,
) -> None:
    def fail(_: Context) -> None:
        raise error

    monkeypatch.delenv("TMEM_TRACEBACK", raising=False)
    monkeypatch.setattr(Context, "client", fail)
    assert run(["stats", "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(f"tmemctl: {says}")
    assert captured.err.count("\n") == 1
    monkeypatch.setenv("TMEM_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run(["stats"])


@pytest.mark.parametrize("module", ["tmem_host.service.main", "tmem_host.controller.main"])
def test_a_daemons_unknown_option_is_one_line(module: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", module, "--nosuch"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == ExitCode.USAGE
    assert re.fullmatch(r"tmem\S+: No such option.* \(try: tmem\S+ --help\)\n", ended.stderr)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is not UTF-8 text"),
        (lambda _: None, "cannot be read: No such file or directory"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named_once(
    tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    path = tmp_path / "tmemd.toml"
    make(path)
    with pytest.raises(OperatorError) as caught:
        load(path, TmemdConfig)
    assert caught.value.code is ExitCode.USAGE
    assert str(caught.value).startswith(f"{path} {says}")
    assert str(caught.value).count(str(path)) == 1


def test_the_keeper_refuses_to_be_stopped_by_hand() -> None:
    # systemd ignores the setting, with no more than a line in the log, in any other section.
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(ROOT / "host/systemd/tmem-keeper.service")
    assert unit["Unit"]["RefuseManualStop"] == "yes"
