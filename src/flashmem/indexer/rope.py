"""Interleaved rotary embedding of the trailing channels, from positions alone: no table, no clamp.

The one copy for training and serving; equal to what the backbone applies to its index keys.
Shape letters: H = heads, I = channels of a head, F = rope dim / 2 channel pairs.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from ..config import RopeConfig

MAX_POSITION = 1 << 24
"""Angles are products of float32 numbers, and float32 counts exactly up to here."""


@lru_cache(maxsize=32)
def rope_frequencies(rope: RopeConfig, device: torch.device | None = None) -> torch.Tensor:
    """Return float32 radians per token [F] (do not change it: it is shared).

    Computed on the CPU whatever the device, since powers differ between devices in the last bit.
    YaRN (arXiv 2309.00071): pairs that turn more than beta_fast times within original_positions keep their frequency,
    those that turn less than beta_slow times are slowed down by `factor`, with a linear ramp between; cos and sin
    are not scaled.
    """
    with torch.inference_mode(False):  # the cached tensor must serve autograd too
        frequencies = _frequencies(rope)
        return frequencies if device is None else frequencies.to(device)


def _frequencies(rope: RopeConfig) -> torch.Tensor:
    periods_F = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32, device="cpu") / rope.dim)
    if rope.factor == 1:
        return 1.0 / periods_F

    def pair_that_turns(rotations: float) -> float:
        return rope.dim * math.log(rope.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(rope.beta_slow)), rope.dim - 1)
    width = high - low if high != low else 0.001
    slowed_F = ((torch.arange(rope.dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    kept_F = 1 - slowed_F
    return 1.0 / (rope.factor * periods_F) * (1 - kept_F) + 1.0 / periods_F * kept_F


def rope_cos_sin(positions: torch.Tensor, rope: RopeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 cos and sin [..., F] of integer positions [...].

    Raises ValueError for a position below 0 or above 2^24.
    """
    if positions.is_floating_point() or positions.is_complex() or positions.dtype is torch.bool:
        raise ValueError(f"positions must be integers, got {positions.dtype}")
    if positions.numel():
        least, most = (int(x) for x in torch.aminmax(positions))
        if least < 0 or most > MAX_POSITION:
            raise ValueError(f"positions must lie in 0..{MAX_POSITION}, got {least}..{most}")
    angles = positions.unsqueeze(-1).float() * rope_frequencies(rope, positions.device)
    return angles.cos(), angles.sin()


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the adjacent channel pairs of the last 2F channels of x [..., I] in float32; keeps the dtype of x.

    cos and sin are [..., F] and broadcast against x.
    """
    plain, turned = x.split((x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    even, odd = turned.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((plain, rotated.to(x.dtype)), dim=-1)


def apply_rope(x: torch.Tensor, positions: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Rotate the last rope.dim channels of x [..., H, I] by integer positions [...]."""
    cos, sin = rope_cos_sin(positions, rope)
    return rotate_interleaved(x, cos.unsqueeze(-2), sin.unsqueeze(-2))


__all__ = ["MAX_POSITION", "apply_rope", "rope_cos_sin", "rope_frequencies", "rotate_interleaved"]
