"""Attention over a sliding window and compressed entries with per-head sinks, K and V being one tensor.

`attend` and `attend_prefill` take entries as tensors; `attend_rows` and `attend_prefill_rows` read records in place.
The fused version (Triton) is chosen with impl="fused" only: no default changes before it is measured on a device.
Shape letters: B = queries (sessions of a decode batch, or queries of one session), S = queries of a prefill, H = heads,
D = head_dim, N = entries, K = picks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..kv_codec import KVFormatSpec, decode_rows, exact_spec
from ..paged import PagedRows, interleaved_form
from ..tiles import MOST_QUERIES, for_device
from .reference import attend_reference, attention_weights_reference, band_mask

KeySet = tuple[torch.Tensor, torch.Tensor]
"""Entries [B, N, D] (one set per query) or [N, D] (shared by all queries), and their validity, bool [B, N]."""

Impl = Literal["reference", "fused"]

LOGIT_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Logits and gathered channels that one query tile of a prefill may hold, by kind of device."""
QUERY_TILE = {"cpu": 64, "cuda": 512}
"""Queries of a tile, or the window if that is more: what a tile computes outside its window grows with both."""


GATHERED_BYTES = 256 << 20
"""Bytes of entries that one query tile of `attend_prefill_rows` may ask for, were its picks all distinct."""


