"""tmem's own programs for a guest, from the installed distribution: no image is rebuilt when they change."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm.definition import Payload
from tmem_host.vm.initramfs import Archive

_BINARY = "tmem-guest"
_BINARY_VARIABLE = "TMEM_GUEST_BINARY"
_UNIT = "tmem-agent.service"
_PACKAGES = ("tmem_guest", "tmem_native")
_PYTHON = "/usr/lib/python3/dist-packages"
_WANTED = (".py", ".pyi", ".so", ".typed", ".toml", ".service")


def write(kind: Payload, target: Path) -> None:
    """Write the payload as an initramfs layer. Raises OperatorError if a part is not built."""
    archive = Archive()
    if kind == "binary":
        archive.file(f"/usr/bin/{_BINARY}", binary().read_bytes(), 0o755)
    else:
        _add_agent(archive, "/layer")
    with target.open("wb") as file:
        archive.write(file)


def digest(kind: Payload) -> str:
    """Hash of the payload's files: 16 hexadecimal digits."""
    hasher = hashlib.sha256(Path(__file__).read_bytes() + kind.encode())
    hasher.update(binary().read_bytes())
    if kind == "agent":
        for name, path in _package_files():
            hasher.update(name.encode() + b"\0" + path.read_bytes())
        if unit := _unit():
            hasher.update(unit.read_bytes())
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


def _add_agent(archive: Archive, layer: str) -> None:
    archive.file(f"{layer}/usr/bin/{_BINARY}", binary().read_bytes(), 0o755)
    for name, path in _package_files():
        archive.file(f"{layer}{_PYTHON}/{name}", path.read_bytes())
    archive.file(f"{layer}/usr/bin/tmem-agent", _agent_script(), 0o755)
    if unit := _unit():
        archive.file(f"{layer}/etc/systemd/system/{_UNIT}", unit.read_bytes())
        for target in re.findall(r"^WantedBy=(\S+)$", unit.read_text(), re.MULTILINE):
            archive.symlink(f"{layer}/etc/systemd/system/{target}.wants/{_UNIT}", f"../{_UNIT}")


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


def _package_files() -> Iterator[tuple[str, Path]]:
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise OperatorError(
                f"the package {package} is not installed", hint="make setup", code=ExitCode.UNAVAILABLE
            )
        base = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(base.rglob("*")):
            if path.suffix in _WANTED and path.is_file():
                yield f"{package}/{path.relative_to(base).as_posix()}", path


def _unit() -> Path | None:
    spec = importlib.util.find_spec("tmem_guest")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    places = (package / "systemd" / _UNIT, package.parent / "systemd" / _UNIT)
    return next((path for path in places if path.is_file()), None)
