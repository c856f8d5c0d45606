"""The workloads run for real, on this machine in place of a guest, small."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.workloads import fio, kernel, memory
from tmem_host.workloads.shell import WorkloadError, checked, finish, mount_point

MIB = 1 << 20


class Here:
    """Runs commands on this machine."""

    def run(
        self,
        command: str | Sequence[str],
        *,
        deadline_s: float,
        on_output: Callable[[Literal["stdout", "stderr"], bytes], None] | None = None,
        stdin: bytes = b"",
    ) -> int:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            timeout=deadline_s,
            check=False,
            shell=isinstance(command, str),
        )
        if on_output:
            on_output("stdout", done.stdout)
            on_output("stderr", done.stderr)
        return done.returncode


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fio, "OUTPUT", str(tmp_path / "fio.json"))
    monkeypatch.setattr(memory, "PROGRAM", str(tmp_path / "memory"))
    monkeypatch.setattr(memory, "STOP_FILE", str(tmp_path / "stop"))


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
@pytest.mark.parametrize("name", list(fio.PROFILES))
def test_every_fio_profile_runs_and_is_read(name: str, tmp_path: Path) -> None:
    seconds = 0 if name == "verify" else 1
    chosen = fio.profile(name, size_bytes=4 * MIB, seconds=seconds)
    result = fio.run(Here(), chosen, directory=str(tmp_path), deadline_s=60)
    assert result.errors == 0
    if chosen.verify:
        assert result.write_bytes == 4 * MIB
    elif chosen.rw != "randrw":
        assert result.write_bytes == 0
    assert result.read_bytes > 0


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_a_failing_fio_hands_its_exit_code_and_complaint_on(tmp_path: Path) -> None:
    (tmp_path / "randread.0.0").mkdir()
    with pytest.raises(WorkloadError, match=r"fio randread failed with exit code 1: .*directory") as failure:
        fio.run(Here(), fio.profile("randread", size_bytes=MIB), directory=str(tmp_path), deadline_s=60)
    assert failure.value.exit_code == 1


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OperatorError, match="randread, seqread, mixed, verify") as failure:
        fio.profile("fast")
    assert failure.value.code is ExitCode.NOT_FOUND


def test_fio_output_that_is_none() -> None:
    for text in ("", "fio: killed", '{"jobs": []}', '{"jobs": [{"error": "x"}]}'):
        with pytest.raises(OperatorError, match="cannot be read"):
            fio.parse(text, "randread")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
class TestMemory:
    def test_verifies_every_page_in_every_pass(self) -> None:
        memory.prepare(Here())
        result = memory.run(Here(), size_bytes=2 * MIB, seconds=1, pause_ms=1, deadline_s=60)
        assert result.pages == 512
        assert result.passes > 8, "enough for each page to be rewritten twice"
        assert result.pages_verified == result.passes * result.pages

    def test_stops_when_told(self) -> None:
        memory.prepare(Here())
        memory.stop(Here())
        result = memory.run(Here(), size_bytes=MIB, seconds=3600, deadline_s=60)
        assert result.passes == 1

    def test_notices_a_page_that_is_not_intact(self, tmp_path: Path) -> None:
        """The program is not trusted to notice: a copy whose last fill writes a wrong word must fail."""
        source = (Path(memory.__file__).parent / "memory.c").read_text()
        broken = source.replace(
            "        at[i] = word(page, generation, i);",
            "        at[i] = word(page, generation, i) ^ (page == 100 && generation == 2 && i == 511);",
        )
        assert broken != source
        argv = ["gcc", "-O2", "-x", "c", "-o", str(tmp_path / "memory"), "-"]
        checked(Here(), "compiling", argv, deadline_s=60, stdin=broken.encode())
        with pytest.raises(WorkloadError, match=r"did not come back intact: page 100 .* word 511") as failure:
            memory.run(Here(), size_bytes=MIB, seconds=60, pause_ms=0, deadline_s=120)
        assert failure.value.exit_code == 3


def test_a_killed_memory_program_is_not_a_success() -> None:
    with pytest.raises(OperatorError, match="did not get to its end"):
        memory.parse("filled 100 pages\npass 1: 100 pages intact\n")


def test_checked_names_what_failed_and_its_last_words() -> None:
    with pytest.raises(WorkloadError, match="copying failed with exit code 9: two") as failure:
        checked(Here(), "copying", ["sh", "-c", "echo one >&2; echo two >&2; exit 9"], deadline_s=10)
    assert failure.value.exit_code == 9


@pytest.fixture
def kernel_tree(tmp_path: Path) -> Path:
    """A tree with a make that speaks like the kernel's."""
    tree = tmp_path / "linux"
    (tree / "mm").mkdir(parents=True)
    for name in ("slab", "swap"):
        (tree / "mm" / f"{name}.c").write_text(f"int {name};\n")
    (tree / "Makefile").write_text(
        "mm/: mm/slab.o mm/swap.o\n%.o: %.c\n\t@echo '  CC      $@'\n\t@cc -c -o $@ $<\n.PHONY: mm/\n"
    )
    return tree


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestKernel:
    def test_compiles_again_what_was_compiled(self, kernel_tree: Path) -> None:
        for _ in range(2):
            result = kernel.run(Here(), kernel.target("mm"), source=str(kernel_tree), deadline_s=60)
            assert (result.objects, result.target) == (2, "mm")
            assert (kernel_tree / "mm/slab.o").exists()

    def test_a_failing_build_hands_make_s_code_and_first_error_on(self, kernel_tree: Path) -> None:
        (kernel_tree / "mm/slab.c").write_text("int oops\n")
        with pytest.raises(WorkloadError, match=r"exit code 2: .*slab\.c.*error") as failure:
            kernel.run(Here(), kernel.target("mm"), source=str(kernel_tree), deadline_s=60)
        assert failure.value.exit_code == 2

    def test_without_sources_it_says_what_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(OperatorError, match="is the tmem file system mounted"):
            kernel.run(Here(), kernel.target("mm"), source=str(tmp_path / "none"), deadline_s=60)


def test_kernel_targets() -> None:
    assert kernel.target("fs/proc/").make == ("fs/proc/",)
    for name in ("everything", "../etc/", "/etc/", "mm/;reboot/"):
        with pytest.raises(OperatorError, match="no kernel-build target"):
            kernel.target(name)


class Says:
    """Answers every command with the same bytes, in pieces of one."""

    def __init__(self, stdout: bytes) -> None:
        self._stdout = stdout

    def run(
        self,
        command: str | Sequence[str],
        *,
        deadline_s: float,
        on_output: Callable[[Literal["stdout", "stderr"], bytes], None] | None = None,
        stdin: bytes = b"",
    ) -> int:
        del command, deadline_s, stdin
        for byte in self._stdout:
            assert on_output is not None
            on_output("stdout", bytes([byte]))
        return 0


def test_output_cut_in_the_middle_of_a_character_is_put_together() -> None:
    assert finish(Says("aäb\n".encode()), ["x"], deadline_s=1).stdout == "aäb\n"


def test_the_mount_point_is_found_in_the_guests_mount_table() -> None:
    table = (
        b"/dev/vda / ext4 rw 0 0\nfusectl /sys/fs/fuse fusectl rw 0 0\ntmem /mnt/a\\040b fuse.tmem rw 0 0\n"
    )
    assert mount_point(Says(table)) == "/mnt/a b"
    assert mount_point(Says(b"/dev/vda / ext4 rw 0 0\nx /s fuse.sshfs rw 0 0\n")) is None
