"""The resident pages of a batch of sessions as rows that kernels read and write in place.

Shape letters: B = places for sessions, P = places for pages of a page table, C = chunks per page, N = P * C,
T = target layers of a part, D = head_dim, I = index_head_dim.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from flashmem.kernels.kv_codec import KVFormatSpec
from flashmem.kernels.paged import PagedRows, index_row_form, overwrite
from flashmem.kernels.put_rows import put_rows

from .layout import encode_entries

if TYPE_CHECKING:
    from .tiered import PageStore, SessionPages


class ResidentRows:
    """Implements `backbone.fused.PagesInPlace`: places for `size` sessions of `width` pages each.

    `fill` puts a batch there and moves no tensor, so that launches that were captured see the new one. Rows of a
    session are those of its page table in order; their number counts up to the chunk born in the step. Valid while the
    device pool stays where it is.
    """

    def __init__(self, store: PageStore, size: int, width: int) -> None:
        self.layout = store.layout
        self._parts = [_Part(store, index, size, width) for index in range(len(store.layout.parts))]
        self._tables: list[list[int]] = []
        self._versions: list[tuple[int, int]] | None = None
        self.size, self.width = size, width

    @property
    def keys_rotated(self) -> bool:
        return self.layout.keys_rotated

    @property
    def kv_spec(self) -> KVFormatSpec:
        return self.layout.kv_spec

    def entries(self, layer: int) -> PagedRows:
        return self._part(layer).entries[layer]

    def keys(self, layer: int) -> PagedRows:
        return self._part(layer).keys[layer]

    def write(self, layer: int, kv_BD: torch.Tensor, keys_BI: torch.Tensor) -> None:
        """Store the entries of the sessions that complete a chunk in this step; what the others give is dropped."""
        part = self._part(layer)
        kv_rows, key_rows, index_rows = encode_entries(self.layout, layer, kv_BD, keys_BI, impl="fused")
        put_rows(part.entries[layer], part.born_B, kv_rows, impl="fused")
        if key_rows is not None:
            put_rows(part.keys[layer], part.born_B, key_rows, impl="fused")
        if index_rows is not None:
            put_rows(part.history[layer], part.born_chunk_B, index_rows, impl="fused")

    def fill(self, sessions: Sequence[SessionPages], visible: Sequence[int]) -> None:
        """Start a step: session b may attend its first `visible[b]` chunks, the one born in this step included."""
        versions = [(session.owner, session.table_version) for session in sessions]
        if versions != self._versions:
            self._fill_tables(sessions)
            self._versions = versions
        counts = [self._count(pages, count) for pages, count in zip(self._tables, visible, strict=True)]
        born = [
            (rows - 1, count - 1) if count > session.num_chunks else (-1, -1)
            for session, rows, count in zip(sessions, counts, visible, strict=True)
        ]
        for part in self._parts:
            part.fill(sessions, counts, born)

    def _part(self, layer: int) -> _Part:
        return self._parts[self.layout.kv_regions[layer].part]

    def _fill_tables(self, sessions: Sequence[SessionPages]) -> None:
        pages_BP, slots_BP = (torch.zeros(self.size, self.width, dtype=torch.int64) for _ in range(2))
        self._tables = []
        for row, session in enumerate(sessions):
            table = session.placed_pages()
            self._tables.append([page for page, _ in table])
            if table:
                pages_BP[row, : len(table)], slots_BP[row, : len(table)] = torch.tensor(table).T
        for part in self._parts:
            part.fill_tables(pages_BP, slots_BP)

    def _count(self, pages: list[int], visible: int) -> int:
        """Rows of the first `visible` chunks in a page table: all its pages but the last visible one are full."""
        if not visible:
            return 0
        chunks = self.layout.page_chunks
        last = (visible - 1) // chunks
        before = bisect_left(pages, last)
        there = before < len(pages) and pages[before] == last
        return before * chunks + (visible - last * chunks if there else 0)


class _Part:
    """What lies on one device."""

    def __init__(self, store: PageStore, index: int, size: int, width: int) -> None:
        layout, pool = store.layout, store.pool.parts[index]
        regions = {layer: region for layer, region in layout.kv_regions.items() if region.part == index}
        self.targets = [layer for layer in layout.target_layers if layer in regions]
        device, rows = pool.device, width * layout.page_chunks
        self.counts_B = torch.zeros(size, dtype=torch.int32, device=device)
        self.slots_BP = torch.zeros(size, width, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(2 + len(self.targets), size, dtype=torch.int64, device=device)
        self.born_B, self.born_chunk_B = self.numbers[:2]
        self.entries = {
            layer: PagedRows(region.form, [[region.of_part(pool)]], self.counts_B, self.slots_BP)
            for layer, region in regions.items()
        }
        self.keys = {
            layer: PagedRows(region.form, [[region.of_part(pool)]], self.counts_B, self.slots_BP)
            for layer, region in layout.key_regions.items()
            if layer in regions
        }
        self.history: dict[int, PagedRows] = {}
        """Index rows of target layers, by chunk."""
        self.chunks_BPC: torch.Tensor | None = None
        form = index_row_form(layout.index_head_dim)
        for place, layer in enumerate(self.targets):
            addresses_1B = self.numbers[2 + place : 3 + place]
            self.history[layer] = PagedRows.at(form, addresses_1B, self.counts_B, rows)
            if layer not in self.keys:  # fp8: level 2 reads these rows too, those of resident pages
                if self.chunks_BPC is None:
                    shape = (size, width, layout.page_chunks)
                    self.chunks_BPC = torch.zeros(shape, dtype=torch.int32, device=device)
                chunks_BN = self.chunks_BPC.view(size, rows)
                self.keys[layer] = PagedRows.at(form, addresses_1B, self.counts_B, rows, chunks_BN)

    def fill_tables(self, pages_BP: torch.Tensor, slots_BP: torch.Tensor) -> None:
        overwrite(self.slots_BP, slots_BP)
        if self.chunks_BPC is not None:
            chunks = self.chunks_BPC.shape[2]
            overwrite(self.chunks_BPC, (pages_BP[..., None] * chunks + torch.arange(chunks)).int())

    def fill(self, sessions: Sequence[SessionPages], counts: list[int], born: list[tuple[int, int]]) -> None:
        counts_B, numbers = (
            torch.zeros(len(self.counts_B), dtype=torch.int32),
            torch.zeros_like(self.numbers, device="cpu"),
        )
        live = len(sessions)
        counts_B[:live] = torch.tensor(counts)
        numbers[:2] = -1
        numbers[:2, :live] = torch.tensor(born).T
        for place, layer in enumerate(self.targets):
            numbers[2 + place, :live] = torch.tensor([session.all_index_rows(layer).data_ptr() for session in sessions])
        overwrite(self.counts_B, counts_B)
        overwrite(self.numbers, numbers)


__all__ = ["ResidentRows"]
