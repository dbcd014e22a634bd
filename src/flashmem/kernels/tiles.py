"""How much a tile may hold, which depends on the kind of device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

MOST_QUERIES = 1 << 15
"""Queries of one launch in prefill: a grid has fewer than 65,536 programs in their dimension."""


def for_device(sizes: Mapping[str, int], device: torch.device) -> int:
    """A size by kind of device; kinds that are not named are like CUDA."""
    return sizes.get(device.type, sizes["cuda"])


__all__ = ["MOST_QUERIES", "for_device"]
