"""RMSNorm of rows, then the rotary embedding of their trailing channels: what attention does to queries and entries.

Shape letters: R = rows, D = channels, G = pairs of tables (rows of one session share theirs: G divides R), P = rotated
pairs of channels.
"""

from __future__ import annotations

from typing import Literal

import torch

from .reference import norm_rope_reference

Impl = Literal["reference", "fused"]


def norm_rope(
    x: torch.Tensor,
    *,
    eps: float | None = None,
    weight_D: torch.Tensor | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    inverse: bool = False,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Return x [..., D] normed if there is an `eps`, then rotated if there is a `rope` = cos and sin [..., P].

    Rows of x and tables are taken in order: with R rows and G tables, row r takes table r // (R / G). Pairs are
    interleaved, the last 2P channels; `inverse` turns them back. Every step rounds to the dtype of x as the modules of
    transformers from 5.20 do: with a weight once, at the end of the norm; without one the scale is rounded, too. The
    fused version (Triton) is one launch.
    """
    rows, channels = x.numel() // max(1, x.shape[-1]), x.shape[-1]
    if eps is None and (rope is None or weight_D is not None):
        raise ValueError("norm_rope needs an eps, to norm, or a rope without a weight")
    if weight_D is not None and weight_D.shape != (channels,):
        raise ValueError(f"the weight must be [{channels}], got {tuple(weight_D.shape)}")
    if rope is not None:
        rope = cos_GP, sin_GP = rope[0].flatten(0, -2), rope[1].flatten(0, -2)
        tables, pairs = cos_GP.shape
        if sin_GP.shape != cos_GP.shape or 2 * pairs > channels or not tables or rows % tables:
            raise ValueError(
                f"cos {tuple(cos_GP.shape)} and sin {tuple(sin_GP.shape)} do not fit {rows} rows of {channels} channels"
            )
    impl = impl or "reference"
    if impl == "reference" or (impl == "fused" and not x.numel()):
        return norm_rope_reference(x, eps, weight_D, rope, inverse)
    if impl == "fused":
        from .fused import norm_rope_fused  # needs triton

        return norm_rope_fused(x, eps, weight_D, rope, inverse)
    raise ValueError(f"unknown impl {impl!r}; choose 'reference' or 'fused'")


__all__ = ["norm_rope"]
