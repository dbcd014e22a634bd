"""Lightning scores and their exact top-k: level 2 of Lookahead Sparse Attention.

score = sum over heads of w_h * relu(q_h . k). Ties break by score, then lower chunk id.
Shape letters: B = sessions, S = queries, H = index heads, I = index_head_dim, N = candidate chunks, K = picks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .reference import lightning_scores_reference, merge_best, pick_ids, rank_keys

SCORE_ELEMENTS = 1 << 19
"""Float32 elements of per-head scores that one tile may hold: 2 MiB, a CPU core's second-level cache."""


def lightning_scores(q_BHI: torch.Tensor, w_BH: torch.Tensor, keys_BNI: torch.Tensor) -> torch.Tensor:
    """Float32 scores [B, N]; w carries every scale factor."""
    if q_BHI.shape[-1] != keys_BNI.shape[-1] or q_BHI.shape[:2] != w_BH.shape:
        raise ValueError(f"shapes do not fit: q {tuple(q_BHI.shape)}, w {tuple(w_BH.shape)}, k {tuple(keys_BNI.shape)}")
    return lightning_scores_reference(q_BHI, w_BH, keys_BNI)


def topk_chunks(scores_BN: torch.Tensor, ids_BN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact top-k over candidates whose id is not -1.

    Returns (index into N of each pick int64 [B, min(k, N)], valid bool of the same shape); invalid picks have index 0.
    Equal scores are ordered by lower id. Ids must lie below 2^31.
    """
    k = min(k, scores_BN.shape[1])
    keys = rank_keys(scores_BN, ids_BN, ids_BN >= 0)
    best = keys.topk(k, dim=1)
    valid = pick_ids(best.values) >= 0
    return torch.where(valid, best.indices, 0), valid


def topk_history(
    q_SHI: torch.Tensor,
    w_SH: torch.Tensor,
    visible_S: torch.Tensor,
    tiles: Iterable[tuple[int, torch.Tensor]],
    k: int,
) -> torch.Tensor:
    """Chunk ids int64 [S, k] of each query's top-k among chunks 0..visible-1, -1 where there are fewer.

    `tiles` yields (first chunk id, keys [N, I]) over the history once; memory is O(S * k + one tile).
    """
    queries, heads, _ = q_SHI.shape
    best = torch.full((queries, k), torch.iinfo(torch.int64).min, dtype=torch.int64, device=q_SHI.device)
    for first, keys_NI in tiles:
        count = keys_NI.shape[0]
        ids_N = torch.arange(first, first + count, device=q_SHI.device)
        step = max(1, SCORE_ELEMENTS // (heads * max(1, count)))
        for lo in range(0, queries, step):
            hi = min(lo + step, queries)
            scores = lightning_scores_reference(q_SHI[lo:hi], w_SH[lo:hi], keys_NI)
            keys = rank_keys(scores, ids_N, ids_N < visible_S[lo:hi, None])
            best[lo:hi] = merge_best(best[lo:hi], keys)
    return pick_ids(best)


__all__ = ["SCORE_ELEMENTS", "lightning_scores", "topk_chunks", "topk_history"]
