"""Sizes as operators write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tmem_host.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512M", 512 << 20),
        ("1.5G", 3 << 29),
        (" 2 GiB ", 2 << 30),
        ("64mb", 64 << 20),
        ("1k", 1024),
        ("2T", 2 << 40),
        ("7B", 7),
    ],
)
def test_sizes_that_are_read(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "-1", "-5M", "M", "1X", "1.5.5G", "1,5G", "0x10", "1e9", "inf", "5 M M", "٣M x"]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="512M"):
        parse_size(text)


@given(st.integers(0, 1 << 60))
def test_what_is_written_is_read_back_nearly(size_bytes: int) -> None:
    assert abs(parse_size(format_size(size_bytes)) - size_bytes) <= size_bytes * 0.05


def test_sizes_for_people() -> None:
    assert [format_size(size) for size in (0, 1023, 1024, 1536 << 20, 512 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 GiB",
        "512 MiB",
        "3 TiB",
    ]
