"""Pieces that several Triton kernels share. Needs triton.

Device functions take blocks; names in capitals are compile-time constants.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def max_or_nan(a, b):
    """The larger of two, NaN if either is: a plain maximum would hide a NaN that the definition shows."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_starts(
    base,
    rows,
    live,
    numbers_ptr,
    TABLE: tl.constexpr,
    PAGE_CHUNKS: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    DATA_BYTES: tl.constexpr,
    TAIL_BYTES: tl.constexpr,
):
    """Byte addresses of the data and of the tail of `rows` (see `paged.PagedRows`) behind the region at `base`."""
    page = rows // PAGE_CHUNKS
    offset = rows % PAGE_CHUNKS
    if TABLE:
        page = tl.load(numbers_ptr + page, mask=live, other=0)
    start = base + page.to(tl.int64) * PAGE_STRIDE
    return start + offset * DATA_BYTES, start + PAGE_CHUNKS * DATA_BYTES + offset * TAIL_BYTES


@triton.jit
def row_pointers(starts, channels, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Pointers to the channels of rows that start at byte addresses `starts`, with what widens their loads."""
    pointers = starts.to(tl.pointer_type(DTYPE))[:, None] + channels[None, :]
    return tl.max_contiguous(tl.multiple_of(pointers, (1, ALIGNMENT)), (1, channels.shape[0]))


@triton.jit
def rank_bits(scores):
    """Float32 scores as uint32 in the same order; 0 is below all of them. -0.0 and 0.0 are one score."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.maximum(bits.to(tl.uint32, bitcast=True) ^ 0x80000000, 1)


@triton.jit
def largest(ranks, count, BITS: tl.constexpr):
    """Where the `count` largest of `ranks` [N] are, the first ones among equals; a rank of 0 is never picked.

    Ranks are unsigned below 2^BITS. The smallest picked rank is found bit by bit, from the highest.
    """
    count = tl.minimum(count, tl.sum((ranks > 0).to(tl.int32), axis=0))
    least = tl.full([], 0, ranks.dtype)
    found = count + 1  # ranks of at least `least`: not counted yet
    bit = BITS - 1
    while (bit >= 0) & (found != count):
        trial = least | (tl.full([], 1, ranks.dtype) << bit)
        reached = tl.sum((ranks >= trial).to(tl.int32), axis=0)
        if reached >= count:
            least = trial
            found = reached
        bit -= 1
    above = ranks > least
    equal = (ranks == least) & (ranks > 0)
    wanted = count - tl.sum(above.to(tl.int32), axis=0)
    before = tl.cumsum(equal.to(tl.int32), axis=0) - equal.to(tl.int32)
    return above | (equal & (before < wanted))
