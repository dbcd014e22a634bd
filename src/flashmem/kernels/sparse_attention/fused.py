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
LARGE_BATCH = 32
"""Blocks of 64 heads from which on larger blocks of keys pay."""

_EXACT = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the work is cut: heads and keys of one product, and programs that share the keys of one session.

    `stages` matters for a single source only: with two, loads are not pipelined.
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
        BLOCK_KEYS=tiles.keys, SHARES=shares, LOG2_E=LOG2_E, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if shares > 1:
        _merge_kernel[(heads, batch)](
            partial, peaks, totals, sinks_H, out,
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim),
            SHARES=shares, BLOCK_SHARES=triton.next_power_of_2(shares), LOG2_E=LOG2_E,
        )  # fmt: skip
    return out


def default_tiles(q_BHD: torch.Tensor, sources: Sequence[EntrySource]) -> Tiles:
    """What `choose_tiles` says of these queries on their device."""
    units = torch.cuda.get_device_properties(q_BHD.device).multi_processor_count if q_BHD.is_cuda else 1
    (batch, heads, _), keys = q_BHD.shape, [_num_keys(source) for source in sources]
    wide, picked = q_BHD.dtype.itemsize == 2, sources[-1].picks_BK is not None
    return choose_tiles(units, batch, heads, keys, wide=wide, picked=picked)


