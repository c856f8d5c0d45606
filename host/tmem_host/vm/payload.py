"""tmem's own programs for a guest, from the installed distribution: no image is rebuilt when they change."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm.definition import Payload
from tmem_host.vm.initramfs import Archive

_BINARY = "tmem-guest"
_BINARY_VARIABLE = "TMEM_GUEST_BINARY"
_UNITS = ("sshd-vsock.service", "sshd-vsock.socket", "tmem-agent.service")
_PACKAGE = "tmem_guest"
_PYTHON = "/usr/lib/python3/dist-packages"
_WANTED = (".py", ".toml", ".service")


def write(kind: Payload, target: Path, python: Path) -> None:
    """Write the payload as an initramfs layer. Raises OperatorError if a part is not built.

    `python` is the directory with the image's Python, which `rootfs` keeps for this.
    """
    archive = Archive()
    if kind == "binary":
        archive.file(f"/usr/bin/{_BINARY}", _stripped(binary()), 0o755)
    else:
        _add_agent(archive, "/layer", python)
    with target.open("wb") as file:
        archive.write(file)


def digest(kind: Payload) -> str:
    """Hash of the payload's files: 16 hexadecimal digits."""
    hasher = hashlib.sha256(Path(__file__).read_bytes() + kind.encode())
    hasher.update(binary().read_bytes())
    if kind == "agent":
        for name, path in _package_files():
            hasher.update(name.encode() + b"\0" + path.read_bytes())
        for unit in _units():
            hasher.update(unit.name.encode() + b"\0" + unit.read_bytes())
    return hasher.hexdigest()[:16]


def binary() -> Path:
    """The newest `tmem-guest`: the one cargo built last in a checkout, or the installed one."""
    if chosen := os.environ.get(_BINARY_VARIABLE):
        return Path(chosen)
    checkout = Path(__file__).parents[3]
    candidates = [Path(sys.executable).with_name(_BINARY), checkout / "target/release" / _BINARY]
    if found := shutil.which(_BINARY):
        candidates.append(Path(found))
    built = [path for path in candidates if path.is_file()]
    if not built:
        raise OperatorError(
            f"the program {_BINARY} is not built", hint="make setup", code=ExitCode.UNAVAILABLE
        )
    return max(built, key=lambda path: path.stat().st_mtime)


def _stripped(program: Path) -> bytes:
    """The program without debug information: at boot it is copied twice."""
    if shutil.which("strip") is None:
        return program.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, program.name)
        subprocess.run(["strip", "--strip-debug", "-o", str(target), str(program)], check=True)
        return target.read_bytes()


def _add_agent(archive: Archive, layer: str, python: Path) -> None:
    archive.file(f"{layer}/usr/bin/{_BINARY}", _stripped(binary()), 0o755)
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in _package_files():
            copy = Path(scratch, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        _compiled(Path(scratch), python)
        archive.tree(Path(scratch), f"{layer}{_PYTHON}")
    archive.file(f"{layer}/usr/bin/tmem-agent", _agent_script(), 0o755)
    for unit in _units():
        archive.file(f"{layer}/etc/systemd/system/{unit.name}", unit.read_bytes())
        for target in re.findall(r"^WantedBy=(\S+)$", unit.read_text(), re.MULTILINE):
            archive.symlink(f"{layer}/etc/systemd/system/{target}.wants/{unit.name}", f"../{unit.name}")


def _agent_script() -> bytes:
    module, _, function = "tmem_guest.main:main".partition(":")
    for entry in metadata.entry_points(group="console_scripts", name="tmem-agent"):
        module, function = entry.module, entry.attr
    lines = (
        "#!/usr/bin/python3",
        "import sys",
        f"from {module} import {function}",
        f"sys.exit({function}())",
    )
    return "".join(f"{line}\n" for line in lines).encode()


def _package() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise OperatorError(
            f"the package {_PACKAGE} is not installed", hint="make setup", code=ExitCode.UNAVAILABLE
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _package_files() -> Iterator[tuple[str, Path]]:
    base = _package()
    for path in sorted(base.rglob("*")):
        if path.suffix in _WANTED and path.is_file():
            yield f"{_PACKAGE}/{path.relative_to(base).as_posix()}", path


def _compiled(tree: Path, python: Path) -> None:
    """Compile the Python files of a tree for the guest's own Python, which is run here from its image.

    An emulated CPU takes seconds for it, at every boot. The result is not checked against its source then.
    """
    loader, library = python / "lib/ld-linux-x86-64.so.2", python / "lib"
    command = [str(loader), "--library-path", str(library), str(python / "bin/python3"), "-E", "-s", "-m"]
    command += ["compileall", "-q", "--invalidation-mode", "unchecked-hash"]
    command += ["-s", str(tree), "-p", _PYTHON, str(tree)]
    made = subprocess.run(
        command, env={"PYTHONHOME": str(python)}, capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        raise OperatorError(f"the guest's Python does not compile {_PACKAGE}: {made.stdout}{made.stderr}")


def _units() -> list[Path]:
    """systemd's units for a guest: those of the checkout, or of the installation."""
    places = (_package().parent / "systemd", Path(sys.prefix) / "share/tmem/systemd")
    found = [next((path for place in places if (path := place / unit).is_file()), None) for unit in _UNITS]
    return [path for path in found if path is not None]
