"""Scoring in one Triton kernel: rows are read in place, once, and no product of a head leaves the chip.

A program takes a run of tiles of one session. For every layer and observed token it holds the query on the chip,
multiplies it with the keys of the tiles, adds w * relu(.) over the heads, and merges the logits of the run; what it
writes are logits, their ranks, or the reductions of its pages. relu(x) is (x + |x|) / 2, whose half is in w: additions
run at twice the rate of maxima. In prefill many queries share their keys: there a program takes the heads of several
queries as columns of one product, so that keys are read once for all of them (`score_queries`).

Shape letters: L = layers, B = sessions, M = observed tokens, H = heads, I = index_head_dim, N = chunks, P = pages,
T = terms of a query, S = queries of a prefill, E = bytes of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from ..kv_codec import PlanarForm
from ..paged import WIDEST_LOAD, PagedRows, key_form
from ..triton_parts import (
    bf16_bits,
    e4m3_bits,
    hadamard_rows,
    max_or_nan,
    rank_bits,
    rounded,
    row_pointers,
    row_starts,
    turn_pairs,
)
from .reference import FINISHED, QueryFinish

Precision = Literal["fp8", "fp8x2", "fp16", "bf16", "fp32"]
"""How a query enters the product: e4m3 with a scale per head, a sum of two such, or a wider type. The keys' own values
are exact in every one but `fp8` and `fp8x2`, which need e4m3 keys."""

MOST_HEADS = 256
QUERY_HEADS = 2
"""Heads of a query that one program of one warp prepares: no channel of a head is in another warp."""
ACCUMULATORS = 128 * 128
"""Products that one program of four warps holds: 128 registers a thread."""
COLUMNS = {1: 128, 2: 128, 4: 64}
"""Columns of a product of several queries by bytes of a channel: the heads of 8 queries of 16, or of 2 of 64."""

_QUERY_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8x2": torch.float8_e4m3fn,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
# largest magnitude of a scaled query; 0 leaves it as it is
_QUERY_LIMITS = {"fp8": 448.0, "fp8x2": 448.0, "fp16": 1.0, "bf16": 0.0, "fp32": 0.0}
_KEY_DTYPES = {2: tl.bfloat16, 4: tl.float32}


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the work is cut. `chunks` keys are scored at once, `run` times in a row by one program."""

    chunks: int
    run: int
    warps: int = 4
    stages: int = 3


