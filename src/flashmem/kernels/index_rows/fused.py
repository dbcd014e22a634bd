"""Index rows in one Triton kernel: the bytes of the definition.

Shape letters: N = chunks, I = index_head_dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_parts import e4m3_bits, hadamard_rows, max_or_nan

BLOCK_ROWS = 16


def encode_index_rows_fused(keys: torch.Tensor) -> torch.Tensor:
    dim = keys.shape[-1]
    if dim & (dim - 1) or dim < 4:
        raise ValueError(f"the fused kernel takes a power of two of channels, at least 4, got {dim}")
    rows = keys.new_empty((*keys.shape[:-1], dim + 4), dtype=torch.uint8)
    count = keys.numel() // dim
    _encode_kernel[(triton.cdiv(count, BLOCK_ROWS),)](
        keys.contiguous(), rows, count, CHANNELS=dim, STEPS=dim.bit_length() - 1, BLOCK_ROWS=BLOCK_ROWS
    )
    return rows


@triton.jit(do_not_specialize=["count"])
def _encode_kernel(
    keys_ptr, rows_ptr, count, CHANNELS: tl.constexpr, STEPS: tl.constexpr, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channels = tl.arange(0, CHANNELS)
    inside = (row < count)[:, None]
    row = row.to(tl.int64)
    x = tl.load(keys_ptr + row[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    x = hadamard_rows(x, BLOCK_ROWS, CHANNELS, STEPS)
    scale = max_or_nan(tl.max(tl.abs(x), axis=1), 1e-4) * (1 / 448.0)
    values = e4m3_bits(tl.div_rn(x, tl.broadcast_to(scale[:, None], (BLOCK_ROWS, CHANNELS))))
    start = rows_ptr + row * (CHANNELS + 4)
    tl.store(start[:, None] + channels[None, :], values, mask=inside)
    tl.store((start + CHANNELS).to(tl.pointer_type(tl.float32)), scale, mask=row < count)


__all__ = ["encode_index_rows_fused"]
