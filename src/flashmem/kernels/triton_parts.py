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
def e4m3_bits(x):
    """Float32 as e4m3 bytes: nearest, ties to even, saturated at 448; NaN stays NaN.

    In integers, so that every device and the interpreter round alike.
    """
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 steps are 2^-9 wide, as those of float32 are from 2^14 on
    small = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code) | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)
    return code.to(tl.uint8)


@triton.jit
def bf16_bits(x):
    """Float32 as the two bytes of a bfloat16, uint16: nearest, ties to even; in integers for the same reason."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Float32 values that DTYPE holds: the nearest to those of x."""
    if DTYPE.is_bf16():
        return bf16_bits(x).to(tl.bfloat16, bitcast=True).to(tl.float32)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def turn_pairs(x, others, turned, rotates, cos_ptr, sin_ptr, SIGN: tl.constexpr):
    """Float32 x with its rotary embedding where `rotates`; SIGN -1 turns back.

    `others` are the other channels of the interleaved pairs, `turned` channels from the first rotated one; the pointers
    are those of one table of cosines and sines.
    """
    cos = tl.load(cos_ptr + turned // 2, mask=rotates, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + turned // 2, mask=rotates, other=0.0).to(tl.float32)
    return x * cos + tl.where((turned & 1) == 0, -SIGN, SIGN) * (others * sin)


@triton.jit
def hadamard_rows(x, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr):
    """Float32 rows [ROWS, CHANNELS] turned in blocks of 2^STEPS channels: the sums of the definition, in its order."""
    for step in tl.static_range(STEPS):
        pairs = tl.reshape(x, (ROWS, CHANNELS // (2 << step), 2, 1 << step))
        first = (tl.arange(0, 2) == 0)[None, None, :, None]
        plus = tl.sum(pairs, axis=2, keep_dims=True)
        minus = tl.sum(tl.where(first, pairs, -pairs), axis=2, keep_dims=True)
        x = tl.reshape(tl.where(first, plus, minus), (ROWS, CHANNELS))
    return x * (1 << STEPS) ** -0.5


@triton.jit
def rank_bits(scores):
    """Float32 scores as uint32 in the same order; 0 is below all of them. -0.0 and 0.0 are one score."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.maximum(bits.to(tl.uint32, bitcast=True) ^ 0x80000000, 1)


@triton.jit
def largest(ranks, count):
    """Places of the `count` largest of `ranks` [N] in their order, -1 for all others; and how many there are.

    The first ones win among equals; a rank of 0 is never picked. Ranks are unsigned, N is below 2^16. The smallest
    picked rank lies in `least`..`top`. A round counts twice in one sum and leaves a third of that range; the last one
    is where either all ranks of the range are picked or it holds a single rank.
    """
    top = tl.max(ranks, axis=0)
    # three steps of a float32 exponent below the best: most rows have their smallest picked rank there
    near = tl.maximum(top - tl.minimum(top, 3 << 23), 1)
    found, beyond = _at_least(ranks, 1, near)
    count = tl.minimum(count, found)
    least = tl.full([], 1, ranks.dtype)
    if beyond >= count:
        least, found, beyond = near, beyond, 0
    else:
        top = near - 1
    while (found != count) & (least < top):
        third = (top - least) // 3 + 1
        low, high = least + third, top - third + 1
        at_low, at_high = _at_least(ranks, low, high)
        if at_high >= count:
            least, found = high, at_high
        else:
            if at_low >= count:
                least, found = low, at_low
                top, beyond = high - 1, at_high
            else:
                top, beyond = low - 1, at_low
    room = count - beyond
    above = ranks > top
    within = (ranks >= least) & (ranks <= top)
    both = above.to(tl.uint32) + (within.to(tl.uint32) << 16)
    before = tl.cumsum(both, axis=0) - both
    above_before, within_before = _halves(before)
    picked = above | (within & (within_before < room))
    return tl.where(picked, above_before + tl.minimum(within_before, room), -1), count


@triton.jit
def _at_least(ranks, low, high):
    """How many of `ranks` are at least `low`, how many at least `high`."""
    return _halves(tl.sum((ranks >= low).to(tl.uint32) + ((ranks >= high).to(tl.uint32) << 16), axis=0))


@triton.jit
def _halves(both):
    """Two counts below 2^16 that were summed as one number: the lower, the higher."""
    return (both & 0xFFFF).to(tl.int32), (both >> 16).to(tl.int32)
