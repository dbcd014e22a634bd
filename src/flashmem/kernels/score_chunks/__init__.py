"""Score chunks against queries: logit = sum over heads of w * relu(q . key), in float32.

`score_chunks` takes keys as a tensor. `score_history` and `score_pages` read the rows of a whole batch in place, merge
target layers and observed tokens, and can reduce to pages.

The fused version (Triton) is chosen with impl="fused" only: no default changes before it is measured on a device.
Shape letters: B = batches with keys of their own (sessions), M = queries that share keys (observed tokens), H = heads,
I = index_head_dim, N = chunks, C = I + 4 bytes of an index row (or I channels of a float key), L = layers, P = pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ..index_rows import SCALE_BYTES, decode_index_rows
from ..kv_codec import PlanarForm
from ..paged import PagedRows, key_form
from .maximum import score_chunks_max_tiled
from .reference import (
    FINISHED,
    QueryFinish,
    finish_queries_reference,
    merge_logits_reference,
    reduce_pages_reference,
    score_chunks_reference,
)
from .tiled import score_chunks_tiled

if TYPE_CHECKING:
    from .fused import Precision

TensorImpl = Literal["reference", "tiled"]
Impl = Literal["reference", "tiled", "fused"]
Merge = Literal["max", "mean"]

_EXACT = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True, eq=False, slots=True)
class PageScores:
    """What the chunks of each page [B, P] add up to; a page without chunks has -inf, -inf and 0."""

    best: torch.Tensor
    """Float32: the largest logit."""
    score: torch.Tensor
    """Float32: temperature * logsumexp(logit / temperature); NaN where a logit is NaN."""
    above: torch.Tensor
    """Int32: chunks whose logit exceeds the threshold."""


def score_chunks(
    q: torch.Tensor,
    keys: torch.Tensor,
    w: torch.Tensor,
    *,
    impl: Impl | None = None,
    precision: Precision | None = None,
) -> torch.Tensor:
    """Return float32 logits [M, N] of queries [M, H, I] with head weights [M, H] against keys of N chunks.

    Keys are index rows, uint8 [N, I + 4], or floating point [N, I]; both in the basis of the queries (rows: Hadamard).
    With one more leading dimension on all three, each batch is scored against its own keys: [B, M, N].
    Differentiable with respect to q, w and float keys. Memory: one tile of products, whatever M and N, in the
    backward too ('reference' keeps them all). Under autocast to bfloat16 products are rounded to it, forward and
    backward alike; logits and gradients are float32 sums. The fused version has no gradient, knows no autocast, and
    multiplies in `precision` (see `score_history`).
    """
    if q.dim() == 3:
        batch = (x.unsqueeze(0) for x in (q, keys, w))
        return score_chunks(*batch, impl=impl, precision=precision).squeeze(0)
    _check(q, keys, w)
    if q.shape[1] * q.shape[2] == 0:
        return q.new_zeros(q.shape[0], q.shape[1], keys.shape[1], dtype=torch.float32)
    impl = impl or "tiled"
    if impl == "tiled":
        return score_chunks_tiled(q, keys, w)
    if impl == "reference":
        return score_chunks_reference(q, decode_index_rows(keys) if keys.dtype is torch.uint8 else keys, w)
    if impl == "fused":
        return _score_chunks_fused(q, keys, w, precision)
    raise ValueError(f"unknown impl {impl!r}; choose 'reference', 'tiled' or 'fused'")


def score_chunks_max(
    q: torch.Tensor,
    keys: torch.Tensor,
    w: torch.Tensor,
    seen: torch.Tensor | None = None,
    *,
    impl: TensorImpl | None = None,
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


def finish_queries(
    q: torch.Tensor, w: torch.Tensor, finish: QueryFinish = FINISHED
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [..., H, I] and float32 head weights [..., H] from their projections.

    The rotary embedding rounds to the dtype of q, as the modules of transformers do; the rotation into the basis of
    index rows gives float32. The fused version is a part of what prepares queries for the product.
    """
    if w.shape != q.shape[:-1]:
        raise ValueError(f"q must be [..., H, I] and w [..., H], got {tuple(q.shape)} and {tuple(w.shape)}")
    return finish_queries_reference(q, w, finish)


