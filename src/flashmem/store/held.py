"""A session's history for as long as an append reads it: rows of all chunks, contiguous on their devices.

Every piece of a long prefill reads all index keys, and entries from all over the history. From below the device they
would come again for every piece.

Shape letters: N = chunks, C = chunks per page, E = bytes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layout import EncodedRows, RecordLayout
from .records import read_rows


class HeldRows:
    """Rows of the first chunks as they are stored, for the layers and kinds that a budget has room for.

    Index keys come before entries: a prefill reads them all. Those that a target layer keeps as index rows anyway are
    not held again.
    """

    def __init__(self, layout: RecordLayout, num_chunks: int, budget_bytes: int | None) -> None:
        self.layout, self.num_chunks, self.nbytes = layout, num_chunks, 0
        self.keys: dict[int, torch.Tensor] = {}
        """Uint8 [num_chunks, E] by layer."""
        self.kv: dict[int, torch.Tensor] = {}
        for held, regions in ((self.keys, layout.key_regions), (self.kv, layout.kv_regions)):
            for layer, region in regions.items():
                size = num_chunks * region.form.row_bytes
                if budget_bytes is None or self.nbytes + size <= budget_bytes:
                    shape = (num_chunks, region.form.row_bytes)
                    held[layer] = torch.empty(shape, dtype=torch.uint8, device=layout.device_of(layer))
                    self.nbytes += size

    def put(self, layer: int, first: int, rows: EncodedRows) -> None:
        """Put the rows of chunks from `first` on."""
        for held, new in ((self.keys, rows.keys), (self.kv, rows.kv)):
            if layer in held and new is not None:
                held[layer][first : first + len(new)] = new

    def put_pages(self, first_page: int, parts: Sequence[torch.Tensor], num_pages: int, num_chunks: int) -> None:
        """Put pages whose bytes are the first rows of `parts` (uint8 [pages, part_bytes], a device each).

        Of the last page there are the rows of chunks below `num_chunks`.
        """
        first = first_page * self.layout.page_chunks
        last = min(num_chunks, first + num_pages * self.layout.page_chunks)
        for held, regions in ((self.keys, self.layout.key_regions), (self.kv, self.layout.kv_regions)):
            for layer, rows_NE in held.items():
                part = regions[layer].of_part(parts[regions[layer].part])
                pages_P = torch.arange(num_pages, device=part.device)
                rows_NE[first:last] = read_rows(regions[layer], part, pages_P, None).flatten(0, 1)[: last - first]


__all__ = ["HeldRows"]
