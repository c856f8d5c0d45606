"""Configuration files are read, and refused with file, key and a suggestion."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tmem_host.config import TmemdConfig, load, resolve_capacity
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.service.main import configuration


def write(directory: Path, text: str) -> Path:
    path = directory / "tmemd.toml"
    path.write_text(text)
    return path


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, ""), TmemdConfig) == TmemdConfig()


def test_values_are_read(tmp_path: Path) -> None:
    text = "[arena]\npath = 'memfd'\ncapacity = '2G'\n[limits]\nconnections = 4\nkeep_alive_s = 1.5\n"
    config = load(write(tmp_path, text), TmemdConfig)
    assert (config.arena.path, config.arena.capacity) == ("memfd", "2G")
    assert (config.limits.connections, config.limits.keep_alive_s) == (4, 1.5)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[arena]\npth = 'x'", "unknown key 'arena.pth'", "did you mean 'arena.path'?"),
        ("zzz = 1", "unknown key 'zzz'", "known are arena"),
        ("[limits]\nconnections = '4'", "key 'limits.connections'", ""),
        ("[limits]\nconnections = 0", "connections is at least 1", ""),
        ("[limits]\nframe_timeout_s = 0", "frame_timeout_s is over 0", ""),
        ("[limits]\npages_per_s = -1", "pages_per_s is not negative", ""),
        ("[limits]\nin_flight = 'x'", "'x' is not a size", ""),
        ("[arena]\npath = 'relative'", "absolute", ""),
        ("[arena]\ncapacity = '0%'", "not between 0% and 100%", ""),
        ("[arena]\nincompressible = 'burn'", "'store' or 'refuse'", ""),
        ("[sockets]\nmode = '0999'", "key 'sockets'", ""),
        ("[sockets]\nvsock = 'maybe'", "'auto', 'on' or 'off'", ""),
        ("[log]\nlevel = 'loud'", "'debug'", ""),
        ("[arena", "not valid TOML", ""),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str, hint: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(OperatorError) as refused:
        load(path, TmemdConfig)
    assert str(path) in refused.value.message
    assert message in refused.value.message
    assert hint in refused.value.hint
    assert refused.value.code is ExitCode.USAGE


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"nowhere\.toml cannot be read"):
        load(tmp_path / "nowhere.toml", TmemdConfig)


def test_options_override_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[arena]\ncapacity = '1G'\npath = '/a'\n")
    config = configuration(path, {("arena", "capacity"): "2G", ("arena", "path"): None})
    assert (config.arena.capacity, config.arena.path) == ("2G", "/a")
    with pytest.raises(OperatorError, match="command line"):
        configuration(path, {("arena", "capacity"): "much"})


@pytest.mark.parametrize(
    ("capacity", "size_bytes"),
    [("25%", 2500), ("100%", 10_000), ("0.5%", 50), ("4K", 4096), ("1.5M", 3 << 19)],
)
def test_capacity(capacity: str, size_bytes: int) -> None:
    assert resolve_capacity(capacity, 10_000) == size_bytes


@pytest.mark.parametrize("capacity", ["-1%", "101%", "x%", "", "-5"])
def test_capacity_that_is_none(capacity: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        resolve_capacity(capacity, 10_000)


def test_the_example_file_states_the_defaults() -> None:
    example = Path(__file__).parents[2] / "host" / "tmemd.toml"
    assert load(example, TmemdConfig) == TmemdConfig()
    text = example.read_text()
    for field in msgspec.structs.fields(TmemdConfig):
        for key in msgspec.structs.fields(field.type):
            assert f"\n{key.name} = " in text, key.name
