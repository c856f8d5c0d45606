"""agent.toml and sizes: what is taken, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tmem_guest import config
from tmem_guest.errors import AgentError, ExitCode
from tmem_guest.units import format_size, parse_size

REPOSITORY = Path(__file__).parents[2]


def refusal(text: str) -> AgentError:
    with pytest.raises(AgentError) as caught:
        config.parse(text, "agent.toml")
    assert caught.value.code == ExitCode.USAGE
    assert str(caught.value).startswith("agent.toml")
    return caught.value


def test_everything_has_a_default() -> None:
    assert config.parse("", "x") == config.AgentConfig()


def test_a_full_file() -> None:
    got = config.parse(
        """
        endpoint = "unix:/run/x.sock"
        report_interval_s = 2
        [[mount]]
        directory = "/srv"
        [[mount]]
        directory = "/data"
        at = "/cached"
        options = ["--threads=2"]
        [swap]
        size = "512M"
        file = "/data/swap"
        device = "nbd"
        priority = 0
        """,
        "x",
    )
    assert [mount.mount_point for mount in got.mount] == ["/srv", "/cached"]
    assert got.swap is not None
    assert got.swap.size_bytes == 512 << 20
    assert config.parse_endpoint(got.endpoint) == "/run/x.sock"


def test_the_example_is_valid() -> None:
    text = (REPOSITORY / "guest/systemd/agent.toml").read_text()
    config.parse(text, "example")
    # What is commented out must be valid, too.
    enabled = "\n".join(line.removeprefix("#") for line in text.splitlines() if not line.startswith("# "))
    got = config.parse(enabled, "example")
    assert len(got.mount) == 2
    assert got.swap is not None


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("enpoint = 'vsock:2:1'", "unknown key enpoint", "endpoint"),
        ("[swap]\nsize='1M'\nprioritty=3", "unknown key swap.prioritty", "priority"),
        (
            "[[mount]]\ndirectory='/a'\n[[mount]]\ndir='/b'\ndirectory='/c'",
            "unknown key mount[1].dir",
            "directory",
        ),
        ("zzz = 1", "unknown key zzz", "one of endpoint"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(text: str, message: str, hint: str) -> None:
    error = refusal(text)
    assert message in error.message.replace("...", "1")
    assert hint in error.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("endpoint = 'tcp:1'", "expected vsock:CID:PORT or unix:/path"),
        ("endpoint = 'vsock:2'", "expected vsock:CID:PORT"),
        ("endpoint = 'vsock:4294967296:1'", "expected vsock:CID:PORT"),
        ("endpoint = 'unix:relative'", "expected vsock:CID:PORT"),
        ("endpoint = 3", "Expected `str`"),
        ("[swap]\n", "size"),
        ("[swap]\nsize='lots'", "is not a size"),
        ("[swap]\nsize='-1M'", "is not a size"),
        ("[swap]\nsize=0", "the least is 1M"),
        ("[swap]\nsize='1M'\nfile='swap'", "not an absolute path"),
        ("[swap]\nsize='1M'\npriority=32768", "0 to 32767"),
        ("[swap]\nsize='1M'\ndevice='floppy'", "floppy"),
        ("[[mount]]\nat='/x'", "directory"),
        ("[[mount]]\ndirectory='srv'", "not an absolute path"),
        ("[[mount]]\ndirectory='/srv'\nat='here'", "not an absolute path"),
        ("[[mount]]\ndirectory='/a'\nat='/b'\n[[mount]]\ndirectory='/b'", "mounted twice"),
        ("report_interval_s = 0", "above 0"),
        ("ready_timeout_s = nan", "above 0"),
        ("a = = b", "not valid TOML"),
    ],
)
def test_bad_values_are_refused(text: str, said: str) -> None:
    assert said in refusal(text).message


def test_a_named_file_must_exist_and_be_readable(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="does not exist"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "latin1.toml").write_bytes(b"endpoint = '\xe4'")
    with pytest.raises(AgentError, match="cannot read"):
        config.load(tmp_path / "latin1.toml")


@given(st.integers(min_value=0, max_value=1 << 50))
def test_sizes_round_trip(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == size_bytes
    # What is printed has one decimal at most, of a unit that is at most 1024 times smaller.
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.06, abs=0)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("4096", 4096),
        ("1K", 1024),
        ("512M", 512 << 20),
        ("1.5G", 3 << 29),
        ("2 GiB", 2 << 30),
        ("1tb", 1 << 40),
    ],
)
def test_sizes_as_written(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


def test_swap_size_is_whole_pages() -> None:
    assert config.SwapConfig(size=(1 << 20) + 4095).size_bytes == 1 << 20
