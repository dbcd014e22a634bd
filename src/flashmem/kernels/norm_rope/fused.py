"""Norm and rotary embedding in one Triton kernel: a program per row.

The other channel of a pair is loaded again, from the cache, rather than passed between threads: so pairs may begin at
any channel. Shape letters: R = rows, D = channels, G = tables, P = rotated pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_parts import turn_pairs

MOST_CHANNELS = 16_384


def norm_rope_fused(
    x: torch.Tensor,
    eps: float | None,
    weight_D: torch.Tensor | None,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    inverse: bool,
) -> torch.Tensor:
    channels = x.shape[-1]
    if channels > MOST_CHANNELS:
        raise ValueError(f"{channels} channels; the fused kernel takes at most {MOST_CHANNELS}")
    x = x.contiguous()
    out, rows, block = torch.empty_like(x), x.numel() // channels, triton.next_power_of_2(channels)
    cos_GP, sin_GP = (x, x) if rope is None else (rope[0].contiguous(), rope[1].contiguous())
    _norm_rope_kernel[(rows,)](
        x, x if weight_D is None else weight_D.contiguous(), cos_GP, sin_GP, out, 0.0 if eps is None else eps,
        1 if rope is None else rows // len(cos_GP),
        CHANNELS=channels, PAIRS=0 if rope is None else cos_GP.shape[1], NORM=eps is not None,
        WEIGHTED=weight_D is not None, SIGN=-1 if inverse else 1, BLOCK=block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return out


@triton.jit
def _normed(x, weight_ptr, channels, inside, scale, NORM: tl.constexpr, WEIGHTED: tl.constexpr):
    """`channels` of a row, in float32 but rounded to the dtype of x."""
    y = x.to(tl.float32)
    if NORM:
        if WEIGHTED:
            y = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32) * (y * scale)
        else:
            y = y * scale.to(x.dtype).to(tl.float32)
    return y.to(x.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["rows_per_table"])
def _norm_rope_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, eps, rows_per_table,
    CHANNELS: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr, SIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = row.to(tl.int64) * CHANNELS
    channels = tl.arange(0, BLOCK)
    inside = channels < CHANNELS
    x = tl.load(x_ptr + start + channels, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / CHANNELS + eps)
    y = _normed(x, weight_ptr, channels, inside, scale, NORM, WEIGHTED)
    if PAIRS:
        turned = channels - (CHANNELS - 2 * PAIRS)
        rotates = (turned >= 0) & inside
        other_of_pair = tl.where(rotates, (turned ^ 1) + (CHANNELS - 2 * PAIRS), 0)
        other = tl.load(x_ptr + start + other_of_pair, mask=rotates, other=0.0)
        other = _normed(other, weight_ptr, other_of_pair, rotates, scale, NORM, WEIGHTED)
        table = (row // rows_per_table) * PAIRS
        y = turn_pairs(y, other, turned, rotates, cos_ptr + table, sin_ptr + table, SIGN)
    tl.store(out_ptr + start + channels, y.to(out_ptr.dtype.element_ty), mask=inside)


__all__ = ["norm_rope_fused"]