def attend(q_BHD: torch.Tensor, sets: Sequence[KeySet], sinks_H: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax jointly over all key sets and the sink; returns [B, H, D].

    Invalid rows of per-query sets may hold any bytes, NaN included. A query without valid entries gets zeros: all its
    weight goes to the sink.
    """
    for kv, valid in sets:
        if valid.shape != (q_BHD.shape[0], kv.shape[-2]) or kv.shape[-1] != q_BHD.shape[-1]:
            raise ValueError(f"q {tuple(q_BHD.shape)}, kv {tuple(kv.shape)}, valid {tuple(valid.shape)} do not fit")
    return attend_reference(q_BHD, sets, sinks_H, scale)


@dataclass(frozen=True, eq=False, slots=True)
class EntrySource:
    """Entries of one kind where they lie: a window, the pages of a CSA layer, or HCA entries."""

    rows: PagedRows
    """One layer."""
    spec: KVFormatSpec
    picks_BK: torch.Tensor | None = None
    """Int64: the rows to read, in any order, -1 for none; without picks all rows of each session."""

    def __post_init__(self) -> None:
        form, spec = self.rows.form, self.spec
        if (form.data_bytes, form.tail_bytes) != (spec.data_bytes, spec.scale_bytes) or self.rows.num_layers != 1:
            raise ValueError(
                f"rows of {form.data_bytes} + {form.tail_bytes} bytes in {self.rows.num_layers} layers do not hold "
                f"one layer of {spec.format} entries of {spec.data_bytes} + {spec.scale_bytes}"
            )
        picks = self.picks_BK
        if picks is not None and (picks.dim() != 2 or len(picks) != self.rows.batch or picks.dtype is not torch.int64):
            raise ValueError(f"picks must be int64 [{self.rows.batch}, K], got {picks.dtype} {tuple(picks.shape)}")

    def key_set(self, dtype: torch.dtype) -> KeySet:
        """The entries as tensors: gathered and decoded."""
        rows_BNE, valid = self.rows.read(), self.rows.valid()
        if self.picks_BK is not None:
            valid = self.picks_BK >= 0
            index = self.picks_BK.clamp_min(0)[..., None].expand(-1, -1, rows_BNE.shape[-1])
            rows_BNE = rows_BNE.gather(1, index) if rows_BNE.shape[1] else rows_BNE.new_zeros(index.shape)
        return decode_rows(self.spec, rows_BNE, dtype), valid


def attend_rows(
    q_BHD: torch.Tensor,
    sources: Sequence[EntrySource],
    sinks_H: torch.Tensor,
    scale: float,
    *,
    impl: Impl | None = None,
) -> torch.Tensor:
    """`attend` over rows that are read in place, each session its own; returns [B, H, D] in q's dtype.

    The fused version takes one or two sources and multiplies in q's dtype with float32 sums.
    """
    for source in sources:
        if (source.rows.batch, source.spec.head_dim) != (q_BHD.shape[0], q_BHD.shape[2]):
            raise ValueError(
                f"q {tuple(q_BHD.shape)} does not fit {source.rows.batch} sessions of {source.spec.head_dim} channels"
            )
    if sinks_H.shape != q_BHD.shape[1:2]:
        raise ValueError(f"sinks must be [{q_BHD.shape[1]}], got {tuple(sinks_H.shape)}")
    impl = impl or "reference"
    if impl == "reference":
        return attend_reference(q_BHD, [source.key_set(q_BHD.dtype) for source in sources], sinks_H, scale)
    if impl == "fused":
        from .fused import attend_rows_fused  # needs triton

        return attend_rows_fused(q_BHD, sources, sinks_H, scale)
    raise ValueError(f"unknown impl {impl!r}; choose 'reference' or 'fused'")


def attention_weights(q_BHD: torch.Tensor, sets: Sequence[KeySet], sinks_H: torch.Tensor, scale: float) -> torch.Tensor:
    """The probabilities behind `attend`: float32 [B, H, entries of all sets]; what is missing to 1 is the sink's."""
    return attention_weights_reference(q_BHD, sets, sinks_H, scale)


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
    most = for_device(LOGIT_ELEMENTS, q_SHD.device) // per_query
    tile = min(max(1, most), max(for_device(QUERY_TILE, q_SHD.device), window))
    out = torch.empty_like(q_SHD)
    for lo in range(0, queries, tile):
        hi = min(lo + tile, queries)
        key_lo = max(0, first_query + lo - window + 1 - first_key)
        keys = window_kv[key_lo : first_query + hi - first_key]
        mask = band_mask(first_query + lo, hi - lo, first_key + key_lo, len(keys), window, q_SHD.device)
        sets = [(keys, mask)] if entries is None else [(keys, mask), entries(lo, hi)]
        out[lo:hi] = attend_reference(q_SHD[lo:hi], sets, sinks_H, scale)
    return out


def attend_prefill_rows(
    q_SHD: torch.Tensor,
    window_kv: torch.Tensor,
    first_query: int,
    window: int,
    sinks_H: torch.Tensor,
    scale: float,
    entries: Callable[[int, int], EntrySource] | None = None,
    bytes_per_query: int = 0,
) -> torch.Tensor:
    """`attend_prefill` on the fused kernel: every query is a session whose window is a piece of `window_kv`.

    `entries(lo, hi)` gives the compressed entries of queries lo..hi-1; `bytes_per_query` is what it may have to gather
    for each, 0 if they lie on the device. `window_kv` is bf16 or fp32, as q.
    """
    queries, _, dim = q_SHD.shape
    past = len(window_kv) - queries
    if past != min(first_query, window - 1) or window_kv.dtype != q_SHD.dtype:
        raise ValueError(
            f"{queries} queries at {first_query} with a window of {window} need {min(first_query, window - 1)} tokens "
            f"before them in {q_SHD.dtype}, got {past} in {window_kv.dtype}"
        )
    window_kv = window_kv.contiguous()
    spec = exact_spec(q_SHD.dtype, dim)
    form = interleaved_form(spec.data_bytes, 0)
    ends_S = torch.arange(past + 1, past + 1 + queries, device=q_SHD.device)  # a query's own token is its last
    counts_S = ends_S.clamp(max=window)
    addresses_1S = (window_kv.data_ptr() + (ends_S - counts_S) * form.row_bytes)[None]
    counts_S = counts_S.to(torch.int32)
    tile = min(MOST_QUERIES, max(1, GATHERED_BYTES // max(1, bytes_per_query)))
    parts = []
    for lo in range(0, max(1, queries), tile):
        at = slice(lo, min(lo + tile, queries))
        sources = [EntrySource(PagedRows.at(form, addresses_1S[:, at], counts_S[at], window), spec)]
        if entries is not None:
            sources.append(entries(at.start, at.stop))
        parts.append(attend_rows(q_SHD[at], sources, sinks_H, scale, impl="fused"))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


__all__ = [
    "LOGIT_ELEMENTS",
    "EntrySource",
    "KeySet",
    "attend",
    "attend_prefill",
    "attend_prefill_rows",
    "attend_rows",
    "attention_weights",
]
