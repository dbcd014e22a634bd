"""Tokens and bytes as people write them: 46K, 1M, 8GiB."""

from __future__ import annotations

import re
from fractions import Fraction

_TOKENS = {"": 1, "K": 1024, "M": 1024**2}
_BYTES = {
    "": 1,
    "B": 1,
    **{prefix + "iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
    **{prefix + "B": 1000**power for power, prefix in enumerate("KMGT", 1)},
}
_LARGEST = (1 << 63) - 1
_NUMBER = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_tokens(text: str) -> int:
    """'46K' is 46 x 1024 tokens and '1M' 1024 x 1024; a plain number is itself. Raises ValueError."""
    return _parse(text, {**_TOKENS, **{unit.lower(): size for unit, size in _TOKENS.items()}}, "46K, 1M or 131072")


def parse_bytes(text: str) -> int:
    """'8GiB' is 8 x 2^30 bytes and '8GB' 8 x 10^9; a plain number is bytes. Raises ValueError."""
    return _parse(text, _BYTES, "8GiB, 500MB or 1000000")


def format_bytes(count: int) -> str:
    """Binary units: 938304 is '916.3 KiB'."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 4)
    value = count / 1024**power
    return f"{value:.{2 if value < 100 else 1}f} {'KMGT'[power - 1]}iB"


def _parse(text: str, units: dict[str, int], examples: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r} is not a size; write {examples}")
    value = Fraction(match[1].replace("_", "")) * units[match[2]]
    if value.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number")
    if value > _LARGEST:
        raise ValueError(f"{text[:40]!r} is too large: at most {_LARGEST:,}")
    return int(value)


__all__ = ["format_bytes", "parse_bytes", "parse_tokens"]