def choose_tiles(units: int, batch: int, heads: int, keys: Sequence[int], *, wide: bool, picked: bool) -> Tiles:
    """As many shares as leave none of the multiprocessors idle, and no more than there are blocks of keys.

    `keys`: of each source; `picked`: the last one's are picks. Where products are `wide`, in bfloat16, by what was
    fastest on an H100 (`results/gpu_kernels-sweep.jsonl`, `results/prefill_kernels.json`).
    """

    def tiles(most_heads: int, block_keys: int, warps: int) -> Tiles:
        block_heads = min(most_heads, max(16, triton.next_power_of_2(heads)))
        programs = batch * triton.cdiv(heads, block_heads)
        blocks = sum(triton.cdiv(count, block_keys) for count in keys)
        return Tiles(block_heads, block_keys, min(MOST_SHARES, max(1, blocks), max(1, units // programs)), warps)

    if not wide:
        return tiles(16, 16, 8)
    chosen = tiles(64, 32, 8)
    programs = batch * triton.cdiv(heads, chosen.heads)
    if chosen.heads == 16 and programs >= 8 * units and not picked:  # few heads of many queries, rows of neighbours
        return Tiles(16, 64, 1, 4)
    if chosen.heads == 64 and programs >= LARGE_BATCH and picked:
        return tiles(64, 64, 8)
    if chosen.heads == 64 and 4 * programs * chosen.shares <= units:  # few sessions: blocks of heads fill the device
        return tiles(16, 32, 4)
    return chosen


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
def _load_exact(
    data, live, channels, FORM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):  # fmt: skip
    """Entries [keys, channels] in their own type; zeros where not live."""
    inside = live[:, None]
    if HEAD_DIM != BLOCK_DIM:
        inside = inside & (channels < HEAD_DIM)[None, :]
    return tl.load(row_pointers(data, channels, FORM.dtype, FORM.alignment), mask=inside, other=0.0)


@triton.jit
def _load_fp8(
    data, tail, live, channels, FORM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Decoded fp8 entries [keys, channels], float32; zeros where not live."""
    PLAIN: tl.constexpr = HEAD_DIM - FORM.rope_dim
    BLOCKS: tl.constexpr = BLOCK_DIM // SCALE_BLOCK
    inside = live[:, None]
    values = tl.load(
        row_pointers(data, channels, FORM.dtype, FORM.alignment), mask=inside & (channels < PLAIN)[None, :], other=0.0
    ).to(tl.float32)
    blocks = tl.arange(0, BLOCKS)
    scales = tl.load(
        tail.to(tl.pointer_type(tl.uint8))[:, None] + blocks[None, :],
        mask=inside & (blocks * SCALE_BLOCK < PLAIN)[None, :],
        other=0,
    )
    # a ue8m0 scale is the exponent field of a float32
    scales = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    entries = tl.reshape(values, (BLOCK_KEYS, BLOCKS, SCALE_BLOCK)) * scales[:, :, None]
    if FORM.rope_dim > 0:
        LAST: tl.constexpr = (HEAD_DIM - 1) // SCALE_BLOCK
        BEFORE: tl.constexpr = PLAIN - LAST * SCALE_BLOCK
        within = tl.arange(0, SCALE_BLOCK)
        rotary = (within >= BEFORE) & (within < BEFORE + FORM.rope_dim)
        # the pointer stands BEFORE channels ahead of the first rotary one, so that columns meet
        pointers = row_pointers(data + (PLAIN - 2 * BEFORE), within, tl.bfloat16, FORM.alignment if BEFORE == 0 else 2)
        rope = tl.load(pointers, mask=inside & rotary[None, :], other=0.0).to(tl.float32)
        here = (blocks == LAST)[None, :, None] & rotary[None, None, :]
        entries = tl.where(here, rope[:, None, :], entries)
    return tl.reshape(entries, (BLOCK_KEYS, BLOCK_DIM))


@triton.jit
def _find_block(
    block, base, numbers_ptr, picks_ptr, count, FORM: tl.constexpr, BLOCK_KEYS: tl.constexpr
):  # fmt: skip
    """Where the data and tails of one block of a source lie, and which of its entries there are."""
    rows = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    live = rows < count
    if FORM.picks:
        picks = tl.load(picks_ptr + rows, mask=live, other=-1)
        live = picks >= 0
        rows = tl.maximum(picks, 0).to(tl.int32)
    data, tail = row_starts(
        base, rows, live, numbers_ptr, FORM.table, FORM.page_chunks, FORM.page_stride, FORM.data_bytes, FORM.tail_bytes
    )
    return data, tail, live


@triton.jit
def _load_block(
    data, tail, live, channels, FORM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    if FORM.dtype == tl.float8e4nv:
        kv = _load_fp8(data, tail, live, channels, FORM, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS)
    else:
        kv = _load_exact(data, live, channels, FORM, HEAD_DIM, BLOCK_DIM)
    return kv


@triton.jit
def _find_either(
    block, blocks1, base1, numbers1_ptr, picks1_ptr, count1, base2, numbers2_ptr, picks2_ptr, count2,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    if SECOND is None:
        data, tail, live = _find_block(block, base1, numbers1_ptr, picks1_ptr, count1, FIRST, BLOCK_KEYS)
    elif block < blocks1:
        data, tail, live = _find_block(block, base1, numbers1_ptr, picks1_ptr, count1, FIRST, BLOCK_KEYS)
    else:
        data, tail, live = _find_block(block - blocks1, base2, numbers2_ptr, picks2_ptr, count2, SECOND, BLOCK_KEYS)
    return data, tail, live


@triton.jit
def _num_rows(counts_ptr, b, picks_width, FORM: tl.constexpr):
    if FORM.picks:
        return picks_width
    return tl.load(counts_ptr + b)


@triton.jit
def _attend_kernel(
    q_ptr, sinks_ptr, out_ptr, partial_ptr, peaks_ptr, totals_ptr, scale,
    addresses1_ptr, numbers1_ptr, picks1_ptr, counts1_ptr, table_width1, picks_width1,
    addresses2_ptr, numbers2_ptr, picks2_ptr, counts2_ptr, table_width2, picks_width2,
    FIRST: tl.constexpr, SECOND: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr, SHARES: tl.constexpr,
    LOG2_E: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0)
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
    blocks2 = 0
    count2 = 0
    if SECOND is not None:
        count2 = _num_rows(counts2_ptr, b, picks_width2, SECOND)
        blocks2 = tl.cdiv(count2, BLOCK_KEYS)
    each = tl.cdiv(blocks1 + blocks2, SHARES)
    base1 = tl.load(addresses1_ptr + b)
    base2 = tl.load(addresses2_ptr + b)
    numbers1_ptr += b * table_width1
    numbers2_ptr += b * table_width2
    picks1_ptr += b * picks_width1
    picks2_ptr += b * picks_width2
    end = tl.minimum((share + 1) * each, blocks1 + blocks2)
    data, tail, live = _find_either(
        share * each, blocks1, base1, numbers1_ptr, picks1_ptr, count1, base2, numbers2_ptr, picks2_ptr, count2,
        FIRST, SECOND, BLOCK_KEYS,
    )  # fmt: skip
    # one loop over the blocks of both sources: a loop for each would keep two layouts of the sums alive
    for block in tl.range(share * each, end):
        if SECOND is None:  # a branch that only the compiler sees
            kv = _load_block(data, tail, live, channels, FIRST, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS).to(q.dtype)
        elif block < blocks1:
            kv = _load_block(data, tail, live, channels, FIRST, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS).to(q.dtype)
        else:
            kv = _load_block(data, tail, live, channels, SECOND, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS).to(q.dtype)
        here = live
        # the way to an entry is two loads deep: take it for the next block while this one is multiplied
        data, tail, live = _find_either(
            block + 1, blocks1, base1, numbers1_ptr, picks1_ptr, count1, base2, numbers2_ptr, picks2_ptr, count2,
            FIRST, SECOND, BLOCK_KEYS,
        )  # fmt: skip
        logits = tl.dot(q, tl.trans(kv), input_precision="ieee") * scale
        logits = tl.where(here[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(peak - shift)
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(q.dtype), kv, acc * fade[:, None], input_precision="ieee")
        peak = higher
    if SHARES == 1:
        sink = tl.load(sinks_ptr + heads, mask=heads < HEADS, other=0.0).to(tl.float32) * LOG2_E
        top = tl.maximum(peak, sink)
        fade = tl.exp2(peak - top)
        weight = fade / (total * fade + tl.exp2(sink - top))
        out = out_ptr + b.to(tl.int64) * (HEADS * HEAD_DIM) + at
        tl.store(out, (acc * weight[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = b.to(tl.int64) * SHARES + share
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


__all__ = ["Tiles", "attend_rows_fused", "choose_tiles", "default_tiles"]
