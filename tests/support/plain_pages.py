"""The smallest thing that satisfies the page protocols: every chunk in a list, any subset of pages resident."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class PlainPages:
    def __init__(self, page_chunks: int, head_dim: int, index_dim: int) -> None:
        self.page_chunks, self.head_dim, self.index_dim = page_chunks, head_dim, index_dim
        self.num_chunks = 0
        self.kv: dict[int, torch.Tensor] = {}
        self.index_keys: dict[int, torch.Tensor] = {}
        self.resident: set[int] | None = None  # None: all

    def reserve(self, count: int) -> None:
        pass

    def write(self, layer: int, kv_ND: torch.Tensor, keys_NI: torch.Tensor, *, impl: None = None) -> None:
        for table, new in ((self.kv, kv_ND), (self.index_keys, keys_NI)):
            old = table.get(layer, new[:0])[: self.num_chunks]
            table[layer] = torch.cat((old, new))

    def history(self, layer: int, num_chunks: int) -> PlainHistory:
        return PlainHistory(self.kv[layer][:num_chunks], self.index_keys[layer][:num_chunks])

    def commit(self, count: int) -> None:
        self.num_chunks += count


class PlainHistory:
    keys_rotated = False

    def __init__(self, kv: torch.Tensor, keys: torch.Tensor) -> None:
        self.num_chunks, self._kv, self._keys = len(kv), kv, keys

    def keys(self, first: int, last: int) -> torch.Tensor:
        return self._keys[first:last]

    def kv(self, chunk_ids: torch.Tensor) -> torch.Tensor:
        return self._kv[chunk_ids]


class PlainBatch:
    """Decode view; unused positions hold NaN."""

    def __init__(self, sessions: Sequence[PlainPages], visible: Sequence[int]) -> None:
        self.sessions, self.visible = sessions, visible
        chunks = sessions[0].page_chunks
        tables = []
        for pages, count in zip(sessions, visible, strict=True):
            every = range(-(-count // chunks))
            tables.append([p for p in every if pages.resident is None or p in pages.resident or p == every[-1]])
        self.width = max(len(t) for t in tables)
        self.ids = torch.full((len(sessions), self.width * chunks), -1)
        for row, (table, count) in enumerate(zip(tables, visible, strict=True)):
            for column, page in enumerate(table):
                ids = torch.arange(page * chunks, (page + 1) * chunks)
                self.ids[row, column * chunks : (column + 1) * chunks] = torch.where(ids < count, ids, -1)

    def keys_rotated(self, layer: int) -> bool:
        return False

    def chunk_ids(self, layer: int) -> torch.Tensor:
        return self.ids

    def _gather(self, row: int, table: torch.Tensor | None, ids: torch.Tensor, dim: int) -> torch.Tensor:
        out = torch.full((len(ids), dim), float("nan"))
        if table is not None:
            good = (ids >= 0) & (ids < len(table))
            out[good] = table[ids[good]].float()
        return out

    def keys(self, layer: int) -> torch.Tensor:
        first = self.sessions[0]
        rows = [
            self._gather(i, s.index_keys.get(layer), self.ids[i], first.index_dim) for i, s in enumerate(self.sessions)
        ]
        return torch.stack(rows).view(len(rows), self.width, -1, first.index_dim)

    def kv(self, layer: int, picks_BK: torch.Tensor) -> torch.Tensor:
        ids = self.ids.gather(1, picks_BK)
        rows = [self._gather(i, s.kv.get(layer), ids[i], s.head_dim) for i, s in enumerate(self.sessions)]
        return torch.stack(rows)

    def write(self, layer: int, rows: torch.Tensor, kv_ND: torch.Tensor, keys_NI: torch.Tensor) -> None:
        for row, kv, key in zip(rows.tolist(), kv_ND, keys_NI, strict=True):
            self.sessions[row].write(layer, kv[None], key[None])
