"""Exact top-k without a sort of all candidates, level 2 over rows that are read in place, and level 2 of prefill.

Each program finds the k best of a block in registers (see `largest`). Rows longer than `WHOLE` are cut into blocks
whose winners meet again, until one block is left. Candidates keep their order all the way, so that the lower index wins
a tie. Where the caller wants the best first, a second kernel counts for each winner how many come before it.

In prefill the queries of a chunk of tokens share their keys: `topk_history_fused` ranks a tile of the history for a
block of queries at a time, so that ranks stay within `RANK_BYTES` however long the history is.

Shape letters: B = rows (sessions), N = candidates, K = picks, S = blocks of a row, or queries of a prefill.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from ..paged import PagedRows, key_form
from ..score_chunks import FINISHED, QueryFinish, default_precision
from ..score_chunks.fused import Precision, Tiles, prepare_queries, score_queries, score_ranks
from ..tiles import MOST_QUERIES
from ..triton_parts import largest, rank_bits

MOST_PICKS = 1024
WHOLE = 8192
"""Most candidates of one program where it takes a whole row: a longer search, but no second launch."""
BLOCK = 4096
"""Candidates of one program where there are more: four times the most picks, so that every round shrinks its input."""
THREAD_CANDIDATES = 16
"""Candidates of one thread: with fewer, counts of more warps must meet; with more, their registers fill the device."""
REGISTERS = 64
"""Most registers of a thread of a cut row: four blocks fit on a multiprocessor, and nothing is spilled."""
RANK_BYTES = 256 << 20
"""Ranks that level 2 of a prefill holds at a time."""
BLOCK_ORDER = 32
"""Winners that one program puts in order."""


def select_resident_fused(
    q_BHI: torch.Tensor,
    w_BH: torch.Tensor,
    keys: PagedRows,
    k: int,
    *,
    precision: Precision,
    ordered: bool,
    finish: QueryFinish = FINISHED,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Indices int64 [B, min(k, N)] of the best rows, -1 where there are fewer."""
    prepared = prepare_queries(q_BHI[None, :, None], w_BH[None, :, None], precision, finish)
    return topk_ranks(score_ranks(*prepared, keys, tiles=tiles), k, ordered=ordered)


