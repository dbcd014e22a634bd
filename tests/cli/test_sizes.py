"""Sizes as people write them."""

from __future__ import annotations

import pytest

from flashmem.cli.sizes import format_bytes, parse_bytes, parse_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("46K", 47_104),
        ("46k", 47_104),
        ("1M", 1_048_576),
        ("0.5K", 512),
        ("131072", 131_072),
        ("1_000", 1000),
        ("0", 0),
    ],
)
def test_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "count"), [("8GiB", 8 << 30), ("8 GB", 8 * 10**9), ("512B", 512), ("1.5KiB", 1536), ("7", 7)]
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "K", "-1", "1G", "1e3", "0.3", "0.0001K", "1 2"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_tokens(text)


@pytest.mark.parametrize("text", ["8K", "8gib", "1.5", "GiB"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_bytes(text)


def test_formatted_bytes() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 938_304, 1 << 30, 5 << 50)] == [
        "0 B", "1023 B", "1.00 KiB", "916.3 KiB", "1.00 GiB", "5120.0 TiB",
    ]  # fmt: skip
