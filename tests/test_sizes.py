"""Sizes as people write them."""

from __future__ import annotations

import pytest

from p2pnode.errors import ConfigError
from p2pnode.sizes import format_size, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("200 kB", 200_000),
        ("200kB", 200_000),
        ("1.5MB", 1_500_000),
        ("2GiB", 2 << 30),
        (" 0.5 KiB ", 512),
        ("1 TB", 10**12),
        ("7", 7),
        ("7 B", 7),
        ("3M", 3_000_000),
        ("64 Ki", 65_536),
        ("1.1 GB", 1_100_000_000),
    ],
)
def test_sizes_people_write(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_rate(f"{text.strip()}/s") == size


WRONG = ("", "much", "-1 kB", "1e3", "1,5 MB", "2 XB", "5 iB", "0", "0.1 B", "1..5 MB", "٣ kB", "1 kB/min", "9" * 40)


@pytest.mark.parametrize("text", WRONG)
def test_anything_else_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^budget is .*; write it like 200 kB, 1.5 MB or 2 GiB$"):
        parse_size(text, "budget")


@pytest.mark.parametrize("text", ["200 kb", "200kbit", "10 Mb/s", "8 mbps"])
def test_bits_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="bits"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_500_000, "1.5 MB"), (999_999, "1 MB"), (2 << 30, "2.15 GB")],
)
def test_sizes_to_read(size: int, text: str) -> None:
    assert format_size(size) == text
