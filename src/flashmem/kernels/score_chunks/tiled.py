"""The definition in matrix products over tiles, so that no tensor of all queries, heads and chunks exists."""

from __future__ import annotations

import torch

from ..index_rows import decode_index_rows

# float32 products of one tile: 4 MiB stay in a CPU's cache; a GPU wants few large launches (256 MiB)
ELEMENT_BUDGET = {"cpu": 1 << 20, "cuda": 1 << 26}
LEAST_CHUNKS = 64  # below this many columns a matrix product wastes more than the tile saves


def score_chunks_tiled(
    q_BMHI: torch.Tensor, keys_BNC: torch.Tensor, w_BMH: torch.Tensor, *, element_budget: int | None = None
) -> torch.Tensor:
    budget = element_budget or ELEMENT_BUDGET.get(q_BMHI.device.type, ELEMENT_BUDGET["cuda"])
    batch, queries, heads, _ = q_BMHI.shape
    chunks = keys_BNC.shape[1]
    query_tile = max(1, min(queries, budget // max(1, batch * heads * LEAST_CHUNKS)))
    chunk_tile = max(1, budget // max(1, batch * heads * query_tile))
    tiles_BMn = [
        _score_keys(q_BMHI, _float_keys(keys_BNC[:, first : first + chunk_tile]), w_BMH, query_tile)
        for first in range(0, chunks, chunk_tile)
    ]
    return torch.cat(tiles_BMn, dim=2) if tiles_BMn else q_BMHI.new_empty(batch, queries, 0, dtype=torch.float32)


def _float_keys(keys_BnC: torch.Tensor) -> torch.Tensor:
    return decode_index_rows(keys_BnC) if keys_BnC.dtype is torch.uint8 else keys_BnC.float()


def _score_keys(q_BMHI: torch.Tensor, keys_BnI: torch.Tensor, w_BMH: torch.Tensor, query_tile: int) -> torch.Tensor:
    keys_BIn = keys_BnI.transpose(1, 2)
    parts_Bmn = []
    for first in range(0, q_BMHI.shape[1], query_tile):
        q_BmHI = q_BMHI[:, first : first + query_tile].float()
        w_Bm1H = w_BMH[:, first : first + query_tile].float().unsqueeze(2)
        dot_BmHn = (q_BmHI.flatten(1, 2) @ keys_BIn).unflatten(1, q_BmHI.shape[1:3]).relu_()
        parts_Bmn.append((w_Bm1H @ dot_BmHn).squeeze(2))
    return torch.cat(parts_Bmn, dim=1)