def score_history(
    q_LBMHI: torch.Tensor,
    w_LBMH: torch.Tensor,
    keys: PagedRows,
    *,
    merge: Merge = "max",
    precision: Precision | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Return float32 logits [B, N], merged over layers and observed tokens alike; -inf past a session's count.

    `keys` has L layers of index rows (I + 4 bytes) or of exact bf16 or fp32 keys. The fused version multiplies in
    `precision` with float32 sums; by default "fp16" for index rows, and the keys' own type for exact keys.
    """
    _check_history(q_LBMHI, w_LBMH, keys, merge)
    impl = impl or "tiled"
    if impl == "fused":
        from .fused import prepare_queries, score_logits  # needs triton

        prepared = prepare_queries(q_LBMHI, w_LBMH, precision or default_precision(keys.form, q_LBMHI.shape[-1]))
        return score_logits(*prepared, keys, mean=merge == "mean")
    if impl not in ("reference", "tiled"):
        raise ValueError(f"unknown impl {impl!r}; choose 'reference', 'tiled' or 'fused'")
    valid_BN = keys.valid()
    channels = q_LBMHI.shape[-1]
    logits = [
        score_chunks(q_LBMHI[layer], decode_paged_keys(keys, layer, channels), w_LBMH[layer], impl=impl)
        for layer in range(keys.num_layers)
    ]
    return merge_logits_reference(torch.stack(logits), valid_BN, merge == "mean")


def score_pages(
    q_LBMHI: torch.Tensor,
    w_LBMH: torch.Tensor,
    keys: PagedRows,
    *,
    page_chunks: int,
    temperature: float,
    threshold: float,
    merge: Merge = "max",
    precision: Precision | None = None,
    impl: Impl | None = None,
) -> PageScores:
    """Reduce the logits of `score_history` to pages of `page_chunks`; `threshold` is a logit.

    The fused version writes nothing but its result, and wants a power of two of chunks per page.
    """
    if page_chunks < 1 or temperature <= 0:
        raise ValueError(f"page_chunks and temperature must be positive, got {page_chunks} and {temperature}")
    if impl == "fused":
        from .fused import prepare_queries, score_page_reductions  # needs triton

        _check_history(q_LBMHI, w_LBMH, keys, merge)
        prepared = prepare_queries(q_LBMHI, w_LBMH, precision or default_precision(keys.form, q_LBMHI.shape[-1]))
        return PageScores(
            *score_page_reductions(
                *prepared, keys, page_chunks=page_chunks, temperature=temperature, threshold=threshold,
                mean=merge == "mean",
            )
        )  # fmt: skip
    logits_BN = score_history(q_LBMHI, w_LBMH, keys, merge=merge, impl=impl)
    return PageScores(*reduce_pages_reference(logits_BN, page_chunks, temperature, threshold))


def default_precision(form: PlanarForm, channels: int) -> Precision:
    """The narrowest precision in which a query loses less than its keys did."""
    if form.tail_bytes:
        return "fp16"
    return "bf16" if form.data_bytes == 2 * channels else "fp32"


def decode_paged_keys(keys: PagedRows, layer: int, channels: int) -> torch.Tensor:
    """Keys [B, N, I] of one layer: float32 from index rows, else in their own type."""
    rows_BNE = keys.read(layer)
    if keys.form.tail_bytes:
        return decode_index_rows(rows_BNE)
    dtype = _EXACT[keys.form.data_bytes // channels]
    return (
        rows_BNE.view(dtype) if rows_BNE.numel() else rows_BNE.new_empty((*rows_BNE.shape[:2], channels), dtype=dtype)
    )


def _score_chunks_fused(
    q_BMHI: torch.Tensor, keys_BNC: torch.Tensor, w_BMH: torch.Tensor, precision: Precision | None
) -> torch.Tensor:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_BMHI, keys_BNC, w_BMH)):
        raise ValueError("the fused version has no gradient; use impl='tiled' for training")
    from .fused import prepare_queries, score_logits  # needs triton

    (batch, tokens, heads, channels), chunks = q_BMHI.shape, keys_BNC.shape[1]
    if keys_BNC.dtype not in (torch.uint8, torch.bfloat16):
        keys_BNC = keys_BNC.float()
    form = key_form(keys_BNC, channels)
    if not chunks:
        return q_BMHI.new_empty(batch, tokens, 0, dtype=torch.float32)
    rows_BNE = keys_BNC.contiguous().view(torch.uint8)
    # every query is a session of its own here, so that nothing merges
    regions = [[rows for rows in rows_BNE for _ in range(tokens)]]
    keys = PagedRows(form, regions, [chunks] * (batch * tokens))
    q, w = q_BMHI.reshape(1, batch * tokens, 1, heads, channels), w_BMH.reshape(1, batch * tokens, 1, heads)
    prepared = prepare_queries(q, w, precision or default_precision(form, channels))
    return score_logits(*prepared, keys, mean=False).view(batch, tokens, chunks)


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


def _check_history(q_LBMHI: torch.Tensor, w_LBMH: torch.Tensor, keys: PagedRows, merge: str) -> None:
    if q_LBMHI.dim() != 5 or w_LBMH.shape != q_LBMHI.shape[:4]:
        raise ValueError(
            f"q must be [L, B, M, H, I] and w [L, B, M, H], got {tuple(q_LBMHI.shape)}, {tuple(w_LBMH.shape)}"
        )
    if q_LBMHI.shape[:2] != (keys.num_layers, keys.batch) or not q_LBMHI.shape[2]:
        raise ValueError(
            f"queries {tuple(q_LBMHI.shape)} do not fit keys of {keys.num_layers} layers and {keys.batch} sessions"
        )
    channels, form = q_LBMHI.shape[-1], keys.form
    rows = (form.data_bytes, form.tail_bytes)
    if rows not in ((channels, SCALE_BYTES), (2 * channels, 0), (4 * channels, 0)):
        raise ValueError(f"keys of {channels} channels cannot be rows of {rows[0]} + {rows[1]} bytes")
    if merge not in ("max", "mean"):
        raise ValueError(f"merge must be 'max' or 'mean', got {merge!r}")


__all__ = [
    "FINISHED",
    "PageScores",
    "QueryFinish",
    "decode_paged_keys",
    "default_precision",
    "finish_queries",
    "score_chunks",
    "score_chunks_max",
    "score_history",
    "score_pages",
]
