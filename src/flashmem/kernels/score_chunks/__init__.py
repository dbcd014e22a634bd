"""Score chunks against queries: logit = sum over heads of w * relu(q . key), in float32.

Shape letters: B = batches with keys of their own, M = queries that share keys, H = heads, I = index_head_dim,
N = chunks, C = I + 4 bytes of an index row (or I channels of a float key).
"""

from __future__ import annotations

from typing import Literal

import torch

from ..index_rows import SCALE_BYTES, decode_index_rows
from .maximum import score_chunks_max_tiled
from .reference import score_chunks_reference
from .tiled import score_chunks_tiled

Impl = Literal["reference", "tiled"]


def score_chunks(q: torch.Tensor, keys: torch.Tensor, w: torch.Tensor, *, impl: Impl | None = None) -> torch.Tensor:
    """Return float32 logits [M, N] of queries [M, H, I] with head weights [M, H] against keys of N chunks.

    Keys are index rows, uint8 [N, I + 4], or floating point [N, I]; both in the basis of the queries (rows: Hadamard).
    With one more leading dimension on all three, each batch is scored against its own keys: [B, M, N].
    Differentiable with respect to q, w and float keys. Memory: one tile of products, whatever M and N, in the
    backward too ('reference' keeps them all). Under autocast to bfloat16 products are rounded to it, forward and
    backward alike; logits and gradients are float32 sums.
    """
    if q.dim() == 3:
        return score_chunks(q.unsqueeze(0), keys.unsqueeze(0), w.unsqueeze(0), impl=impl).squeeze(0)
    _check(q, keys, w)
    if q.shape[1] * q.shape[2] == 0:
        return q.new_zeros(q.shape[0], q.shape[1], keys.shape[1], dtype=torch.float32)
    impl = impl or "tiled"
    if impl == "tiled":
        return score_chunks_tiled(q, keys, w)
    if impl == "reference":
        return score_chunks_reference(q, decode_index_rows(keys) if keys.dtype is torch.uint8 else keys, w)
    raise ValueError(f"unknown impl {impl!r}; choose 'reference' or 'tiled'")


def score_chunks_max(
    q: torch.Tensor, keys: torch.Tensor, w: torch.Tensor, seen: torch.Tensor | None = None, *, impl: Impl | None = None
) -> torch.Tensor:
    """Return float32 [Q, N]: the largest logit over the m observed tokens of each query.

    q is [Q, m, H, I], w [Q, m, H], keys as for `score_chunks` without a batch; `seen` bool [Q, m] is False where there
    is no token (a query without any scores -inf). Differentiable like `score_chunks`; the gradient goes to one token.
    Memory: one tile, and Q times N numbers.
    """
    queries = q.flatten(0, 1), keys, w.flatten(0, 1)
    if q.dim() != 4 or w.shape != q.shape[:3] or (seen is not None and seen.shape != q.shape[:2]):
        raise ValueError(f"q must be [Q, m, H, I], w [Q, m, H] and seen [Q, m], got {tuple(q.shape)}, {tuple(w.shape)}")
    _check(*(x.unsqueeze(0) for x in queries))
    if not q.shape[1]:
        raise ValueError("there must be at least one observed token")
    if impl == "reference":
        logits_QmN = score_chunks(*queries, impl="reference").unflatten(0, q.shape[:2])
        return (logits_QmN if seen is None else logits_QmN.masked_fill(~seen.unsqueeze(-1), -torch.inf)).amax(1)
    if impl in (None, "tiled"):
        if q.shape[1] > 1:
            return score_chunks_max_tiled(q, keys, w, seen)
        logits_QN = score_chunks(q[:, 0], keys, w[:, 0], impl=impl)
        return logits_QN if seen is None else logits_QN.masked_fill(~seen, -torch.inf)
    raise ValueError(f"unknown impl {impl!r}; choose 'reference' or 'tiled'")


def _check(q: torch.Tensor, keys: torch.Tensor, w: torch.Tensor) -> None:
    if q.dim() != 4 or w.shape != q.shape[:3]:
        raise ValueError(f"q must be [M, H, I] and w [M, H], got {tuple(q.shape)} and {tuple(w.shape)}")
    if not (keys.dtype is torch.uint8 or keys.is_floating_point()):
        raise ValueError(f"keys must be uint8 rows or floating point, got {keys.dtype}")
    width = q.shape[-1] + (SCALE_BYTES if keys.dtype is torch.uint8 else 0)
    if keys.dim() != 3 or keys.shape[0] != q.shape[0] or keys.shape[2] != width:
        raise ValueError(
            f"{keys.dtype} keys must be [{q.shape[0]}, N, {width}] for q {tuple(q.shape)}, got {tuple(keys.shape)}"
        )


__all__ = ["score_chunks", "score_chunks_max"]
