"""Reading a session's whole history in prefill, whatever tier its pages are in.

Shape letters: N = chunks or pages asked for, U = distinct chunks, D = head_dim, I = index_head_dim, C = chunks a page,
E = bytes of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flashmem.kernels.index_rows import decode_index_rows
from flashmem.kernels.kv_codec import decode_rows
from flashmem.kernels.paged import to_device

from .layout import RecordLayout, Region
from .records import merge_rows, read_rows

if TYPE_CHECKING:
    from .tiered import PageTables, SessionPages


class History:
    """The first `num_chunks` chunks of one CSA layer; valid until the session's pages change."""

    def __init__(self, pages: SessionPages, layer: int, num_chunks: int) -> None:
        store = pages.store
        self.num_chunks = num_chunks
        self.keys_rotated = store.layout.keys_rotated
        self._pages = pages
        self._store = store
        self._layer = layer
        self._device = store.layout.device_of(layer)
        self._tables: PageTables = pages.tables()

    def keys(self, first: int, last: int) -> torch.Tensor:
        """Index keys [last - first, I] of chunks first..last-1, in the compute dtype, on the layer's device."""
        if not 0 <= first <= last <= self.num_chunks:
            raise ValueError(f"chunks {first}..{last} are not within 0..{self.num_chunks}")
        layout = self._store.layout
        region = layout.key_regions.get(self._layer)
        if region is None:
            rows_NE = self._pages.all_index_rows(self._layer)[first:last]
        else:
            first_page = first // layout.page_chunks
            pages_N = torch.arange(first_page, layout.pages(last))
            skipped = first_page * layout.page_chunks
            rows_NE = self._read(region, pages_N, None).flatten(0, 1)[first - skipped : last - skipped]
        return decode_keys(layout, rows_NE, self._store.dtype)

    def kv(self, chunk_ids: torch.Tensor) -> torch.Tensor:
        """KV entries [..., D] of chunk ids (int64, each in 0..num_chunks-1); every chunk is moved once."""
        layout = self._store.layout
        ids_N = chunk_ids.reshape(-1)
        # a bitmap over the history instead of a sort: the picks outnumber the chunks by far
        wanted = torch.zeros(self.num_chunks, dtype=torch.bool, device=ids_N.device)
        wanted[ids_N] = True
        ids_U = wanted.nonzero().squeeze(1).cpu()
        rows_UE = self._read(layout.kv_regions[self._layer], ids_U // layout.page_chunks, ids_U % layout.page_chunks)
        kv_UD = decode_rows(layout.kv_spec, rows_UE, self._store.dtype)
        place_N = (wanted.cumsum(0) - 1).index_select(0, ids_N).to(kv_UD.device)
        return kv_UD.index_select(0, place_N).view(*chunk_ids.shape, kv_UD.shape[-1])

    def _read(self, region: Region, pages_N: torch.Tensor, offsets_N: torch.Tensor | None) -> torch.Tensor:
        """Rows of chunks (or of whole pages), each from the nearest tier that has it, on the layer's device."""
        tiers_N = self._tables.tiers[pages_N]
        if self._device.type != "cpu":  # there the mirror is as near as the pool, and often one contiguous source
            tiers_N = tiers_N.masked_fill(self._tables.slots[pages_N] >= 0, -1)
        sources = tiers_N.unique().tolist() or [-1]
        if len(sources) == 1:
            return self._read_source(sources[0], region, pages_N, offsets_N)
        pieces = []
        for source in sources:
            at = (tiers_N == source).nonzero().squeeze(1)
            offsets = None if offsets_N is None else offsets_N[at]
            pieces.append((at, self._read_source(source, region, pages_N[at], offsets)))
        return merge_rows(pieces)

    def _read_source(
        self, source: int, region: Region, pages_N: torch.Tensor, offsets_N: torch.Tensor | None
    ) -> torch.Tensor:
        """Rows from one tier, or from the device pool (-1)."""
        store = self._store
        if source < 0:
            pool = region.of_part(store.pool.parts[region.part])
            offsets = None if offsets_N is None else to_device(offsets_N, self._device)
            return read_rows(region, pool, to_device(self._tables.slots[pages_N], self._device), offsets)
        store.pool.wait_host(store.pool.copied_out)
        rows = self._pages.tier(source).read(region, self._tables.records[pages_N], offsets_N)
        return rows if self._device.type == "cpu" else rows.to(self._device)


def decode_keys(layout: RecordLayout, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Index keys [..., I] of the given dtype from stored rows [..., E]: index rows in fp8, else the raw dtype."""
    exact = layout.kv_spec.exact_dtype
    if exact is None:
        return decode_index_rows(rows).to(dtype)
    if not rows.numel():
        return rows.new_empty((*rows.shape[:-1], layout.index_head_dim), dtype=dtype)
    return rows.contiguous().view(exact).to(dtype)


__all__ = ["History", "decode_keys"]
