"""The definition of writing rows in place."""

from __future__ import annotations

import torch

from ..kv_codec import put_planar
from ..paged import PagedRows


def put_rows_reference(rows: PagedRows, index_B: torch.Tensor, bytes_BE: torch.Tensor) -> None:
    chunks = rows.form.page_chunks
    for b, (row, region) in enumerate(zip(index_B.tolist(), rows.regions[0], strict=True)):
        if row >= 0:
            page = row // chunks if rows.numbers_BP is None else int(rows.numbers_BP[b, row // chunks])
            put_planar(rows.form, region, torch.tensor([page]), torch.tensor([row % chunks]), bytes_BE[b : b + 1])
