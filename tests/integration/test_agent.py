"""The agent as it runs in a guest: a real tmemd, a real `tmem-guest fs` on FUSE, a unix socket for vsock."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

import pytest
from framework.daemon import ROOT, Tmemd
from integration.fs_mount import program
from tmem_guest import mounts
from tmem_guest.child import start_time
from tmem_guest.errors import ExitCode
from tmem_host.api.types import VmChange

T = TypeVar("T")
DEADLINE_S = 20.0
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "guest")}
PAGES = 512  # of the file that is read

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="mounting needs root and /dev/fuse"
)


def until(probe: Callable[[], T], what: str) -> T:
    """The first true answer of `probe`, within the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.05)
    return answer


class Agent:
    """`tmem-agent run` and its log."""

    def __init__(self, config: Path, log: Path) -> None:
        self._log = log
        self._output: IO[bytes] = log.open("ab")
        argv = [sys.executable, "-m", "tmem_guest.main", "run", f"--config={config}"]
        self.process = subprocess.Popen(argv, env=ENVIRONMENT, stdout=self._output, stderr=self._output)

    def said(self, text: str) -> bool:
        return text in self._log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._output.close()

    def end(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.kill()


class Stack:
    """A tmemd with one VM, `a`, and that VM's agent, to be started."""

    def __init__(self, tmemd: Tmemd, data: Path) -> None:
        self.tmemd = tmemd
        self.data = data
        self.runtime = tmemd.directory / "run"
        self.config = tmemd.directory / "agent.toml"
        self.log = tmemd.directory / "agent.log"
        self.agent: Agent | None = None
        self.configure("")

    def configure(self, more: str) -> None:
        """Write agent.toml, with `more` at its end."""
        self.config.write_text(
            f'endpoint = "unix:{self.tmemd.vm_socket("a")}"\n'
            f'runtime_directory = "{self.runtime}"\n'
            f'tmem_guest = "{program()}"\n'
            f"report_interval_s = 0.1\n{more}"
        )

    def start_agent(self) -> Agent:
        self.agent = Agent(self.config, self.log)
        until(lambda: self.run("status").returncode == 0, "the agent answers")
        return self.agent

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of tmem-agent."""
        argv = [sys.executable, "-m", "tmem_guest.main", f"--config={self.config}", *arguments]
        return subprocess.run(
            argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S * 3, check=False
        )

    def status(self) -> dict[str, dict[str, object]]:
        done = self.run("status", "--json")
        assert done.returncode == 0, done.stderr
        answer: dict[str, dict[str, object]] = json.loads(done.stdout)
        return answer

    def mount(self) -> dict[str, object]:
        """The one mount, from the status."""
        mounts_: object = self.status()["mounts"]
        assert isinstance(mounts_, list)
        assert len(mounts_) == 1
        one: dict[str, object] = mounts_[0]
        return one

    def mount_pid(self) -> int:
        pid = self.mount()["pid"]
        assert isinstance(pid, int)
        return pid

    def up(self) -> bool:
        one = self.mount()
        return one["state"] == "up" and one["counters"] is not None

    def connected(self) -> bool:
        return bool(self.status()["host"]["connected"])


@pytest.fixture
def stack(tmemd: Tmemd) -> Iterator[Stack]:
    """A running tmemd, and an agent to be started; everything is taken away afterwards."""
    # On a disk, for tmpfs tells no change times that a cache can rely on.
    data = Path(tempfile.mkdtemp(prefix="tm-", dir="/var/tmp"))
    made = Stack(tmemd, data)
    try:
        yield made
    finally:
        if made.agent is not None and made.agent.process.poll() is None:
            made.agent.end()
        left_behind = [mount.path for mount in mounts.table() if mount.path.startswith(str(data))]
        for path in left_behind:
            mounts.detach(path)
        if made.log.exists():
            print(made.log.read_text())
        shutil.rmtree(data)
        assert not left_behind


def fill(path: Path) -> str:
    """Write a file and drop it from the page cache; returns its checksum."""
    content = os.urandom(PAGES * 4096)
    path.write_bytes(content)
    drop(path)
    return hashlib.sha256(content).hexdigest()


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_mount_serves_files_and_the_host_hears_of_it(stack: Stack) -> None:
    expected = fill(stack.data / "file")
    stack.start_agent()
    done = stack.run("mount", str(stack.data))
    assert done.returncode == 0, done.stderr
    assert checksum(stack.data / "file") == expected
    drop(stack.data / "file")
    assert checksum(stack.data / "file") == expected

    counters = stack.mount()["counters"]
    assert isinstance(counters, dict)
    if counters["cacheable"]:
        until(lambda: "% hits" in stack.run("status").stdout, "the status shows a hit ratio")

        def reported() -> bool:
            with stack.tmemd.admin() as client:
                report = client.vm("a").report
            return report is not None and report.cache_hit_pages + report.cache_miss_pages >= PAGES

        until(reported, "the host has the counters")
    with stack.tmemd.admin() as client:
        report = client.vm("a").report
    assert report is not None
    assert report.mem_total_bytes > report.mem_available_bytes > 0

    done = stack.run("umount", str(stack.data))
    assert done.returncode == 0, done.stderr
    assert mounts.at(str(stack.data)) is None
    assert checksum(stack.data / "file") == expected


def test_a_mount_of_what_nobody_else_changes(stack: Stack) -> None:
    expected = fill(stack.data / "file")
    stack.start_agent()
    assert stack.run("mount", str(stack.data), "--changes", "none").returncode == 0
    counters = stack.mount()["counters"]
    assert isinstance(counters, dict)
    assert counters["changes"] == "none"
    assert checksum(stack.data / "file") == expected


def test_a_mount_elsewhere_and_from_the_configuration(stack: Stack) -> None:
    (stack.data / "lower").mkdir()
    (stack.data / "at").mkdir()
    expected = fill(stack.data / "lower/file")
    stack.configure(f'[[mount]]\ndirectory = "{stack.data}/lower"\nat = "{stack.data}/at"\n')
    agent = stack.start_agent()
    until(stack.up, "the mount is up")
    assert checksum(stack.data / "at/file") == expected
    assert agent.end() == 0
    assert mounts.at(f"{stack.data}/at") is None
    assert not list(stack.runtime.glob("*.sock"))


def test_a_killed_file_cache_is_mounted_again(stack: Stack) -> None:
    expected = fill(stack.data / "file")
    agent = stack.start_agent()
    assert stack.run("mount", str(stack.data)).returncode == 0
    first = stack.mount_pid()
    os.kill(first, signal.SIGKILL)
    until(lambda: stack.up() and stack.mount_pid() != first, "it is mounted again")
    assert checksum(stack.data / "file") == expected
    assert agent.said("was killed by SIGKILL")
    assert len([mount for mount in mounts.table() if mount.path == str(stack.data)]) == 1


def test_the_agents_death_does_not_unmount_and_the_next_one_takes_over(stack: Stack) -> None:
    expected = fill(stack.data / "file")
    stack.start_agent().kill()
    agent = stack.start_agent()
    assert stack.run("mount", str(stack.data)).returncode == 0
    pid = stack.mount_pid()
    began = start_time(pid)
    with (stack.data / "file").open("rb") as held:
        agent.kill()
        assert checksum(stack.data / "file") == expected
        second = stack.start_agent()
        until(stack.up, "the mount is known")
        assert (stack.mount_pid(), start_time(pid)) == (pid, began)
        assert second.said("taken over from an earlier agent")
        assert held.read(4096)
    assert stack.run("umount", str(stack.data)).returncode == 0
    until(lambda: not Path(f"/proc/{pid}").exists(), "its process is gone")


def test_who_unmounts_by_hand_is_left_alone(stack: Stack) -> None:
    agent = stack.start_agent()
    assert stack.run("mount", str(stack.data)).returncode == 0
    subprocess.run(["umount", str(stack.data)], check=True)
    until(lambda: stack.mount()["state"] == "ended", "the mount has ended")
    assert agent.said("unmounted by someone else")
    assert mounts.at(str(stack.data)) is None
    # And it can be mounted again.
    assert stack.run("mount", str(stack.data)).returncode == 0
    assert stack.up()


def test_a_mount_in_use_is_not_torn_away(stack: Stack) -> None:
    expected = fill(stack.data / "file")
    stack.start_agent()
    assert stack.run("mount", str(stack.data)).returncode == 0
    with (stack.data / "file").open("rb") as held:
        done = stack.run("umount", str(stack.data))
        assert done.returncode == ExitCode.CONFLICT
        assert f"fuser -vm {stack.data}" in done.stderr
        assert stack.up()
        done = stack.run("umount", "--lazy", str(stack.data))
        assert done.returncode == 0, done.stderr
        assert mounts.at(str(stack.data)) is None
        assert hashlib.sha256(held.read()).hexdigest() == expected


@pytest.mark.parametrize("existing", [False, True])
def test_refused_mounts(stack: Stack, existing: bool) -> None:
    (stack.data / "directory/below").mkdir(parents=True)
    (stack.data / "file").touch()
    stack.start_agent()
    if existing:
        assert stack.run("mount", str(stack.data / "directory")).returncode == 0
    cases = [
        (["none"], ExitCode.NOT_FOUND, "does not exist"),
        (["file"], ExitCode.USAGE, "not a directory"),
        (["directory", "--at", str(stack.data / "none")], ExitCode.NOT_FOUND, "does not exist"),
    ]
    if existing:
        cases += [
            (["directory"], ExitCode.CONFLICT, "already mounted"),
            (["directory/../directory"], ExitCode.CONFLICT, "already mounted"),
            (["directory/below"], ExitCode.CONFLICT, "which tmem serves already"),
            (["."], ExitCode.CONFLICT, "served by tmem already"),
        ]
    else:
        cases += [
            ([".", "--at", str(stack.data / "directory")], ExitCode.USAGE, "nested on itself"),
            (["directory/below", "--at", str(stack.data)], ExitCode.USAGE, "nested on itself"),
            (["/proc/sys"], ExitCode.USAGE, "no data to cache"),
            (["/"], ExitCode.FAILED, "root directory"),
        ]
    for arguments, code, said in cases:
        done = stack.run("mount", str(stack.data / arguments[0]), *arguments[1:])
        assert (done.returncode, said in done.stderr) == (code, True), (arguments, done.stderr)
    done = stack.run("umount", str(stack.data / "none"))
    assert done.returncode == ExitCode.NOT_FOUND


def test_refused_swap(stack: Stack) -> None:
    precious = stack.data / "precious"
    precious.write_bytes(b"not swap")
    (stack.data / "cached").mkdir()
    stack.start_agent()
    assert stack.run("mount", str(stack.data / "cached")).returncode == 0
    for arguments, code, said in [
        (["--size=lots"], ExitCode.USAGE, "is not a size"),
        (["--size=-1M"], ExitCode.USAGE, "is not a size"),
        (["--size=4096"], ExitCode.USAGE, "the least is 1M"),
        (["--size=2M", f"--file={precious}"], ExitCode.CONFLICT, "would be overwritten"),
        (["--size=2M", f"--file={stack.data}"], ExitCode.USAGE, "neither a regular file nor a disk"),
        (["--size=2M", f"--file={stack.data}/none/swap"], ExitCode.NOT_FOUND, "not a directory"),
        (["--size=2M", f"--file={stack.data}/cached/swap"], ExitCode.USAGE, "wait for itself"),
        (["--size=2M", "--priority=40000"], ExitCode.USAGE, "0 to 32767"),
    ]:
        done = stack.run("swap", "on", *arguments)
        assert (done.returncode, said in done.stderr) == (code, True), (arguments, done.stderr)
    assert precious.read_bytes() == b"not swap"
    assert stack.run("swap", "off").returncode == ExitCode.NOT_FOUND
    assert stack.run("swap", "status").stdout == "swap    off\n"


def test_a_disk_with_something_on_it_is_refused_as_a_swap_file(stack: Stack, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    stack.start_agent()
    attach = ["losetup", "--find", "--show", str(image)]
    disk = subprocess.run(attach, capture_output=True, text=True, check=True).stdout.strip()
    try:
        done = stack.run("swap", "on", "--size=2M", f"--file={disk}")
        assert (done.returncode, f"on {disk} (ext4)" in done.stderr) == (ExitCode.CONFLICT, True), done.stderr
        # Unmounted or not, nobody may have it.
        mount = tmp_path / "mount"
        mount.mkdir()
        subprocess.run(["mount", disk, mount], check=True)
        done = stack.run("swap", "on", "--size=2M", f"--file={disk}")
        subprocess.run(["umount", mount], check=True)
        assert (done.returncode, "cannot be had" in done.stderr) == (ExitCode.CONFLICT, True), done.stderr
    finally:
        subprocess.run(["losetup", "--detach", disk], check=True)
    assert Path(disk).is_block_device()
    subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True)


def test_the_host_comes_and_goes(stack: Stack) -> None:
    expected = fill(stack.data / "file")
    agent = stack.start_agent()
    assert stack.run("mount", str(stack.data)).returncode == 0
    until(stack.connected, "the host is connected")
    stack.tmemd.kill()
    until(lambda: not stack.connected(), "the host is missed")
    assert "is not connected" in stack.run("status").stdout
    drop(stack.data / "file")
    assert checksum(stack.data / "file") == expected
    stack.tmemd.start()
    until(stack.connected, "the host is connected again")
    assert agent.said("lost the host")


def test_without_a_host_the_agent_is_ready_and_says_so(stack: Stack) -> None:
    stack.tmemd.kill()
    stack.configure(f'[[mount]]\ndirectory = "{stack.data}"\n')
    expected = fill(stack.data / "file")
    agent = stack.start_agent()
    until(stack.up, "the mount is up")
    assert checksum(stack.data / "file") == expected
    until(lambda: agent.said("ready: host away"), "the agent says that it is ready without a host")


def test_notices_reach_the_agent(stack: Stack) -> None:
    agent = stack.start_agent()
    until(stack.connected, "the host is connected")
    with stack.tmemd.admin() as client:
        client.change_vm("a", VmChange(quota_bytes=32 << 20))
        until(lambda: agent.said("quota is now 32 MiB"), "the quota is announced")
        client.change_vm("a", VmChange(frozen=True))
        until(lambda: stack.status()["host"]["frozen"], "the guest knows that it is frozen")
        client.change_vm("a", VmChange(frozen=False))
        until(lambda: not stack.status()["host"]["frozen"], "the guest knows that it is thawed")
    assert stack.status()["host"]["quota_bytes"] == 32 << 20


def test_one_agent_at_a_time(stack: Stack) -> None:
    assert stack.run("status").returncode == ExitCode.UNAVAILABLE
    stack.start_agent()
    second = stack.run("run")
    assert second.returncode == ExitCode.CONFLICT
    assert "another agent runs" in second.stderr


def test_commands_are_for_root(stack: Stack) -> None:
    stack.start_agent()
    assert (stack.runtime / "agent.sock").stat().st_mode & 0o777 == 0o600


def test_garbage_on_the_command_socket_harms_nobody(stack: Stack) -> None:
    stack.start_agent()
    import socket  # noqa: PLC0415

    for line in (b"\xff\xfe\n", b"[]\n", b'{"command": 3}\n', b'{"command": "mount"}\n', b"{" * 4096 + b"\n"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(DEADLINE_S)
            connection.connect(str(stack.runtime / "agent.sock"))
            connection.sendall(line)
            assert b'"error"' in connection.recv(65536), line
    assert stack.run("status").returncode == 0


def test_a_missing_program_is_named(stack: Stack) -> None:
    stack.config.write_text('tmem_guest = "/nowhere/tmem-guest"\n')
    done = stack.run("run")
    assert done.returncode == ExitCode.UNAVAILABLE
    assert "/nowhere/tmem-guest is not there" in done.stderr


def test_stopping_with_a_mount_in_use_leaves_its_users_alone(stack: Stack) -> None:
    expected = fill(stack.data / "file")
    agent = stack.start_agent()
    assert stack.run("mount", str(stack.data)).returncode == 0
    pid = stack.mount_pid()
    with (stack.data / "file").open("rb") as held:
        assert agent.end() == 0
        assert mounts.at(str(stack.data)) is None
        try:
            assert hashlib.sha256(held.read()).hexdigest() == expected
        except OSError as error:
            assert error.errno != errno.ENOTCONN, "its user was cut off"
            raise
    until(lambda: not Path(f"/proc/{pid}").exists(), "its process has ended with its last user")