def prepare_queries(
    q_LBMHI: torch.Tensor, w_LBMH: torch.Tensor, precision: Precision, finish: QueryFinish = FINISHED
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finish queries and weights, then: queries [L, B, M, T, H, I] in the type of the product, and float32 weights with
    the scales and relu's half."""
    heads, channels = q_LBMHI.shape[-2:]
    terms = 2 if precision == "fp8x2" else 1
    q = q_LBMHI.new_empty((*q_LBMHI.shape[:-2], terms, heads, channels), dtype=_QUERY_DTYPES[precision])
    w = torch.empty_like(w_LBMH, dtype=torch.float32, memory_format=torch.contiguous_format)
    queries = q_LBMHI.shape[:-2].numel()
    if queries:
        tables = finish.tables(queries, channels)
        if tables is not None and channels % 2:
            raise ValueError(f"the fused kernel rotates an even number of channels, got {channels}")
        cos_GP, sin_GP = (w, w) if tables is None else (tables[0].contiguous(), tables[1].contiguous())
        _prepare_kernel[(queries, triton.cdiv(heads, QUERY_HEADS))](
            q_LBMHI.contiguous(), w_LBMH.contiguous(), cos_GP, sin_GP, q, w,
            1 if tables is None else queries // len(cos_GP), finish.weight_scale,
            HEADS=heads, CHANNELS=channels, PAIRS=0 if tables is None else cos_GP.shape[1],
            HADAMARD_STEPS=(channels & -channels).bit_length() - 1 if finish.hadamard else 0,
            TERMS=terms, LIMIT=_QUERY_LIMITS[precision],
            BLOCK_HEADS=QUERY_HEADS, BLOCK_CHANNELS=triton.next_power_of_2(channels),
            num_warps=1,
        )  # fmt: skip
    return q, w


def score_logits(
    q_LBMTHI: torch.Tensor, w_LBMH: torch.Tensor, keys: PagedRows, *, mean: bool, tiles: Tiles | None = None
) -> torch.Tensor:
    """Float32 logits [B, N] of prepared queries, -inf past a session's count."""
    out = w_LBMH.new_empty(keys.batch, keys.max_rows)
    _launch(q_LBMTHI, w_LBMH, keys, out, None, None, "logits", 1, 1.0, 0.0, mean, tiles)
    return out


def score_ranks(
    q_LBMTHI: torch.Tensor, w_LBMH: torch.Tensor, keys: PagedRows, *, mean: bool = False, tiles: Tiles | None = None
) -> torch.Tensor:
    """Ranks uint32 [B, N] of the logits (see `triton_parts.rank_bits`), 0 past a session's count."""
    out = w_LBMH.new_empty(keys.batch, keys.max_rows, dtype=torch.uint32)
    _launch(q_LBMTHI, w_LBMH, keys, out, None, None, "ranks", 1, 1.0, 0.0, mean, tiles)
    return out


def score_queries(
    q_LBMTHI: torch.Tensor, w_LBMH: torch.Tensor, keys: torch.Tensor, visible_S: torch.Tensor,
    *, tiles: Tiles | None = None,
) -> torch.Tensor:  # fmt: skip
    """Ranks uint32 [S, N] of the scores of S queries, prepared as sessions of one layer and token, against shared keys.

    Keys are index rows, uint8 [N, I + 4], or exact, bf16 or fp32 [N, I]. Query s sees the first `visible_S[s]` (int32)
    of them; what it does not see has rank 0.
    """
    _, queries, _, terms, heads, channels = q_LBMTHI.shape
    rows_NE, form = keys.contiguous().view(torch.uint8), key_form(keys, channels)
    rows, width = rows_NE.shape
    if terms != 1 or q_LBMTHI.shape[0] * q_LBMTHI.shape[2] != 1:
        raise ValueError(f"prefill scores one layer, token and term of each query, got {tuple(q_LBMTHI.shape)}")
    if heads > MOST_HEADS:
        raise ValueError(f"{heads} heads; the fused kernel takes at most {MOST_HEADS}")
    out = w_LBMH.new_empty(queries, rows, dtype=torch.uint32)
    alignment = math.gcd(WIDEST_LOAD, width, rows_NE.data_ptr())
    key_dtype = _key_dtype(form, alignment, channels, q_LBMTHI.dtype)
    if not out.numel():
        return out
    block_heads = max(16, triton.next_power_of_2(heads))
    block_queries = max(1, COLUMNS[q_LBMTHI.dtype.itemsize] // block_heads)
    tiles = tiles or query_tiles(block_heads * block_queries, q_LBMTHI.dtype.itemsize)
    _score_queries_kernel[(triton.cdiv(rows, tiles.chunks * tiles.run), triton.cdiv(queries, block_queries))](
        q_LBMTHI, w_LBMH, rows_NE, visible_S, out, queries, rows,
        KEY=key_dtype, SCALED=form.tail_bytes > 0, HEADS=heads, CHANNELS=channels, ROW_BYTES=width,
        DATA_BYTES=form.data_bytes, ALIGNMENT=alignment, BLOCK_HEADS=block_heads,
        BLOCK_CHANNELS=max(32, triton.next_power_of_2(channels)), BLOCK_QUERIES=block_queries,
        BLOCK_CHUNKS=tiles.chunks, RUN=tiles.run, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return out


def query_tiles(columns: int, query_bytes: int) -> Tiles:
    """Tiles of `score_queries`, for products of so many columns."""
    chunks = min({1: 128, 2: 64, 4: 32}[query_bytes], ACCUMULATORS // columns)
    return Tiles(chunks, 8, stages=1 if query_bytes == 4 else 3)


def score_page_reductions(
    q_LBMTHI: torch.Tensor,
    w_LBMH: torch.Tensor,
    keys: PagedRows,
    *,
    page_chunks: int,
    temperature: float,
    threshold: float,
    mean: bool,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per page [B, P]: best logit, temperature * logsumexp(logit / temperature), chunks above threshold (int32)."""
    if page_chunks & (page_chunks - 1):
        raise ValueError(f"pages must have a power of two of chunks, got {page_chunks}")
    pages = triton.cdiv(keys.max_rows, page_chunks)
    best = w_LBMH.new_empty(keys.batch, pages)
    score = torch.empty_like(best)
    above = torch.empty_like(best, dtype=torch.int32)
    _launch(q_LBMTHI, w_LBMH, keys, best, score, above, "pages", page_chunks, temperature, threshold, mean, tiles)
    return best, score, above


def default_tiles(heads: int, query_bytes: int, keys: PagedRows, page_chunks: int) -> Tiles:
    """Tiles that fill the device with programs, each as long as that allows; `query_bytes` per channel, all terms."""
    most = {1: 128, 2: 64, 4: 32}[query_bytes]
    chunks = min(most, ACCUMULATORS // max(64, triton.next_power_of_2(heads)))
    programs = 1
    if keys.device.type == "cuda":
        programs = 4 * torch.cuda.get_device_properties(keys.device).multi_processor_count
    run = 16
    while run > 1 and keys.batch * triton.cdiv(keys.max_rows, run * chunks) < programs:
        run //= 2
    # float32 is for checks: 256 heads of 128 channels fill shared memory, and nothing is left to load ahead into
    return Tiles(chunks, max(run, triton.cdiv(page_chunks, chunks)), stages=1 if query_bytes == 4 else 3)


def _launch(
    q: torch.Tensor,
    w: torch.Tensor,
    keys: PagedRows,
    out: torch.Tensor,
    score: torch.Tensor | None,
    above: torch.Tensor | None,
    output: str,
    page_chunks: int,
    temperature: float,
    threshold: float,
    mean: bool,
    tiles: Tiles | None,
) -> None:
    layers, batch, tokens, terms, heads, channels = q.shape
    if (layers, batch) != (keys.num_layers, keys.batch):
        raise ValueError(f"queries of {layers} layers, {batch} sessions; keys of {keys.num_layers}, {keys.batch}")
    if heads > MOST_HEADS:
        raise ValueError(f"{heads} heads; the fused kernel takes at most {MOST_HEADS}")
    if keys.form.page_chunks & (keys.form.page_chunks - 1):
        raise ValueError(f"keys must be in pages of a power of two of chunks, got {keys.form.page_chunks}")
    key_dtype = _key_dtype(keys.form, keys.alignment, channels, q.dtype)
    if out.numel() == 0:
        return
    tiles = tiles or default_tiles(heads, q.dtype.itemsize * terms, keys, page_chunks)
    numbers = keys.numbers_BP
    _score_kernel[(triton.cdiv(keys.max_rows, tiles.chunks * tiles.run), batch)](
        q, w, keys.addresses_LB, keys.counts_B if numbers is None else numbers, keys.counts_B,
        out, out if score is None else score, out if above is None else above,
        batch, tokens, layers * tokens, out.shape[1], 0 if numbers is None else numbers.shape[1],
        1 / temperature, temperature, threshold, 1 / max(1, layers * tokens),
        OUTPUT=output, MEAN=mean, KEY=key_dtype, SCALED=keys.form.tail_bytes > 0, TERMS=terms,
        HEADS=heads, CHANNELS=channels,
        BLOCK_HEADS=max(16, triton.next_power_of_2(heads)), BLOCK_CHANNELS=max(32, triton.next_power_of_2(channels)),
        TABLE=numbers is not None, PAGE_CHUNKS=keys.form.page_chunks, PAGE_STRIDE=keys.page_stride,
        DATA_BYTES=keys.form.data_bytes, TAIL_BYTES=keys.form.tail_bytes, ALIGNMENT=keys.alignment,
        REDUCED_CHUNKS=page_chunks, BLOCK_CHUNKS=tiles.chunks, RUN=tiles.run, STAGES=tiles.stages,
        num_warps=tiles.warps,
    )  # fmt: skip


def _key_dtype(form: PlanarForm, alignment: int, channels: int, query_dtype: torch.dtype) -> tl.dtype:
    if form.tail_bytes:
        if (form.data_bytes, form.tail_bytes) != (channels, 4) or alignment % 4:
            raise ValueError(
                f"index rows of {channels} channels must be {channels} + 4 bytes, aligned to 4; "
                f"got {form.data_bytes} + {form.tail_bytes}, aligned to {alignment}"
            )
        return tl.float8e4nv
    itemsize, rest = divmod(form.data_bytes, channels)
    if rest or itemsize not in _KEY_DTYPES or alignment % itemsize:
        raise ValueError(
            f"exact keys of {channels} channels must be aligned bf16 or fp32, got {form.data_bytes} bytes, "
            f"aligned to {alignment}"
        )
    if query_dtype.itemsize < itemsize:
        raise ValueError(f"{query_dtype} queries would round {8 * itemsize}-bit keys")
    return _KEY_DTYPES[itemsize]


@triton.jit(do_not_specialize=["queries_per_table"])
def _prepare_kernel(
    q_ptr, w_ptr, cos_ptr, sin_ptr, q_out_ptr, w_out_ptr, queries_per_table, weight_scale,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, PAIRS: tl.constexpr, HADAMARD_STEPS: tl.constexpr,
    TERMS: tl.constexpr, LIMIT: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    channels = tl.arange(0, BLOCK_CHANNELS)
    inside = (heads < HEADS)[:, None] & (channels < CHANNELS)[None, :]
    at = heads[:, None] * CHANNELS + channels[None, :]
    size = HEADS * CHANNELS
    q = tl.load(q_ptr + query.to(tl.int64) * size + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + query * HEADS + heads, mask=heads < HEADS, other=0.0).to(tl.float32) * weight_scale
    if PAIRS:
        even, odd = tl.split(tl.reshape(q, (BLOCK_HEADS, BLOCK_CHANNELS // 2, 2)))
        others = tl.reshape(tl.join(odd, even), (BLOCK_HEADS, BLOCK_CHANNELS))
        turned = channels[None, :] - (CHANNELS - 2 * PAIRS)
        rotates = (turned >= 0) & (channels < CHANNELS)[None, :]
        table = (query // queries_per_table) * PAIRS
        q = turn_pairs(q, others, turned, rotates, cos_ptr + table, sin_ptr + table, 1)
        q = rounded(q, q_ptr.dtype.element_ty)
    if HADAMARD_STEPS:
        q = hadamard_rows(q, BLOCK_HEADS, BLOCK_CHANNELS, HADAMARD_STEPS)
    if LIMIT > 0:
        scale = tl.maximum(tl.max(tl.abs(q), axis=1), 1e-4) * (1 / LIMIT)
        q = tl.div_rn(q, tl.broadcast_to(scale[:, None], (BLOCK_HEADS, BLOCK_CHANNELS)))
        w = w * scale
    out = q_out_ptr + query.to(tl.int64) * (TERMS * size) + at
    if q_out_ptr.dtype.element_ty == tl.float8e4nv:
        first = e4m3_bits(q).to(tl.float8e4nv, bitcast=True)
        tl.store(out, first, mask=inside)
        if TERMS == 2:
            rest = e4m3_bits(q - first.to(tl.float32)).to(tl.float8e4nv, bitcast=True)
            tl.store(out + size, rest, mask=inside)
    elif q_out_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(out, bf16_bits(q).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(out, q.to(q_out_ptr.dtype.element_ty), mask=inside)
    tl.store(w_out_ptr + query * HEADS + heads, 0.5 * w, mask=heads < HEADS)


@triton.jit
def _load_query(
    q_ptr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    heads = tl.arange(0, BLOCK_HEADS)
    channels = tl.arange(0, BLOCK_CHANNELS)
    at = q_ptr + heads[:, None] * CHANNELS + channels[None, :]
    if BLOCK_HEADS == HEADS and BLOCK_CHANNELS == CHANNELS:
        return tl.load(at)
    return tl.load(at, mask=(heads < HEADS)[:, None] & (channels < CHANNELS)[None, :], other=0.0)


@triton.jit(do_not_specialize=["batch", "tokens", "queries", "width", "table_width", "share"])
def _score_kernel(
    q_ptr, w_ptr, addresses_ptr, numbers_ptr, counts_ptr, out_ptr, score_ptr, above_ptr,
    batch, tokens, queries, width, table_width, inverse_temperature, temperature, threshold, share,
    OUTPUT: tl.constexpr, MEAN: tl.constexpr, KEY: tl.constexpr, SCALED: tl.constexpr, TERMS: tl.constexpr,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    TABLE: tl.constexpr, PAGE_CHUNKS: tl.constexpr, PAGE_STRIDE: tl.constexpr, DATA_BYTES: tl.constexpr,
    TAIL_BYTES: tl.constexpr, ALIGNMENT: tl.constexpr, REDUCED_CHUNKS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
    RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    first = tl.program_id(0) * (BLOCK_CHUNKS * RUN)
    count = tl.load(counts_ptr + b)
    tiles = tl.cdiv(tl.minimum(tl.maximum(count - first, 0), BLOCK_CHUNKS * RUN), BLOCK_CHUNKS)
    channels = tl.arange(0, BLOCK_CHANNELS)
    heads = tl.arange(0, BLOCK_HEADS)
    run = tl.arange(0, RUN)
    logits = tl.full([RUN, BLOCK_CHUNKS], 0.0 if MEAN else float("-inf"), tl.float32)
    for query in range(queries):
        layer = query // tokens
        at = (layer * batch + b) * tokens + query % tokens
        q = _load_query(
            q_ptr + at.to(tl.int64) * (TERMS * HEADS * CHANNELS), HEADS, CHANNELS, BLOCK_HEADS, BLOCK_CHANNELS
        )
        if TERMS == 2:
            q_rest = _load_query(
                q_ptr + (2 * at.to(tl.int64) + 1) * (HEADS * CHANNELS), HEADS, CHANNELS, BLOCK_HEADS, BLOCK_CHANNELS
            )
        w = tl.load(w_ptr + at * HEADS + heads, mask=heads < HEADS, other=0.0)
        base = tl.load(addresses_ptr + layer * batch + b)
        for tile in tl.range(tiles, num_stages=STAGES):
            chunks = first + tile * BLOCK_CHUNKS + tl.arange(0, BLOCK_CHUNKS)
            live = chunks < count
            data, tail = row_starts(
                base, chunks, live, numbers_ptr + b * table_width,
                TABLE, PAGE_CHUNKS, PAGE_STRIDE, DATA_BYTES, TAIL_BYTES,
            )  # fmt: skip
            inside = live[:, None]
            if BLOCK_CHANNELS != CHANNELS:
                inside = inside & (channels < CHANNELS)[None, :]
            keys = tl.load(row_pointers(data, channels, KEY, ALIGNMENT), mask=inside, other=0.0).to(q.dtype)
            dots = tl.dot(keys, tl.trans(q), input_precision="ieee")
            if TERMS == 2:
                dots = tl.dot(keys, tl.trans(q_rest), dots)
            scores = tl.sum((dots + tl.abs(dots)) * w[None, :], axis=1)
            if SCALED:
                scores *= tl.load(tail.to(tl.pointer_type(tl.float32)), mask=live, other=0.0)
            if MEAN:
                merged = logits + scores[None, :]
            else:
                merged = max_or_nan(logits, scores[None, :])
            logits = tl.where((run == tile)[:, None], merged, logits)
    if MEAN:
        logits *= share
    chunks = first + run[:, None] * BLOCK_CHUNKS + tl.arange(0, BLOCK_CHUNKS)[None, :]
    out = out_ptr + b.to(tl.int64) * width
    if OUTPUT == "logits":
        tl.store(out + chunks, tl.where(chunks < count, logits, float("-inf")), mask=chunks < width)
    elif OUTPUT == "ranks":
        tl.store(out + chunks, tl.where(chunks < count, rank_bits(logits), 0), mask=chunks < width)
    else:
        PAGES: tl.constexpr = BLOCK_CHUNKS * RUN // REDUCED_CHUNKS
        logits = tl.reshape(tl.where(chunks < count, logits, float("-inf")), (PAGES, REDUCED_CHUNKS))
        best = tl.max(logits, axis=1)
        above = tl.sum((logits > threshold).to(tl.int32), axis=1)
        shift = tl.where(tl.abs(best) == float("inf"), 0.0, best)
        total = tl.sum(tl.exp((logits - shift[:, None]) * inverse_temperature), axis=1)
        score = temperature * tl.log(total) + shift
        page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
        at = b.to(tl.int64) * width + page
        tl.store(out_ptr + at, best, mask=page < width)
        tl.store(score_ptr + at, score, mask=page < width)
        tl.store(above_ptr + at, above, mask=page < width)


@triton.jit(do_not_specialize=["queries", "rows"])
def _score_queries_kernel(
    q_ptr, w_ptr, keys_ptr, visible_ptr, out_ptr, queries, rows,
    KEY: tl.constexpr, SCALED: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, ROW_BYTES: tl.constexpr,
    DATA_BYTES: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * (BLOCK_CHUNKS * RUN)
    first_query = tl.program_id(1) * BLOCK_QUERIES
    columns = tl.arange(0, BLOCK_QUERIES * BLOCK_HEADS)
    channels = tl.arange(0, BLOCK_CHANNELS)
    head = columns % BLOCK_HEADS
    there = (first_query + columns // BLOCK_HEADS < queries) & (head < HEADS)
    at = (first_query + columns // BLOCK_HEADS) * HEADS + head
    q = tl.load(
        q_ptr + at.to(tl.int64)[:, None] * CHANNELS + channels[None, :],
        mask=there[:, None] & (channels < CHANNELS)[None, :],
        other=0.0,
    )
    w = tl.load(w_ptr + at, mask=there, other=0.0)
    mine = first_query + tl.arange(0, BLOCK_QUERIES)
    visible = tl.load(visible_ptr + mine, mask=mine < queries, other=0)
    count = tl.minimum(tl.max(visible, axis=0), rows)
    out = out_ptr + mine.to(tl.int64)[None, :] * rows
    for tile in tl.range(tl.cdiv(tl.minimum(rows - first, BLOCK_CHUNKS * RUN), BLOCK_CHUNKS), num_stages=STAGES):
        chunks = first + tile * BLOCK_CHUNKS + tl.arange(0, BLOCK_CHUNKS)
        live = chunks < count
        starts = keys_ptr + chunks.to(tl.int64) * ROW_BYTES
        inside = live[:, None]
        if BLOCK_CHANNELS != CHANNELS:
            inside = inside & (channels < CHANNELS)[None, :]
        keys = tl.load(row_pointers(starts, channels, KEY, ALIGNMENT), mask=inside, other=0.0).to(q.dtype)
        dots = tl.dot(keys, tl.trans(q), input_precision="ieee")
        products = tl.reshape((dots + tl.abs(dots)) * w[None, :], (BLOCK_CHUNKS, BLOCK_QUERIES, BLOCK_HEADS))
        scores = tl.sum(products, axis=2)
        if SCALED:
            scales = tl.load((starts + DATA_BYTES).to(tl.pointer_type(tl.float32)), mask=live, other=0.0)
            scores *= scales[:, None]
        ranks = tl.where(chunks[:, None] < visible[None, :], rank_bits(scores), 0)
        tl.store(out + chunks[:, None], ranks, mask=(chunks < rows)[:, None] & (mine < queries)[None, :])


__all__ = [
    "Precision",
    "Tiles",
    "default_tiles",
    "prepare_queries",
    "score_logits",
    "score_page_reductions",
    "score_queries",
    "score_ranks",
]
