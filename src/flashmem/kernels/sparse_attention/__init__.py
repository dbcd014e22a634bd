"""Attention over a sliding window and compressed entries with per-head sinks, K and V being one tensor.

Shape letters: B = queries (sessions of a decode batch, or queries of one session), S = queries of a prefill, H = heads,
D = head_dim, N = entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .reference import attend_reference, band_mask

KeySet = tuple[torch.Tensor, torch.Tensor]
"""Entries [B, N, D] (one set per query) or [N, D] (shared by all queries), and their validity, bool [B, N]."""

LOGIT_ELEMENTS = 1 << 21
"""Logits and gathered channels that one query tile of a prefill may hold."""


def attend(q_BHD: torch.Tensor, sets: Sequence[KeySet], sinks_H: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax jointly over all key sets and the sink; returns [B, H, D].

    Invalid rows of per-query sets may hold any bytes, NaN included. A query without valid entries gets zeros: all its
    weight goes to the sink.
    """
    for kv, valid in sets:
        if valid.shape != (q_BHD.shape[0], kv.shape[-2]) or kv.shape[-1] != q_BHD.shape[-1]:
            raise ValueError(f"q {tuple(q_BHD.shape)}, kv {tuple(kv.shape)}, valid {tuple(valid.shape)} do not fit")
    return attend_reference(q_BHD, sets, sinks_H, scale)


def attend_prefill(
    q_SHD: torch.Tensor,
    window_kv: torch.Tensor,
    first_query: int,
    window: int,
    sinks_H: torch.Tensor,
    scale: float,
    entries: Callable[[int, int], KeySet] | None = None,
    entries_per_query: int = 0,
) -> torch.Tensor:
    """Prefill form, tiled over queries; returns [S, H, D].

    Query i stands at position `first_query + i` and sees the `window` tokens that end with itself. `window_kv` [n, D]
    holds the last n tokens up to the last query, n = S + min(first_query, window - 1).
    `entries(lo, hi)` gives the compressed entries of queries lo..hi-1, of at most `entries_per_query` each.
    """
    queries, heads, dim = q_SHD.shape
    first_key = first_query + queries - len(window_kv)
    per_query = heads * (entries_per_query + window) + entries_per_query * dim
    tile = min(max(1, LOGIT_ELEMENTS // per_query), max(64, window))
    out = torch.empty_like(q_SHD)
    for lo in range(0, queries, tile):
        hi = min(lo + tile, queries)
        key_lo = max(0, first_query + lo - window + 1 - first_key)
        keys = window_kv[key_lo : first_query + hi - first_key]
        mask = band_mask(first_query + lo, hi - lo, first_key + key_lo, len(keys), window, q_SHD.device)
        sets = [(keys, mask)] if entries is None else [(keys, mask), entries(lo, hi)]
        out[lo:hi] = attend_reference(q_SHD[lo:hi], sets, sinks_H, scale)
    return out


__all__ = ["LOGIT_ELEMENTS", "KeySet", "attend", "attend_prefill"]
