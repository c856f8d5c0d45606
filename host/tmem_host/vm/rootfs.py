"""Builds an image's files with mmdebstrap: kernel, initramfs, disks. Needs root, mounts nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tmem_host.errors import ExitCode, OperatorError
from tmem_host.units import parse_size
from tmem_host.vm.definition import Definition
from tmem_host.vm.initramfs import Archive, add_modules, kernel_version

Progress = Callable[[str], None]

_MIRROR = "TMEM_DEBIAN_MIRROR"
_PATH_EXCLUDES = ("man", "doc", "info", "locale", "i18n/locales")
_DROPBEAR_KEY = "/etc/dropbear/dropbear_ed25519_host_key"
_LOADER = "ld-linux-x86-64.so.2"
_OPENSSH_KEY = "/etc/ssh/ssh_host_ed25519_key"
_LAST_LINES = 12


def build(definition: Definition, sources: Path, out: Path, progress: Progress) -> None:
    """Build all files of an image into the empty directory `out`.

    `sources` is the image's own definition directory, with `boot/` beside it. Made are `vmlinuz`, `initrd`,
    `host_key.pub`, `kernel_version`, and, if the definition asks for them, `root.ext4`, `data.ext4`.
    Raises OperatorError; the caller removes `out`.
    """
    _need("mmdebstrap", "mkfs.ext4", "chroot")
    work = out / "work"
    root = work / "root"
    work.mkdir()
    log = out / "build.log"
    progress(
        f"installing {len(definition.packages)} packages of Debian {definition.suite} and what they need"
    )
    _run(_mmdebstrap(definition, sources, root), log)
    version = kernel_version(root)
    (out / "kernel_version").write_text(version + "\n")
    shutil.copyfile(root / "boot" / f"vmlinuz-{version}", out / "vmlinuz")
    if definition.root_size is None:
        _build_memory_root(definition, sources, root, out, log)
        data = work / "data"
        data.mkdir()
    else:
        progress("making the boot stage and the disks")
        _settle(definition, sources, root)
        _keep_python(root, out / "python")
        data = root / "srv/data"
        data.mkdir(exist_ok=True)
        _build_boot_stage(definition, sources, root, out)
        (out / "host_key.pub").write_text((root / f"{_OPENSSH_KEY[1:]}.pub").read_text())
    _mkfs(data, out / "data.ext4", parse_size(definition.data_size), "tmem-data", log)
    if definition.root_size is not None:
        shutil.rmtree(data)
        _mkfs(root, out / "root.ext4", parse_size(definition.root_size), "tmem-root", log)
    progress("removing what was only needed to build")
    shutil.rmtree(work)


def _need(*programs: str) -> None:
    if os.geteuid() != 0:
        raise OperatorError("building an image needs root", hint="sudo", code=ExitCode.PRIVILEGE)
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise OperatorError(
            f"cannot build an image without {', '.join(missing)}",
            hint="apt-get install mmdebstrap e2fsprogs",
            code=ExitCode.UNAVAILABLE,
        )


def apt_sources(suite: str) -> list[str]:
    """Where Debian's packages come from, as lines of a sources.list; none: mmdebstrap's own choice.

    TMEM_DEBIAN_MIRROR if set, else the mirrors that apt uses on this machine.
    """
    if chosen := os.environ.get(_MIRROR):
        return [f"deb {chosen} {name} main" for name in (suite, f"{suite}-updates")]
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    lines = []
    # file:, cdrom: and mirror+file: sources name places of this machine that a chroot does not have.
    for uri in dict.fromkeys(uri for uri in answer.stdout.split() if uri.startswith(("http://", "https://"))):
        parts = ("-security",) if "security" in uri else ("", "-updates")
        lines += [f"deb {uri} {suite}{part} main" for part in parts]
    return lines


def _mmdebstrap(definition: Definition, sources: Path, root: Path) -> list[str]:
    command = ["mmdebstrap", "--mode=root", "--format=directory", f"--variant={definition.variant}"]
    command += ["--aptopt=Apt::Install-Recommends false", "--dpkgopt=force-confold"]
    command += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _PATH_EXCLUDES]
    command += [f"--include={','.join(definition.packages)}"]
    if definition.variant == "minbase":
        # The kernel's package would build an initramfs that is never booted.
        conf = "etc/initramfs-tools"
        off = f'mkdir -p "$1/{conf}" && echo update_initramfs=no > "$1/{conf}/update-initramfs.conf"'
        command += [f"--essential-hook={off}"]
    if definition.kernel_source:
        script = sources / "kernel-source.sh"
        command += [f'--customize-hook={script} "$1" {definition.kernel_source}']
    return [*command, definition.suite, str(root), *apt_sources(definition.suite)]


def _settle(definition: Definition, sources: Path, root: Path) -> None:
    """Fit an installed Debian to its life as a VM."""
    shutil.copytree(sources / "files", root, dirs_exist_ok=True)
    units = root / "etc/systemd/system"
    generators = root / "etc/systemd/system-generators"
    generators.mkdir(exist_ok=True)
    masked = [units / unit for unit in definition.mask]
    masked += [generators / generator for generator in definition.mask_generators]
    for path in masked:
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/null")
    (units / "default.target").unlink(missing_ok=True)
    (units / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
    (root / "data").mkdir()
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    # Without these, the first boot would update caches that were made a moment ago.
    (root / "etc/.updated").touch()
    (root / "var/.updated").touch()
    (root / "etc/machine-id").write_text("")
    (root / "etc/resolv.conf").write_text("")
    for kind in ("rsa", "ecdsa"):  # one host key is enough
        for path in (root / "etc/ssh").glob(f"ssh_host_{kind}_key*"):
            path.unlink()
    for path in (root / "boot").glob("initrd.img*"):
        path.unlink()


def _keep_python(root: Path, target: Path) -> None:
    """Keep a copy of the guest's Python, with which tmem's agent is compiled for it (`payload`)."""
    version = (root / "usr/bin/python3").readlink().name
    (target / "bin").mkdir(parents=True)
    (target / "lib").mkdir()
    shutil.copyfile(root / "usr/bin" / version, target / "bin/python3")
    multiarch = root / "usr/lib/x86_64-linux-gnu"
    for library in (_LOADER, "libc.so.6", "libm.so.6", "libz.so.1", "libexpat.so.1"):
        shutil.copyfile(multiarch / library, target / "lib" / library)
    for program in (target / "bin/python3", target / "lib" / _LOADER):
        program.chmod(0o755)
    unwanted = shutil.ignore_patterns("test", "config-*", "pydoc_data", "ensurepip", "lib-dynload")
    shutil.copytree(root / "usr/lib" / version, target / "lib" / version, symlinks=True, ignore=unwanted)


def _build_boot_stage(definition: Definition, sources: Path, root: Path, out: Path) -> None:
    archive = Archive()
    for path in ("/proc", "/dev", "/sysroot"):
        archive.directory(path)
    archive.character_device("/dev/console", 5, 1)
    archive.file("/bin/busybox", (root / "usr/bin/busybox").read_bytes(), 0o755)
    archive.file("/init", (sources.parent / "boot/init").read_bytes(), 0o755)
    add_modules(archive, root, definition.boot_modules)
    with (out / "initrd").open("wb") as file:
        archive.write(file)


def _build_memory_root(definition: Definition, sources: Path, root: Path, out: Path, log: Path) -> None:
    archive = Archive()
    for path in (
        "/proc",
        "/sys",
        "/dev",
        "/run",
        "/data",
        "/mnt",
        "/sbin",
        "/etc/dropbear",
        "/var/log",
        "/usr/bin",
    ):
        archive.directory(path)
    archive.directory("/root")
    archive.directory("/root/.ssh", 0o700)
    archive.directory("/tmp", 0o1777)  # noqa: S108  # the guest's
    archive.character_device("/dev/console", 5, 1)
    archive.file("/bin/busybox", (root / "usr/bin/busybox").read_bytes(), 0o755)
    archive.symlink("/bin/sh", "busybox")
    archive.file("/init", (sources / "init").read_bytes(), 0o755)
    archive.file("/etc/passwd", b"root::0:0:root:/root:/bin/sh\n")
    archive.file("/etc/group", b"root:x:0:\n")
    archive.file("/etc/shells", b"/bin/sh\n")
    for program in definition.programs:
        _add_program(archive, root, program, log)
    # Debian's kernel package leaves modules.dep to a script that `extract` does not run.
    _run(["depmod", "-b", str(root / "usr"), kernel_version(root)], log)
    add_modules(archive, root, definition.boot_modules, definition.more_modules)
    (root / "etc/dropbear").mkdir(parents=True, exist_ok=True)
    _run(["chroot", str(root), "dropbearkey", "-t", "ed25519", "-f", _DROPBEAR_KEY], log)
    archive.file(_DROPBEAR_KEY, (root / _DROPBEAR_KEY[1:]).read_bytes(), 0o600)
    shown = _run(["chroot", str(root), "dropbearkey", "-y", "-f", _DROPBEAR_KEY], log)
    key = next(line for line in shown.splitlines() if line.startswith("ssh-ed25519 "))
    (out / "host_key.pub").write_text(key + "\n")
    # What is needed to add programs later, without the tree: the C library and what goes with it.
    for library in ("libc.so.6", "libm.so.6", "libgcc_s.so.1"):
        _add_library(archive, root, library)
    with (out / "initrd").open("wb") as file:
        archive.write(file)


def _add_program(archive: Archive, root: Path, program: str, log: Path) -> None:
    """Add a program of a root directory and the shared libraries it names, theirs included."""
    archive.file(program, (root / program[1:]).read_bytes(), 0o755)
    # The loader itself, because `ldd` is a script that wants a shell.
    command = ["chroot", str(root), f"/lib64/{_LOADER}", "--list", program]
    for line in _run(command, log).splitlines():
        words = [word for word in line.split() if word.startswith("/")]
        if words:
            _add_library(archive, root, words[-1].rpartition("/")[2])


def _add_library(archive: Archive, root: Path, name: str) -> None:
    multiarch = root / "usr/lib/x86_64-linux-gnu"
    archive.file(f"/lib/x86_64-linux-gnu/{name}", (multiarch / name).read_bytes(), 0o755)
    archive.file(f"/lib64/{_LOADER}", (multiarch / _LOADER).read_bytes(), 0o755)


def _mkfs(tree: Path, target: Path, size_bytes: int, label: str, log: Path) -> None:
    with target.open("wb") as file:
        file.truncate(size_bytes)
    # No reserved blocks and no lazy initialisation: nothing goes on in the guest's background.
    features = "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
    _run(["mkfs.ext4", "-q", "-F", "-m", "0", "-L", label, "-E", features, "-d", str(tree), str(target)], log)


def _run(command: list[str], log: Path) -> str:
    """Run a build step, its output appended to the log. An OperatorError shows the output's end."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    with log.open("ab") as file:
        start = file.tell()
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, check=False
        )
    output = log.read_bytes()[start:].decode(errors="replace")
    if process.returncode == 0:
        return output
    if "No space left on device" in output or "ENOSPC" in output or "Could not allocate block" in output:
        raise OperatorError(
            f"the disk is full at {log.parent}", hint="free some gigabytes there", code=ExitCode.NO_SPACE
        )
    lines = [line for line in output.splitlines() if line.strip()][-_LAST_LINES:]
    raise OperatorError(f"{command[0]} failed with status {process.returncode}:\n  " + "\n  ".join(lines))