def topk_history_fused(
    q_SHI: torch.Tensor,
    w_SH: torch.Tensor,
    visible_S: torch.Tensor,
    tiles: Iterable[tuple[int, torch.Tensor]],
    k: int,
    *,
    precision: Precision | None,
    finish: QueryFinish = FINISHED,
) -> torch.Tensor:
    """Chunk ids int64 [S, k], ascending, -1 where there are fewer."""
    queries, channels = len(q_SHI), q_SHI.shape[-1]
    best = _Best(queries, k, q_SHI.device)
    prepared: tuple[torch.Tensor, torch.Tensor] | None = None
    for first, keys in tiles:
        if prepared is None:
            precision = precision or default_precision(key_form(keys, channels), channels)
            prepared = prepare_queries(q_SHI[None, :, None], w_SH[None, :, None], precision, finish)
        seen_S = (visible_S - first).to(torch.int32)
        step = min(MOST_QUERIES, max(1, RANK_BYTES // (4 * max(1, len(keys)))))
        for lo in range(0, queries, step):
            at = slice(lo, lo + step)
            q, w = (x[:, at] for x in prepared)
            best.add(at, first, score_queries(q, w, keys, seen_S[at]))
    return best.ids_SK


class _Best:
    """The k best chunks of each query so far, ascending; those of later tiles come behind, so that ties fall to them
    last."""

    def __init__(self, queries: int, k: int, device: torch.device) -> None:
        self.ids_SK = torch.full((queries, k), -1, dtype=torch.int64, device=device)
        self._ranks_SK = torch.zeros(queries, k, dtype=torch.int32, device=device)  # the bits of a uint32

    def add(self, at: slice, first: int, ranks_BN: torch.Tensor) -> None:
        """Merge the ranks (uint32) of chunks from `first` on for some queries."""
        k = self.ids_SK.shape[1]
        picks = topk_ranks(ranks_BN, k, ordered=False)
        found = ranks_BN.view(torch.int32).gather(1, picks.clamp_min(0)).masked_fill(picks < 0, 0)
        ranks = torch.cat((self._ranks_SK[at], found), dim=1)
        ids = torch.cat((self.ids_SK[at], picks + first), dim=1)
        winners = topk_ranks(ranks.view(torch.uint32), k, ordered=False)
        there = winners.clamp_min(0)
        self.ids_SK[at] = ids.gather(1, there).masked_fill(winners < 0, -1)
        self._ranks_SK[at] = ranks.gather(1, there).masked_fill(winners < 0, 0)


def topk_scores(scores_BN: torch.Tensor, ids_BN: torch.Tensor, k: int, *, ordered: bool) -> torch.Tensor:
    """Indices int64 [B, min(k, N)] of the best scores whose id is not -1; -1 where there are fewer."""
    return _rounds(scores_BN.float().contiguous(), ids_BN.contiguous(), k, ordered)


def topk_ranks(ranks_BN: torch.Tensor, k: int, *, ordered: bool) -> torch.Tensor:
    """Indices int64 [B, min(k, N)] of the largest ranks (uint32); -1 where fewer are above 0."""
    return _rounds(ranks_BN, None, k, ordered)


def _rounds(values_BN: torch.Tensor, ids_BN: torch.Tensor | None, k: int, ordered: bool) -> torch.Tensor:
    batch, count = values_BN.shape
    k = min(k, count)
    if k > MOST_PICKS:
        raise ValueError(f"{k} picks; the fused kernel takes at most {MOST_PICKS}")
    out = torch.empty(batch, k, dtype=torch.int64, device=values_BN.device)
    if out.numel() == 0:
        return out
    index: torch.Tensor | None = None
    while count > WHOLE:
        blocks = triton.cdiv(count, BLOCK)
        ranks = values_BN.new_empty(batch, blocks * k, dtype=torch.uint32)
        winners = torch.empty_like(ranks, dtype=torch.int32)
        _launch(values_BN, ids_BN, index, ranks, winners, k, blocks, BLOCK, last=False, ordered=False)
        values_BN, ids_BN, index, count = ranks, None, winners, blocks * k
    ranks = values_BN.new_empty((batch, k) if ordered else (1, 1), dtype=torch.uint32)
    picks = torch.empty_like(out) if ordered else out
    block = max(64, triton.next_power_of_2(count))
    _launch(values_BN, ids_BN, index, ranks, picks, k, 1, block, last=True, ordered=ordered)
    if ordered:
        _order_kernel[(triton.cdiv(k, BLOCK_ORDER), batch)](
            ranks, picks, out, k, BLOCK_ORDER=BLOCK_ORDER, BLOCK_PICKS=max(16, triton.next_power_of_2(k))
        )
    return out


def _launch(
    values: torch.Tensor, ids: torch.Tensor | None, index: torch.Tensor | None, ranks: torch.Tensor,
    picks: torch.Tensor, k: int, blocks: int, block: int, *, last: bool, ordered: bool,
) -> None:  # fmt: skip
    _topk_kernel[(blocks, len(values))](
        values, values if ids is None else ids, picks if index is None else index, ranks, picks, values.shape[1], k,
        SCORES=ids is not None, INDEXED=index is not None, RANKS=ordered or not last, MISSING=-1 if last else 0,
        BLOCK_COUNT=block, BLOCK_PICKS=triton.next_power_of_2(k),
        num_warps=max(4, block // (32 * THREAD_CANDIDATES)), maxnreg=None if last else REGISTERS,
    )  # fmt: skip


@triton.jit
def _topk_kernel(
    values_ptr, ids_ptr, index_ptr, ranks_ptr, picks_ptr, count, k,
    SCORES: tl.constexpr, INDEXED: tl.constexpr, RANKS: tl.constexpr, MISSING: tl.constexpr,
    BLOCK_COUNT: tl.constexpr, BLOCK_PICKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    at = block * BLOCK_COUNT + tl.arange(0, BLOCK_COUNT)
    inside = at < count
    if SCORES:
        inside = inside & (tl.load(ids_ptr + row * count + at, mask=inside, other=-1) >= 0)
        ranks = tl.where(inside, rank_bits(tl.load(values_ptr + row * count + at, mask=inside, other=0.0)), 0)
    else:
        ranks = tl.load(values_ptr + row * count + at, mask=inside, other=0)
    index = at
    if INDEXED:
        index = tl.load(index_ptr + row * count + at, mask=inside, other=0)
    place, found = largest(ranks, k)
    place = place.to(tl.int64)  # before pointers: these would change their layout at twice the bytes
    pick = tl.arange(0, BLOCK_PICKS)
    missing = (pick >= found) & (pick < k)
    here = (row * tl.num_programs(0) + block) * k
    dtype = picks_ptr.dtype.element_ty
    tl.store(picks_ptr + here + place, index.to(dtype), mask=place >= 0)
    tl.store(picks_ptr + here + pick, tl.full([BLOCK_PICKS], MISSING, dtype), mask=missing)
    if RANKS:
        tl.store(ranks_ptr + here + place, ranks, mask=place >= 0)
        tl.store(ranks_ptr + here + pick, tl.full([BLOCK_PICKS], 0, tl.uint32), mask=missing)


@triton.jit
def _order_kernel(ranks_ptr, picks_ptr, out_ptr, k, BLOCK_ORDER: tl.constexpr, BLOCK_PICKS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    mine = tl.program_id(0) * BLOCK_ORDER + tl.arange(0, BLOCK_ORDER)
    others = tl.arange(0, BLOCK_PICKS)
    rank = tl.load(ranks_ptr + row * k + mine, mask=mine < k, other=0)[:, None]
    ranks = tl.load(ranks_ptr + row * k + others, mask=others < k, other=0)[None, :]
    earlier = (ranks > rank) | ((ranks == rank) & (others[None, :] < mine[:, None]))
    place = tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(out_ptr + row * k + place, tl.load(picks_ptr + row * k + mine, mask=mine < k, other=0), mask=mine < k)


__all__ = ["MOST_PICKS", "select_resident_fused", "topk_history_fused", "topk_ranks", "topk_scores"]
