"""The resident pages of a batch of sessions, as a decode step reads and extends them.

Shape letters: B = sessions, P = pages of the longest page table among them, C = chunks per page, K = picks,
N = sessions that completed a chunk, D = head_dim, I = index_head_dim, E = bytes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from flashmem.kernels.kv_codec import decode_rows, get_planar, get_planar_pages
from flashmem.kernels.paged import to_device

from .history import decode_keys

if TYPE_CHECKING:
    from .tiered import PageStore, SessionPages


class DecodeBatch:
    """Implements `types.DecodePages`. Before each step call `begin`; rows are the sessions in the given order.

    A table has the session's live pages and those reserved beyond them, so that a chunk born in this step is there.
    """

    def __init__(self, store: PageStore, sessions: Sequence[SessionPages]) -> None:
        self._store = store
        self._sessions = tuple(sessions)
        self._versions: tuple[int, ...] | None = None
        self._visible: list[int] | None = None
        self._parts = len(store.layout.parts)

    def update(self) -> None:
        """Rebuild the page tables if a session's changed since the last call."""
        versions = tuple(session.table_version for session in self._sessions)
        if versions == self._versions:
            return
        tables = [session.placed_pages() for session in self._sessions]
        width = max((len(table) for table in tables), default=0)
        pages_BP = torch.full((len(tables), width), -1)
        slots_BP = torch.zeros((len(tables), width), dtype=torch.int64)  # pads read some slot; `chunk_ids` masks them
        for row, table in enumerate(tables):
            if table:
                pages_BP[row, : len(table)] = torch.tensor([page for page, _ in table])
                slots_BP[row, : len(table)] = torch.tensor([slot for _, slot in table])
        devices = self._store.layout.devices
        self._pages_BP = [to_device(pages_BP, device) for device in devices]
        self._slots_BP = [to_device(slots_BP, device) for device in devices]
        self._versions, self._visible = versions, None

    def begin(self, num_chunks_B: Sequence[int] | torch.Tensor) -> None:
        """Start a step: row b may attend its first `num_chunks_B[b]` chunks, the one born in this step included."""
        self.update()
        visible = [int(count) for count in num_chunks_B]
        if len(visible) != len(self._sessions):
            raise ValueError(f"{len(visible)} counts for {len(self._sessions)} sessions")
        for row, (session, count) in enumerate(zip(self._sessions, visible, strict=True)):
            if not 0 <= count <= session.reserved_chunks:
                raise ValueError(f"row {row}: {count} visible chunks, {session.reserved_chunks} reserved")
        if visible == self._visible:
            return
        self._visible = visible
        self._ids = [self._chunk_ids(pages_BP, visible) for pages_BP in self._pages_BP]

    def keys_rotated(self, layer: int) -> bool:
        return self._store.layout.keys_rotated

    def chunk_ids(self, layer: int) -> torch.Tensor:
        """Int64 [B, P * C] chunk id of every key, -1 where there is no chunk to attend."""
        return self._ids[self._part(layer)]

    def keys(self, layer: int) -> torch.Tensor:
        """Index keys [B, P, C, I]; rows whose chunk id is -1 are unspecified."""
        layout, part = self._store.layout, self._part(layer)
        region = layout.key_regions.get(layer)
        if region is None:
            rows = self._index_rows(layer, self._pages_BP[part])
        else:
            pool = region.of_part(self._store.pool.parts[part])
            rows = get_planar_pages(region.form, pool, self._slots_BP[part])
        return decode_keys(layout, rows, self._store.dtype)

    def kv(self, layer: int, picks_BK: torch.Tensor) -> torch.Tensor:
        """KV entries [B, K, D] of flat indices into P * C."""
        layout, part = self._store.layout, self._part(layer)
        region = layout.kv_regions[layer]
        slots_BK = self._slots_BP[part].gather(1, picks_BK // layout.page_chunks)
        pool = region.of_part(self._store.pool.parts[part])
        rows_BKE = get_planar(region.form, pool, slots_BK, picks_BK % layout.page_chunks)
        return decode_rows(layout.kv_spec, rows_BKE, self._store.dtype)

    def write(self, layer: int, rows: torch.Tensor, kv_ND: torch.Tensor, keys_NI: torch.Tensor) -> None:
        """Store the chunk that batch rows `rows` (int64 [N], best on the CPU) completed: their last visible one."""
        assert self._visible is not None, "begin was not called for this step"
        store, chunks_per_page = self._store, self._store.layout.page_chunks
        sessions = [self._sessions[row] for row in rows.tolist()]
        chunks = [self._visible[row] - 1 for row in rows.tolist()]
        for session, chunk in zip(sessions, chunks, strict=True):
            if chunk < session.num_chunks:
                raise ValueError(f"chunk {chunk} is committed; a step writes the chunk it made visible")
        device = store.layout.device_of(layer)
        slots = [session.slot_of(chunk // chunks_per_page) for session, chunk in zip(sessions, chunks, strict=True)]
        slots_N = to_device(torch.tensor(slots, dtype=torch.int64), device)
        offsets = [chunk % chunks_per_page for chunk in chunks]
        offsets_N = to_device(torch.tensor(offsets, dtype=torch.int64), device)
        index_rows = store.write_entries(layer, slots_N, offsets_N, kv_ND, keys_NI).index_rows
        if index_rows is not None:
            for session, chunk, row in zip(sessions, chunks, index_rows, strict=True):
                session.all_index_rows(layer)[chunk] = row

    def _part(self, layer: int) -> int:
        return self._store.layout.kv_regions[layer].part

    def _chunk_ids(self, pages_BP: torch.Tensor, visible: list[int]) -> torch.Tensor:
        chunks_per_page = self._store.layout.page_chunks
        first_BP1 = (pages_BP * chunks_per_page).unsqueeze(-1)
        ids_BPC = first_BP1 + torch.arange(chunks_per_page, device=pages_BP.device)
        visible_B11 = to_device(torch.tensor(visible, dtype=torch.int64), pages_BP.device).view(-1, 1, 1)
        there = (first_BP1 >= 0) & (ids_BPC < visible_B11)
        return ids_BPC.masked_fill(~there, -1).flatten(1)

    def _index_rows(self, layer: int, pages_BP: torch.Tensor) -> torch.Tensor:
        """Index rows [B, P, C, E] of a target layer, of the pages in the tables."""
        chunks_per_page = self._store.layout.page_chunks
        rows = []
        for session, pages_P in zip(self._sessions, pages_BP, strict=True):
            pages_RCE = session.all_index_rows(layer).unflatten(0, (-1, chunks_per_page))
            rows.append(pages_RCE.index_select(0, pages_P.clamp_min(0)))
        return torch.stack(rows)


__all__ = ["DecodeBatch"]
