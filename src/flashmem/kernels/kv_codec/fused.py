"""Rows of fp8 entries in one Triton kernel: the bytes of the definition.

Shape letters: N = entries, D = head_dim, E = bytes of an entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_parts import bf16_bits, e4m3_bits

BLOCK_ROWS = 4
SCALE_BLOCK: tl.constexpr = tl.constexpr(64)
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


def encode_fp8_fused(kv_ND: torch.Tensor, rope_dim: int, scale_bytes: int) -> torch.Tensor:
    count, head_dim = kv_ND.shape
    plain = head_dim - rope_dim
    rows_NE = kv_ND.new_empty(count, plain + 2 * rope_dim + scale_bytes, dtype=torch.uint8)
    if rows_NE.shape[1] % 2 or (rope_dim and plain % 2):
        raise ValueError(f"the fused kernel writes bf16 rotary channels at even bytes, got {plain} plain channels")
    _encode_kernel[(triton.cdiv(count, BLOCK_ROWS),)](
        kv_ND.contiguous(), rows_NE, count, HEAD_DIM=head_dim, ROPE_DIM=rope_dim, SCALE_BYTES=scale_bytes,
        BLOCKS=triton.next_power_of_2(scale_bytes), BLOCK_ROPE=triton.next_power_of_2(max(1, rope_dim)),
        BLOCK_ROWS=BLOCK_ROWS,
    )  # fmt: skip
    return rows_NE


@triton.jit(do_not_specialize=["count"])
def _encode_kernel(
    kv_ptr, rows_ptr, count, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, SCALE_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_ROPE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    PLAIN: tl.constexpr = HEAD_DIM - ROPE_DIM
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < count
    row = row.to(tl.int64)
    source = kv_ptr + row * HEAD_DIM
    target = rows_ptr + row * (PLAIN + 2 * ROPE_DIM + SCALE_BYTES)

    block = tl.arange(0, BLOCKS)
    channel = block[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    inside = live[:, None, None] & (channel < PLAIN)[None, :, :]
    x = tl.load(source[:, None, None] + channel[None, :, :], mask=inside, other=0.0).to(tl.float32)
    amax = tl.minimum(tl.max(tl.where(x != x, 0.0, tl.abs(x)), axis=2), LARGEST)
    amax = tl.where(tl.max((x != x).to(tl.int32), axis=2) > 0, 448.0, tl.maximum(amax, 1e-4))
    # amax = mantissa * 2^exponent with 0.5 <= mantissa < 1; 448 = 0.875 * 2^9
    bits = amax.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 126 - 9 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(target[:, None, None] + channel[None, :, :], e4m3_bits(x * inverse[:, :, None]), mask=inside)

    has_scale = (block * SCALE_BLOCK < PLAIN)[None, :]
    scales = tl.where(has_scale, exponent + 127, 0).to(tl.uint8)
    first = PLAIN + 2 * ROPE_DIM
    tl.store(target[:, None] + first + block[None, :], scales, mask=live[:, None] & (block < SCALE_BYTES)[None, :])
    if ROPE_DIM > 0:
        within = tl.arange(0, BLOCK_ROPE)
        rotary = live[:, None] & (within < ROPE_DIM)[None, :]
        rope = tl.load(source[:, None] + PLAIN + within[None, :], mask=rotary, other=0.0).to(tl.float32)
        pointer = (target + PLAIN).to(tl.pointer_type(tl.uint16))[:, None] + within[None, :]
        tl.store(pointer, bf16_bits(rope), mask=rotary)


__all__ = ["encode_fp8_fused"]
