"""Suites that others wrote for POSIX file systems: pjdfstest, fsx, and stress-ng's file system stressors.

`host/setup.sh conformance` installs them. pjdfstest runs on a directory and on the mount that shows its
sibling, and must say the same of both; fsx and stress-ng verify what they read by themselves.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.daemon import Tmemd
from integration.fs_mount import ROOT, FileCache, lower_directory
from tmem_host.api.types import VmChange

_TOOLS = ROOT / "build/tools/bin"
_SECONDS = 600

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
    pytest.mark.timeout(3 * _SECONDS),
]

# As long as it takes for a time to move on every kernel.
_PJDFSTEST = """
[features]
posix_fallocate = {}
rename_ctime = {}
utimensat = {}
utime_now = {}
[settings]
naptime = 0.02
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"""
# glibc knows the limit of links of some file systems by their kind, and of FUSE not.
_UNKNOWN_TO_LIBC = {"link::link_count_max"}

_FSX = """
flen = {size}
[opsize]
max = 70000
[weights]
close_open = 1
invalidate = 8
mapread = 10
mapwrite = 10
read = {read}
write = 20
truncate = 4
fsync = 1
fdatasync = 1
posix_fallocate = 2
punch_hole = 4
sendfile = 4
posix_fadvise = {forget}
copy_file_range = 5
"""

_STRESSORS = [
    *("access", "chattr", "chdir", "chmod", "chown", "copy-file", "dentry", "dir", "dirdeep", "dirmany"),
    *(
        "dup",
        "fallocate",
        "fcntl",
        "fiemap",
        "filename",
        "flock",
        "fpunch",
        "fsize",
        "fstat",
        "getdent",
        "hdd",
    ),
    *(
        "iomix",
        "link",
        "locka",
        "lockf",
        "lockofd",
        "mknod",
        "mmap",
        "mmapfork",
        "open",
        "readahead",
        "rename",
    ),
    *("revio", "seek", "sendfile", "symlink", "sync-file", "touch", "utime", "verity", "xattr"),
]


def _tool(name: str) -> Path:
    found = _TOOLS / name
    path = found if found.exists() else shutil.which(name)
    assert path, f"{name} is not installed: run host/setup.sh conformance"
    return Path(path)


@pytest.fixture(params=["ext4", "ext4-check", "ext4-none", "overlay"])
def both(request: pytest.FixtureRequest, tmemd: Tmemd) -> Iterator[tuple[Path, FileCache]]:
    """A plain directory and a mount that shows its sibling, with tmem behind it."""
    kind, _, changes = request.param.partition("-")
    # A short name: paths as long as they may be are a part of the suites.
    with tempfile.TemporaryDirectory(prefix="tm-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with lower_directory(kind, directory) as base:
            plain, lower = base / "plain", base / "shown"
            for path in (plain, lower):
                path.mkdir()
                path.chmod(0o777)
            options = ["--changes", changes] if changes else []
            endpoint = f"unix:{tmemd.vm_socket('a')}"
            with FileCache(directory, lower, *options, endpoint=endpoint) as cache:
                cache.wait_for("connected", 1)
                yield plain, cache
                assert cache.stop() == 0, cache.log


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)


def _pjdfstest(root: Path, scratch: Path) -> dict[str, str]:
    """What it says of each case: `ok`, `skipped` or `FAILED`."""
    config = scratch / "pjdfstest.toml"
    config.write_text(_PJDFSTEST)
    elsewhere = scratch / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    elsewhere.chmod(0o777)
    done = _run(_tool("pjdfstest"), "-c", config, "-p", root, "-s", elsewhere)
    cases = dict(re.findall(r"^(\S+::\S+)\s+(ok|skipped|FAILED)$", done.stdout, re.MULTILINE))
    assert len(cases) > 300, done.stdout + done.stderr
    return cases


def test_pjdfstest_says_the_same_of_the_mount(both: tuple[Path, FileCache], short_directory: Path) -> None:
    plain, cache = both
    expected, told = (_pjdfstest(root, short_directory) for root in (plain, cache.mount))
    differences = {
        name: (result, expected[name]) for name, result in told.items() if result != expected[name]
    }
    assert set(differences) <= _UNKNOWN_TO_LIBC, differences
    assert sum(result == "ok" for result in told.values()) > 300


@pytest.mark.parametrize("size", [50_000, 3_000_000])
def test_fsx_reads_what_it_wrote(
    both: tuple[Path, FileCache], tmemd: Tmemd, short_directory: Path, size: int
) -> None:
    _, cache = both
    config = short_directory / "fsx.toml"
    # Room for a part of the file only, so that the host evicts all the time; then for all of it, and hardly a
    # change, so that pages are sure to come back.
    for seed, quota_mib, calm in ((1, 1, 1), (2, 1, 1), (3, 16, 200)):
        with tmemd.admin() as admin:
            admin.change_vm("a", VmChange(quota_bytes=quota_mib << 20))
        config.write_text(_FSX.format(size=size, read=20 * calm, forget=8 * calm))
        options = ("-f", config, "-N", "20000", "-S", str(seed), "-P", short_directory)
        done = _run(_tool("fsx"), *options, cache.mount / "fsx")
        assert done.returncode == 0, f"seed {seed}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    status = cache.status()
    assert status["hit_pages"] > 0, status


@pytest.mark.parametrize("stressor", _STRESSORS)
def test_stress_ng_verifies(both: tuple[Path, FileCache], stressor: str) -> None:
    """What a stressor cannot do on the lower directory, it need not do on the mount."""
    plain, cache = both
    outcomes = []
    for root in (plain, cache.mount):
        # So much that the first process does not fill the disk before the second begins.
        options = ("2", "--fallocate-bytes", "64M", "--timeout", "2", "--verify", "--temp-path", root)
        done = _run(_tool("stress-ng"), f"--{stressor}", *options)
        outcomes.append((done.returncode, done.stdout + done.stderr))
    assert outcomes[1][0] == outcomes[0][0], outcomes[1][1]
