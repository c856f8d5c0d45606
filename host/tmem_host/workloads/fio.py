"""fio on a directory in the guest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from tmem_host.errors import ExitCode, OperatorError
from tmem_host.units import format_size
from tmem_host.workloads.shell import OnOutput, Shell, WorkloadError, checked, finish


@dataclass(frozen=True, slots=True)
class Profile:
    """One way to run fio. All but `verify` run for a time, over files laid out first."""

    name: str
    summary: str
    rw: str
    block: str
    size_bytes: int
    """Of all files together."""
    seconds: int
    """Of measuring, after the lay-out; 0 for once over the files."""
    read_percent: int = 100
    verify: bool = False
    """Write a checksum with every block, read everything back and compare."""
    pattern: str = "random"
    """How offsets are chosen; `zipf:1.1` reads some blocks far more often than others."""

    def argv(self, directory: str, output: str) -> list[str]:
        """fio's command line."""
        argv = [
            "fio",
            f"--name={self.name}",
            f"--directory={directory}",
            f"--rw={self.rw}",
            f"--bs={self.block}",
            f"--size={self.size_bytes}",
            # The mount is a FUSE file system: plain system calls, through the guest's page cache.
            "--ioengine=psync",
            "--fallocate=none",
            # Like most data, half compressible; different in every block, so that none is stored twice.
            "--refill_buffers",
            "--buffer_compress_percentage=50",
            f"--random_distribution={self.pattern}",
            "--randrepeat=1",
            "--output-format=json",
            f"--output={output}",
            "--eta=always",
            "--eta-newline=5",
            "--eta-interval=5",
        ]
        if self.seconds:
            argv += ["--time_based", f"--runtime={self.seconds}"]
        if self.rw == "randrw":
            argv.append(f"--rwmixread={self.read_percent}")
        if self.verify:
            argv += ["--verify=xxhash", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"]
        return argv


_MIB = 1 << 20

OUTPUT = "/run/tmem-fio.json"
"""Where fio leaves its result in the guest: not on the mount, and not on a disk."""

PROFILES = {
    profile.name: profile
    for profile in (
        Profile("randread", "random 4 KiB reads", "randread", "4k", 128 * _MIB, 60, pattern="zipf:1.1"),
        Profile("seqread", "sequential 64 KiB reads", "read", "64k", 128 * _MIB, 60),
        Profile(
            "mixed", "random 4 KiB, 7 reads to 3 writes", "randrw", "4k", 128 * _MIB, 60, read_percent=70
        ),
        Profile(
            "verify",
            "random 4 KiB writes, read back and compared",
            "randwrite",
            "4k",
            64 * _MIB,
            0,
            verify=True,
        ),
    )
}


class FioResult(msgspec.Struct, frozen=True, kw_only=True):
    """What fio measured."""

    profile: str
    exit_code: int
    errors: int
    seconds: float
    read_bytes: int
    read_iops: float
    read_bytes_per_s: float
    read_p99_us: float
    write_bytes: int
    write_iops: float
    write_bytes_per_s: float
    write_p99_us: float


def profile(name: str, *, size_bytes: int | None = None, seconds: int | None = None) -> Profile:
    """A profile by name, with another size or time if given. Raises OperatorError (NOT_FOUND)."""
    if name not in PROFILES:
        raise OperatorError(
            f"no fio profile is called {name!r}",
            hint=f"one of {', '.join(PROFILES)}",
            code=ExitCode.NOT_FOUND,
        )
    chosen = PROFILES[name]
    if size_bytes is not None:
        chosen = replace(chosen, size_bytes=size_bytes)
    if seconds is not None:
        chosen = replace(chosen, seconds=seconds)
    return chosen


def run(
    shell: Shell,
    chosen: Profile,
    *,
    directory: str,
    deadline_s: float,
    on_output: OnOutput | None = None,
) -> FioResult:
    """Run fio in a guest, its files below `directory` (kept, for a next run to read).

    Raises WorkloadError with fio's exit code if it fails or a block read back is wrong, and OperatorError
    (TIMEOUT) when the deadline passes.
    """
    checked(shell, "making fio's directory", ["mkdir", "-p", directory], deadline_s=60)
    finished = finish(shell, chosen.argv(directory, OUTPUT), deadline_s=deadline_s, on_output=on_output)
    if finished.exit_code != 0:
        lines = (finished.stderr.strip() or finished.stdout.strip()).splitlines()
        # fio ends with its progress line; its complaint is the last line that names it.
        complaints = [line for line in lines if line.startswith(("fio:", "verify:"))] or lines
        raise WorkloadError(
            f"fio {chosen.name} failed with exit code {finished.exit_code}"
            + (f": {complaints[-1].strip()}" if complaints else ""),
            exit_code=finished.exit_code,
            hint=f"free space on {directory}, or a smaller --size than {format_size(chosen.size_bytes)}",
        )
    text = checked(shell, "reading fio's result", ["cat", OUTPUT], deadline_s=60)
    return parse(text, chosen.name)


class _Percentiles(msgspec.Struct):
    percentile: dict[str, int] = {}


class _Direction(msgspec.Struct):
    io_bytes: int
    iops: float
    bw_bytes: float
    runtime: int
    """Milliseconds."""
    clat_ns: _Percentiles


class _Job(msgspec.Struct):
    error: int
    read: _Direction
    write: _Direction


class _Output(msgspec.Struct):
    jobs: list[_Job]


def parse(text: str, name: str) -> FioResult:
    """Read fio's JSON, in front of which it may have printed warnings. Raises OperatorError if it is none."""
    try:
        output = msgspec.json.decode(text[max(0, text.find("{")) :], type=_Output)
        job = output.jobs[0]
    except (msgspec.DecodeError, IndexError) as error:
        raise OperatorError(f"fio's output cannot be read: {error}") from error
    return FioResult(
        profile=name,
        exit_code=0,
        errors=sum(1 for each in output.jobs if each.error),
        seconds=max(job.read.runtime, job.write.runtime) / 1000,
        read_bytes=job.read.io_bytes,
        read_iops=job.read.iops,
        read_bytes_per_s=job.read.bw_bytes,
        read_p99_us=job.read.clat_ns.percentile.get("99.000000", 0) / 1000,
        write_bytes=job.write.io_bytes,
        write_iops=job.write.iops,
        write_bytes_per_s=job.write.bw_bytes,
        write_p99_us=job.write.clat_ns.percentile.get("99.000000", 0) / 1000,
    )
