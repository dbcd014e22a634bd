"""How much a tile may hold, which depends on the kind of device."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def for_device(sizes: Mapping[str, int], device: torch.device) -> int:
    """A size by kind of device; kinds that are not named are like CUDA."""
    return sizes.get(device.type, sizes["cuda"])


__all__ = ["for_device"]
