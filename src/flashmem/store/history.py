"""Reading a session's whole history in prefill, whatever tier its pages are in.

Shape letters: N = chunks or pages asked for, U = distinct chunks, D = head_dim, I = index_head_dim, C = chunks a page,
E = bytes of a row, S = queries, K = picks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flashmem.kernels.index_rows import decode_index_rows
from flashmem.kernels.kv_codec import decode_rows
from flashmem.kernels.paged import PagedRows, interleaved_form, to_device
from flashmem.kernels.sparse_attention import EntrySource

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
        self.kv_spec = store.layout.kv_spec
        self._pages = pages
        self._store = store
        self._layer = layer
        self._device = store.layout.device_of(layer)
        held = pages.held_rows()
        self._held_keys = None if held is None else held.keys.get(layer)
        self._held_kv = None if held is None else held.kv.get(layer)

    def keys(self, first: int, last: int) -> torch.Tensor:
        """Index keys [last - first, I] of chunks first..last-1, in the compute dtype, on the layer's device."""
        return decode_keys(self._store.layout, self._key_rows(first, last), self._store.dtype)

    def stored_keys(self, first: int, last: int) -> torch.Tensor:
        """The same as they are stored: index rows uint8 [last - first, I + 4] in fp8, else [last - first, I]."""
        rows_NE, exact = self._key_rows(first, last), self._store.layout.kv_spec.exact_dtype
        return rows_NE if exact is None else rows_NE.contiguous().view(exact)

    def _key_rows(self, first: int, last: int) -> torch.Tensor:
        if not 0 <= first <= last <= self.num_chunks:
            raise ValueError(f"chunks {first}..{last} are not within 0..{self.num_chunks}")
        layout = self._store.layout
        region = layout.key_regions.get(self._layer)
        if self._held_keys is not None:
            return self._held_keys[first:last]
        if region is None:
            return self._pages.all_index_rows(self._layer)[first:last]
        first_page = first // layout.page_chunks
        pages_N = torch.arange(first_page, layout.pages(last))
        skipped = first_page * layout.page_chunks
        return self._read(region, pages_N, None).flatten(0, 1)[first - skipped : last - skipped]

    def kv(self, chunk_ids: torch.Tensor) -> torch.Tensor:
        """KV entries [..., D] of chunk ids (int64, each in 0..num_chunks-1); every chunk is moved once."""
        if self._held_kv is not None:
            rows_NE = self._held_kv.index_select(0, chunk_ids.reshape(-1))
            kv_ND = decode_rows(self._store.layout.kv_spec, rows_NE, self._store.dtype)
            return kv_ND.view(*chunk_ids.shape, kv_ND.shape[-1])
        rows_UE, place_N = self._distinct(chunk_ids.reshape(-1))
        kv_UD = decode_rows(self._store.layout.kv_spec, rows_UE, self._store.dtype)
        return kv_UD.index_select(0, place_N.to(kv_UD.device)).view(*chunk_ids.shape, kv_UD.shape[-1])

    @property
    def on_device(self) -> bool:
        """Whether all entries of the history are on the device: held there, or in the pool."""
        return self._held_kv is not None or bool((self._slots >= 0).all())

    def entries(self, picks_SK: torch.Tensor) -> EntrySource:
        """KV entries of picked chunk ids (int64, -1 for none) of S queries, where they lie.

        That is among the held rows, or in the pool if all pages are there. Else the distinct ones are gathered first,
        for which the host waits.
        """
        layout, queries = self._store.layout, len(picks_SK)
        region, chunks = layout.kv_regions[self._layer], layout.page_chunks
        dense = interleaved_form(region.form.data_bytes, region.form.tail_bytes)
        if self._held_kv is not None:
            rows = PagedRows(dense, [[self._held_kv]], [self.num_chunks])
            return EntrySource(rows.shared_by(queries), layout.kv_spec, picks_SK)
        ids_SK = picks_SK.clamp_min(0)
        if self.on_device:
            slots_P = to_device(self._slots, self._device)
            place_SK = slots_P[ids_SK // chunks] * chunks + ids_SK % chunks
            pool = region.of_part(self._store.pool.parts[region.part])
            rows = PagedRows(region.form, [[pool]], [len(pool) * chunks])
        else:
            rows_UE, place_N = self._distinct(ids_SK.flatten())
            place_SK = place_N.view(ids_SK.shape)
            rows = PagedRows(dense, [[rows_UE]], [len(rows_UE)])
        return EntrySource(rows.shared_by(queries), layout.kv_spec, place_SK.masked_fill(picks_SK < 0, -1))

    @property
    def _tables(self) -> PageTables:
        return self._pages.tables()

    @property
    def _slots(self) -> torch.Tensor:
        return self._tables.slots[: self._store.layout.pages(self.num_chunks)]

    def _distinct(self, ids_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [U, E] of the distinct chunks among these, each moved once, and the place of every id in them."""
        layout = self._store.layout
        # a bitmap over the history instead of a sort: the picks outnumber the chunks by far
        wanted = torch.zeros(self.num_chunks, dtype=torch.bool, device=ids_N.device)
        wanted[ids_N] = True
        ids_U = wanted.nonzero().squeeze(1).cpu()
        rows_UE = self._read(layout.kv_regions[self._layer], ids_U // layout.page_chunks, ids_U % layout.page_chunks)
        return rows_UE.contiguous(), (wanted.cumsum(0) - 1).index_select(0, ids_N)

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
