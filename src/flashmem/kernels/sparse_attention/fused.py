"""Decode attention in Triton over rows that are read in place, K and V being one tensor.

A program takes a block of heads of one session and its share of the keys: it loads each key once, decodes it, uses it
as key and as value, and keeps a running softmax. With several shares a second kernel merges them; the sink joins last.

Shape letters: B = sessions, H = heads, D = head_dim, K = picks, S = shares of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from ..kv_codec import KVFormatSpec
from ..triton_parts import row_pointers, row_starts

if TYPE_CHECKING:
    from . import EntrySource

LOG2_E = math.log2(math.e)
SCALE_BLOCK: tl.constexpr = tl.constexpr(64)
"""Channels that share one scale of an fp8 entry."""
MOST_SHARES = 32

_EXACT = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the work is cut: heads and keys of one product, and programs that share the keys of one session.

    The bytes of entries are on their way `stages` - 1 blocks ahead.
    """

    heads: int
    keys: int
    shares: int
    warps: int = 8
    stages: int = 1


class RowForm(NamedTuple):
    """What a kernel must know of a source when it is compiled."""

    table: bool
    picks: bool
    page_chunks: int
    page_stride: int
    data_bytes: int
    tail_bytes: int
    alignment: int
    dtype: tl.dtype
    rope_dim: int


