"""Lightning scores and their exact top-k: level 2 of Lookahead Sparse Attention.

score = sum over heads of w_h * relu(q_h . k). Ties break by score, then lower chunk id.
The fused versions (Triton) are chosen with impl="fused" only: no default changes before they are measured on a device.
Shape letters: B = sessions, S = queries, H = index heads, I = index_head_dim, N = candidate chunks, K = picks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch

from ..index_rows import decode_index_rows
from ..paged import PagedRows
from ..score_chunks import FINISHED, QueryFinish, decode_paged_keys, default_precision, finish_queries
from ..tiles import for_device
from .reference import lightning_scores_reference, merge_best, pick_ids, rank_keys

if TYPE_CHECKING:
    from ..score_chunks.fused import Precision

Impl = Literal["reference", "fused"]

SCORE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Float32 elements of per-head scores that one tile may hold, by kind of device: a CPU core's second-level cache, or
256 MiB where launches cost more than memory."""


def lightning_scores(q_BHI: torch.Tensor, w_BH: torch.Tensor, keys_BNI: torch.Tensor) -> torch.Tensor:
    """Float32 scores [B, N]; w carries every scale factor."""
    if q_BHI.shape[-1] != keys_BNI.shape[-1] or q_BHI.shape[:2] != w_BH.shape:
        raise ValueError(f"shapes do not fit: q {tuple(q_BHI.shape)}, w {tuple(w_BH.shape)}, k {tuple(keys_BNI.shape)}")
    return lightning_scores_reference(q_BHI, w_BH, keys_BNI)


def topk_chunks(
    scores_BN: torch.Tensor, ids_BN: torch.Tensor, k: int, *, impl: Impl | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact top-k over candidates whose id is not -1.

    Returns (index into N of each pick int64 [B, min(k, N)], valid bool of the same shape); invalid picks have index 0.
    Equal scores are ordered by lower id. Ids must lie below 2^31; for the fused version they must ascend along N, as
    those of a page table do, and k is at most 1024.
    """
    if (impl or "reference") == "fused":
        from .fused import topk_scores  # needs triton

        picks = topk_scores(scores_BN, ids_BN, k, ordered=True)
        return picks.clamp_min(0), picks >= 0
    _check_impl(impl)
    k = min(k, scores_BN.shape[1])
    keys = rank_keys(scores_BN, ids_BN, ids_BN >= 0)
    best = keys.topk(k, dim=1)
    valid = pick_ids(best.values) >= 0
    return torch.where(valid, best.indices, 0), valid


def select_resident(
    q_BHI: torch.Tensor,
    w_BH: torch.Tensor,
    keys: PagedRows,
    k: int,
    *,
    ordered: bool = True,
    finish: QueryFinish = FINISHED,
    precision: Precision | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Level 2 over rows that are read in place: int64 [B, min(k, N)] indices of the best, -1 where there are fewer.

    An index counts a session's rows in the order of its page table; equal scores are ordered by lower index, which is
    the lower chunk id as long as page tables ascend. Best first, or with ordered=False ascending. `keys` has one layer.
    `finish` is what q and w lack (see `score_chunks.finish_queries`).
    The fused version multiplies in `precision` (see `score_chunks.score_history`); k is at most 1024.
    """
    if keys.num_layers != 1 or len(q_BHI) != keys.batch or q_BHI.shape[:2] != w_BH.shape:
        raise ValueError(
            f"shapes do not fit: q {tuple(q_BHI.shape)}, w {tuple(w_BH.shape)}, keys of {keys.num_layers} layers and "
            f"{keys.batch} sessions"
        )
    if (impl or "reference") == "fused":
        from .fused import select_resident_fused  # needs triton

        precision = precision or default_precision(keys.form, q_BHI.shape[-1])
        return select_resident_fused(q_BHI, w_BH, keys, k, precision=precision, ordered=ordered, finish=finish)
    _check_impl(impl)
    q_BHI, w_BH = finish_queries(q_BHI, w_BH, finish)
    scores_BN = lightning_scores_reference(q_BHI, w_BH, decode_paged_keys(keys, 0, q_BHI.shape[-1]))
    index_BN = torch.where(keys.valid(), torch.arange(keys.max_rows, device=keys.device), -1)
    picks_BK, valid_BK = topk_chunks(scores_BN, index_BN, k)
    if ordered:
        return torch.where(valid_BK, picks_BK, -1)
    last = torch.iinfo(torch.int64).max
    ascending_BK = torch.where(valid_BK, picks_BK, last).sort(dim=1).values
    return ascending_BK.masked_fill(ascending_BK == last, -1)


def topk_history(
    q_SHI: torch.Tensor,
    w_SH: torch.Tensor,
    visible_S: torch.Tensor,
    tiles: Iterable[tuple[int, torch.Tensor]],
    k: int,
    *,
    finish: QueryFinish = FINISHED,
    precision: Precision | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Chunk ids int64 [S, k] of each query's top-k among chunks 0..visible-1, in no order; -1 where there are fewer.

    `tiles` yields (first chunk id, keys [N, I] or index rows uint8 [N, I + 4]) over the history once, in its order;
    memory is O(S * k + one tile). `finish` is what q and w lack (see `score_chunks.finish_queries`).
    The fused version multiplies in `precision` (see `score_chunks.score_history`); k is at most 1024.
    """
    if (impl or "reference") == "fused":
        from .fused import topk_history_fused  # needs triton

        return topk_history_fused(q_SHI, w_SH, visible_S, tiles, k, precision=precision, finish=finish)
    _check_impl(impl)
    q_SHI, w_SH = finish_queries(q_SHI, w_SH, finish)
    queries, heads, _ = q_SHI.shape
    elements = for_device(SCORE_ELEMENTS, q_SHI.device)
    best = torch.full((queries, k), torch.iinfo(torch.int64).min, dtype=torch.int64, device=q_SHI.device)
    for first, keys in tiles:
        keys_NI = decode_index_rows(keys) if keys.dtype is torch.uint8 else keys
        count = keys_NI.shape[0]
        ids_N = torch.arange(first, first + count, device=q_SHI.device)
        step = max(1, elements // (heads * max(1, count)))
        for lo in range(0, queries, step):
            hi = min(lo + step, queries)
            scores = lightning_scores_reference(q_SHI[lo:hi], w_SH[lo:hi], keys_NI)
            ranks = rank_keys(scores, ids_N, ids_N < visible_S[lo:hi, None])
            best[lo:hi] = merge_best(best[lo:hi], ranks)
    return pick_ids(best)


def _check_impl(impl: str | None) -> None:
    if impl not in (None, "reference"):
        raise ValueError(f"unknown impl {impl!r}; choose 'reference' or 'fused'")


__all__ = ["SCORE_ELEMENTS", "lightning_scores", "select_resident", "topk_chunks", "topk_history"]
