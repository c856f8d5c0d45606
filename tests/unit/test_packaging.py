"""What an installation without a checkout brings along."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_unit_and_configuration_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    installed = {name for names in setuptools["data-files"].values() for name in names}
    there = [*ROOT.glob("*/systemd/*.service"), ROOT / "guest/systemd/agent.toml", ROOT / "host/tmemd.toml"]
    assert len(there) >= 5
    assert {path.relative_to(ROOT).as_posix() for path in there} <= installed
    assert all((ROOT / name).is_file() for name in installed)


def test_every_program_is_where_the_entry_points_say() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, _, function = target.partition(":")
        places = [ROOT / side / f"{module.replace('.', '/')}.py" for side in ("host", "guest")]
        assert any(f"def {function}(" in place.read_text() for place in places if place.is_file()), target
