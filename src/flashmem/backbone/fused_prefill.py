"""A prefill on the fused kernels: level 2 and attention treat every query as a session whose rows others share.

Keys are scored as they are stored, window and HCA entries are read in place, and so are picked entries as long as the
history is on the device; else the distinct ones are gathered. All else is `steps.PrefillStep`.
Shape letters: S = tokens, E = bytes of an entry, H = heads, D = head_dim, I = index_head_dim, K = picks, N = entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch

from ..kernels.kv_codec import KVFormatSpec, decode_rows, encode_rows, exact_spec
from ..kernels.paged import PagedRows, interleaved_form
from ..kernels.select_chunks import topk_history
from ..kernels.sparse_attention import EntrySource, attend_prefill_rows
from ..types import LayerHistory
from .steps import Entries, PrefillStep, project_query

STORED_TILE = 65_536
"""Chunks whose stored keys a prefill holds at a time."""


class HistoryInPlace(LayerHistory, Protocol):
    """A history whose rows the kernels read as they are stored."""

    kv_spec: KVFormatSpec

    @property
    def on_device(self) -> bool:
        """Whether `entries` gathers nothing."""
        ...

    def stored_keys(self, first: int, last: int) -> torch.Tensor:
        """Keys of chunks first..last-1: index rows uint8 [last - first, I + 4], or exact keys [last - first, I]."""
        ...

    def entries(self, picks_SK: torch.Tensor) -> EntrySource:
        """KV entries of picked chunk ids (int64, -1 for none)."""
        ...


class FusedPrefillStep(PrefillStep):
    """`PrefillStep` on Triton; nobody can observe its picks, since it has neither scores nor weights."""

    fused = True
    attend_queries = staticmethod(attend_prefill_rows)

    def _csa_entries(
        self, compressor: Any, layer: int, total: int, hidden: torch.Tensor, q_residual: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[Entries, int]:  # fmt: skip
        history = cast(HistoryInPlace, self.pages.history(layer, total))
        q, weights, finish = project_query(compressor.indexer, hidden, q_residual, rope, history.keys_rotated)
        k = min(self.pool.geometry.index_topk, total)
        picks_SK = topk_history(
            q[0], weights[0], self._visible(self.pool.geometry.csa_ratio, q.device), _stored_tiles(history), k,
            finish=finish, precision="fp32" if self.pool.dtype is torch.float32 else None, impl="fused",
        )  # fmt: skip
        gathered = 0 if history.on_device else k * history.kv_spec.entry_bytes
        return (lambda lo, hi: history.entries(picks_SK[lo:hi])), gathered

    def _hca_entries(self, rows_NE: torch.Tensor) -> tuple[Entries, int]:
        g = self.pool.geometry
        # decoded once: every query reads them all
        entries_ND = decode_rows(self.pool.hca_format, rows_NE, self.pool.dtype)
        spec = exact_spec(self.pool.dtype, g.head_dim)
        rows = PagedRows(interleaved_form(spec.data_bytes, 0), [[encode_rows(spec, entries_ND)]], [len(entries_ND)])
        visible_S = self._visible(g.hca_ratio, rows_NE.device).to(torch.int32)
        return (lambda lo, hi: EntrySource(rows.shared_by(hi - lo, visible_S[lo:hi]), spec)), 0


def _stored_tiles(history: HistoryInPlace) -> Iterator[tuple[int, torch.Tensor]]:
    for first in range(0, history.num_chunks, STORED_TILE):
        yield first, history.stored_keys(first, min(first + STORED_TILE, history.num_chunks))


__all__ = ["STORED_TILE", "FusedPrefillStep", "HistoryInPlace"]
