"""What an installation brings along, with a checkout and without."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST_UNITS = sorted((ROOT / "host/systemd").glob("*.service"))


def test_every_unit_and_configuration_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    installed = {name for names in setuptools["data-files"].values() for name in names}
    there = [*ROOT.glob("*/systemd/*.*"), ROOT / "guest/systemd/agent.toml", ROOT / "host/tmemd.toml"]
    assert len(there) >= 5
    assert {path.relative_to(ROOT).as_posix() for path in there} <= installed
    assert all((ROOT / name).is_file() for name in installed)


def test_every_program_is_where_the_entry_points_say() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, _, function = target.partition(":")
        places = [ROOT / side / f"{module.replace('.', '/')}.py" for side in ("host", "guest")]
        assert any(f"def {function}(" in place.read_text() for place in places if place.is_file()), target


@pytest.mark.parametrize(
    ("unit", "template", "release"),
    [
        *((path, "tmem_host/templates/unit.service.j2", "venv/bin") for path in HOST_UNITS),
        (ROOT / "guest/systemd/tmem-agent.service", "tmem_guest/templates/tmem-agent.service.j2", "bin"),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else None,
)
def test_systemd_accepts_the_units_that_the_roles_write(
    unit: Path, template: str, release: str, tmp_path: Path
) -> None:
    programs = tmp_path / release
    programs.parent.mkdir(exist_ok=True)
    programs.symlink_to(Path(sys.executable).parent)
    written = tmp_path / unit.name
    variables = {
        "item": unit.name,
        "role_path": str(ROOT / "ansible/roles" / template.partition("/")[0]),
        "tmem_host_release": str(tmp_path),
        "tmem_host_unit_source": str(ROOT / "host/systemd"),
        "tmem_guest_prefix": str(tmp_path),
        "ansible_python_interpreter": sys.executable,
    }
    argv = [str(Path(sys.executable).with_name("ansible")), "localhost", "-i", "localhost,", "-c", "local"]
    argv += ["-m", "template", "-a", f"src={ROOT / 'ansible/roles' / template} dest={written}"]
    done = subprocess.run(
        [*argv, "-e", json.dumps(variables)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"={programs}/" in written.read_text(), "it starts what the role installed"
    said = subprocess.run(
        ["systemd-analyze", "verify", written], capture_output=True, text=True, timeout=60, check=False
    )
    assert (said.returncode, said.stderr) == (0, "")