def attend_rows_fused(
    q_BHD: torch.Tensor,
    sources: Sequence[EntrySource],
    sinks_H: torch.Tensor,
    scale: float,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    if len(sources) not in (1, 2):
        raise ValueError(f"the fused kernel reads one or two sources, got {len(sources)}")
    forms = [_row_form(source) for source in sources]
    batch, heads, head_dim = q_BHD.shape
    out = torch.empty_like(q_BHD, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    tiles = tiles or default_tiles(q_BHD, sources)
    shares = tiles.shares
    partial = q_BHD.new_empty((batch, shares, heads, head_dim) if shares > 1 else (1,), dtype=torch.float32)
    peaks, totals = (q_BHD.new_empty((batch, shares, heads), dtype=torch.float32) for _ in range(2))
    block_heads = min(tiles.heads, max(16, triton.next_power_of_2(heads)))
    last = len(sources) - 1
    _attend_kernel[(shares, batch, triton.cdiv(heads, block_heads))](
        q_BHD.contiguous(), sinks_H, out, partial, peaks, totals, scale * LOG2_E,
        *_arguments(sources[0]), *_arguments(sources[last]),
        FIRST=forms[0], SECOND=forms[1] if last else None,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_HEADS=block_heads, BLOCK_DIM=max(64, triton.next_power_of_2(head_dim)),
        BLOCK_KEYS=tiles.keys, SPLIT=shares > 1, LOG2_E=LOG2_E, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if shares > 1:
        _merge_kernel[(heads, batch)](
            partial, peaks, totals, sinks_H, out,
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim),
            SHARES=shares, BLOCK_SHARES=triton.next_power_of_2(shares), LOG2_E=LOG2_E,
        )  # fmt: skip
    return out


def default_tiles(q_BHD: torch.Tensor, sources: Sequence[EntrySource]) -> Tiles:
    """As many shares as leave no multiprocessor idle, and no more than there are blocks of keys."""
    batch, heads, _ = q_BHD.shape
    block_heads, block_keys, stages = (64, 32, 3) if q_BHD.dtype.itemsize == 2 else (16, 16, 1)
    block_heads = min(block_heads, max(16, triton.next_power_of_2(heads)))
    blocks = sum(triton.cdiv(_num_keys(source), block_keys) for source in sources)
    programs = batch * triton.cdiv(heads, block_heads)
    units = torch.cuda.get_device_properties(q_BHD.device).multi_processor_count if q_BHD.is_cuda else 1
    shares = min(MOST_SHARES, max(1, blocks), max(1, units // programs))
    return Tiles(block_heads, block_keys, shares, stages=stages)


def _num_keys(source: EntrySource) -> int:
    return source.rows.max_rows if source.picks_BK is None else source.picks_BK.shape[1]


def _arguments(source: EntrySource) -> tuple[torch.Tensor | int, ...]:
    """Pointers and widths; a pointer that is not read may be any."""
    rows, picks = source.rows, source.picks_BK
    numbers = rows.counts_B if rows.numbers_BP is None else rows.numbers_BP
    return (
        rows.addresses_LB, numbers, rows.counts_B if picks is None else picks.contiguous(), rows.counts_B,
        0 if rows.numbers_BP is None else rows.numbers_BP.shape[1], 0 if picks is None else picks.shape[1],
    )  # fmt: skip


def _row_form(source: EntrySource) -> RowForm:
    rows, spec = source.rows, source.spec
    form, exact = rows.form, spec.exact_dtype
    if exact is None:
        _check_rope(spec)
    itemsize = 2 if exact is None else exact.itemsize  # of the widest load: the rotary channels of fp8 are bf16
    if rows.alignment % itemsize:
        raise ValueError(f"{spec.format} entries must be aligned to {itemsize} bytes, got {rows.alignment}")
    return RowForm(
        table=rows.numbers_BP is not None,
        picks=source.picks_BK is not None,
        page_chunks=form.page_chunks,
        page_stride=rows.page_stride,
        data_bytes=form.data_bytes,
        tail_bytes=form.tail_bytes,
        alignment=rows.alignment,
        dtype=tl.float8e4nv if exact is None else _EXACT[exact],
        rope_dim=spec.rope_dim,
    )


def _check_rope(spec: KVFormatSpec) -> None:
    block, nope = SCALE_BLOCK.value, spec.head_dim - spec.rope_dim
    if spec.rope_dim and nope // block != (spec.head_dim - 1) // block:
        raise ValueError(
            f"the rotary channels {nope}..{spec.head_dim - 1} must lie within one block of {block} for the fused kernel"
        )
    if nope % 2:
        raise ValueError(f"the fused kernel reads bf16 rotary channels at even bytes, got {nope} plain channels")


@triton.jit
def _num_rows(counts_ptr, b, picks_width, FORM: tl.constexpr):
    if FORM.picks:
        return picks_width
    return tl.load(counts_ptr + b)


@triton.jit
def _load_rows(block, count, picks_ptr, FORM: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """The rows of one block of a source; -1 where there is none."""
    rows = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    live = rows < count
    if FORM.picks:
        return tl.load(picks_ptr + rows, mask=live, other=-1).to(tl.int32)
    return tl.where(live, rows, -1)


@triton.jit
def _find(base, rows, numbers_ptr, FORM: tl.constexpr):
    """Where the data and tails of rows lie, and which of them there are."""
    live = rows >= 0
    data, tail = row_starts(
        base, tl.maximum(rows, 0), live, numbers_ptr, FORM.table, FORM.page_chunks, FORM.page_stride, FORM.data_bytes,
        FORM.tail_bytes,
    )  # fmt: skip
    return data, tail, live


@triton.jit
def _load_values(data, live, channels, FORM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The channels [keys, channels] as they are stored, of fp8 the plain ones; zeros where there are none."""
    END: tl.constexpr = HEAD_DIM - FORM.rope_dim if FORM.dtype == tl.float8e4nv else HEAD_DIM
    inside = live[:, None]
    if channels.shape[0] != END:
        inside = inside & (channels < END)[None, :]
    return tl.load(row_pointers(data, channels, FORM.dtype, FORM.alignment), mask=inside, other=0.0)


@triton.jit
def _load_scales(tail, live, FORM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCKS: tl.constexpr):
    """The scale bytes [keys, blocks] of fp8 entries; those of 1 where there are none."""
    if FORM.dtype == tl.float8e4nv:
        blocks = tl.arange(0, BLOCKS)
        scales = tl.load(
            tail.to(tl.pointer_type(tl.uint8))[:, None] + blocks[None, :],
            mask=live[:, None] & (blocks * SCALE_BLOCK < HEAD_DIM - FORM.rope_dim)[None, :],
            other=127,
        )
    else:
        scales = live
    return scales


@triton.jit
def _decode_fp8(
    values, scales, data, live, FORM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Entries [keys, channels], float32, from plain values and scale bytes; loads their rotary channels."""
    values = tl.reshape(values.to(tl.float32), (BLOCK_KEYS, BLOCKS, SCALE_BLOCK))
    # a ue8m0 scale is the exponent field of a float32
    factors = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)[:, :, None]
    if FORM.rope_dim > 0:
        PLAIN: tl.constexpr = HEAD_DIM - FORM.rope_dim
        LAST: tl.constexpr = PLAIN // SCALE_BLOCK
        BEFORE: tl.constexpr = PLAIN - LAST * SCALE_BLOCK
        within = tl.arange(0, SCALE_BLOCK)
        rotary = (within >= BEFORE) & (within < BEFORE + FORM.rope_dim)
        # the pointer stands BEFORE channels ahead of the first rotary one, so that columns meet
        pointers = row_pointers(data + (PLAIN - 2 * BEFORE), within, tl.bfloat16, FORM.alignment if BEFORE == 0 else 2)
        rope = tl.load(pointers, mask=live[:, None] & rotary[None, :], other=0.0).to(tl.float32)
        here = (tl.arange(0, BLOCKS) == LAST)[None, :, None] & rotary[None, None, :]
        # before the product: a choice after it would be one between bfloat16, channel by channel
        values = tl.where(here, rope[:, None, :], values)
        if BEFORE > 0:
            factors = tl.where(here, 1.0, factors)
    return tl.reshape(values * factors, (BLOCK_KEYS, BLOCKS * SCALE_BLOCK))


@triton.jit
def _attend_source(
    q, scale, acc, peak, total, begin, end, count, base, numbers_ptr, picks_ptr,
    FORM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Add the blocks `begin` to `end` of one source to the running softmax.

    The compiler copies the bytes of entries to shared memory blocks ahead, because their addresses do not depend on a
    load of the same round: the way to them is two loads deep, a pick and its page, each taken a block before the next.
    """
    BLOCK_DIM: tl.constexpr = q.shape[1]
    BLOCKS: tl.constexpr = BLOCK_DIM // SCALE_BLOCK
    channels = tl.arange(0, BLOCK_DIM)
    count = tl.minimum(count, end * BLOCK_KEYS)
    rows = _load_rows(begin, count, picks_ptr, FORM, BLOCK_KEYS)
    data, tail, live = _find(base, rows, numbers_ptr, FORM)
    scales = _load_scales(tail, live, FORM, HEAD_DIM, BLOCKS)
    rows = _load_rows(begin + 1, count, picks_ptr, FORM, BLOCK_KEYS)
    for block in tl.range(begin, end):
        kv = _load_values(data, live, channels, FORM, HEAD_DIM)
        if FORM.dtype == tl.float8e4nv:
            kv = _decode_fp8(kv, scales, data, live, FORM, HEAD_DIM, BLOCKS, BLOCK_KEYS)
        kv = kv.to(q.dtype)
        here = live
        data, tail, live = _find(base, rows, numbers_ptr, FORM)
        rows = _load_rows(block + 2, count, picks_ptr, FORM, BLOCK_KEYS)
        if FORM.picks:
            # always true, which the compiler cannot know: where it sees that one product feeds the other, it gives
            # the first a layout in which both halves of a program's warps compute all logits
            logits = tl.zeros([q.shape[0], BLOCK_KEYS], tl.float32)
            if block * BLOCK_KEYS < count:
                logits = tl.dot(q, tl.trans(kv), input_precision="ieee")
        else:
            logits = tl.dot(q, tl.trans(kv), input_precision="ieee")
        scales = _load_scales(tail, live, FORM, HEAD_DIM, BLOCKS)  # after a product: pages arrive meanwhile
        logits = tl.where(here[None, :], logits * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(peak - shift)
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(q.dtype), kv, acc * fade[:, None], input_precision="ieee")
        peak = higher
    return acc, peak, total


@triton.jit
def _attend_kernel(
    q_ptr, sinks_ptr, out_ptr, partial_ptr, peaks_ptr, totals_ptr, scale,
    addresses1_ptr, numbers1_ptr, picks1_ptr, counts1_ptr, table_width1, picks_width1,
    addresses2_ptr, numbers2_ptr, picks2_ptr, counts2_ptr, table_width2, picks_width2,
    FIRST: tl.constexpr, SECOND: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr, SPLIT: tl.constexpr,
    LOG2_E: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0)
    shares = tl.num_programs(0)  # not a constant: the same code serves any number but one
    b = tl.program_id(1)
    heads = tl.program_id(2) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    channels = tl.arange(0, BLOCK_DIM)
    inside = (heads < HEADS)[:, None] & (channels < HEAD_DIM)[None, :]
    at = heads[:, None] * HEAD_DIM + channels[None, :]
    q = tl.load(q_ptr + b.to(tl.int64) * (HEADS * HEAD_DIM) + at, mask=inside, other=0.0)
    peak = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)

    count1 = _num_rows(counts1_ptr, b, picks_width1, FIRST)
    blocks1 = tl.cdiv(count1, BLOCK_KEYS)
    blocks = blocks1
    if SECOND is not None:
        count2 = _num_rows(counts2_ptr, b, picks_width2, SECOND)
        blocks += tl.cdiv(count2, BLOCK_KEYS)
    each = tl.cdiv(blocks, shares)
    begin = share * each
    end = tl.minimum(begin + each, blocks)
    acc, peak, total = _attend_source(
        q, scale, acc, peak, total, begin, tl.minimum(end, blocks1), count1,
        tl.load(addresses1_ptr + b), numbers1_ptr + b * table_width1, picks1_ptr + b * picks_width1,
        FIRST, HEAD_DIM, BLOCK_KEYS,
    )  # fmt: skip
    if SECOND is not None:
        acc, peak, total = _attend_source(
            q, scale, acc, peak, total, tl.maximum(begin - blocks1, 0), end - blocks1, count2,
            tl.load(addresses2_ptr + b), numbers2_ptr + b * table_width2, picks2_ptr + b * picks_width2,
            SECOND, HEAD_DIM, BLOCK_KEYS,
        )  # fmt: skip
    if not SPLIT:
        sink = tl.load(sinks_ptr + heads, mask=heads < HEADS, other=0.0).to(tl.float32) * LOG2_E
        top = tl.maximum(peak, sink)
        fade = tl.exp2(peak - top)
        weight = fade / (total * fade + tl.exp2(sink - top))
        out = out_ptr + b.to(tl.int64) * (HEADS * HEAD_DIM) + at
        tl.store(out, (acc * weight[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = b.to(tl.int64) * shares + share
        tl.store(partial_ptr + part * (HEADS * HEAD_DIM) + at, acc, mask=inside)
        tl.store(peaks_ptr + part * HEADS + heads, peak, mask=heads < HEADS)
        tl.store(totals_ptr + part * HEADS + heads, total, mask=heads < HEADS)


@triton.jit
def _merge_kernel(
    partial_ptr, peaks_ptr, totals_ptr, sinks_ptr, out_ptr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_SHARES: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    shares = tl.arange(0, BLOCK_SHARES)
    channels = tl.arange(0, BLOCK_DIM)
    at = (b * SHARES + shares) * HEADS + head
    peak = tl.load(peaks_ptr + at, mask=shares < SHARES, other=float("-inf"))
    total = tl.load(totals_ptr + at, mask=shares < SHARES, other=0.0)
    sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
    top = tl.maximum(tl.max(peak, axis=0), sink)
    fade = tl.exp2(peak - top)
    whole = tl.sum(total * fade, axis=0) + tl.exp2(sink - top)
    inside = (shares < SHARES)[:, None] & (channels < HEAD_DIM)[None, :]
    acc = tl.load(partial_ptr + at[:, None] * HEAD_DIM + channels[None, :], mask=inside, other=0.0)
    out = tl.sum(acc * (fade / whole)[:, None], axis=0)
    pointer = out_ptr + (b * HEADS + head) * HEAD_DIM + channels
    tl.store(pointer, out.to(out_ptr.dtype.element_ty), mask=channels < HEAD_DIM)


__all__ = ["Tiles", "attend_rows_fused", "default_tiles"]
