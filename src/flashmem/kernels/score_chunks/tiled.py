"""The definition in matrix products over tiles, so that no tensor of all queries, heads and chunks exists.

Neither forward nor backward keeps products: the backward computes every tile again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..index_rows import decode_index_rows

# float32 products of one tile: 4 MiB stay in a CPU's cache; a GPU wants few large launches (256 MiB)
ELEMENT_BUDGET = {"cpu": 1 << 20, "cuda": 1 << 26}
LEAST_CHUNKS = 64  # below this many columns a matrix product wastes more than the tile saves


def score_chunks_tiled(
    q_BMHI: torch.Tensor, keys_BNC: torch.Tensor, w_BMH: torch.Tensor, *, element_budget: int | None = None
) -> torch.Tensor:
    budget = element_budget or ELEMENT_BUDGET.get(q_BMHI.device.type, ELEMENT_BUDGET["cuda"])
    return _Tiled.apply(  # type: ignore[no-untyped-call]
        q_BMHI, keys_BNC, w_BMH, budget
    )


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BMHI: torch.Tensor, keys_BNC: torch.Tensor, w_BMH: torch.Tensor, budget: int) -> Any:
        ctx.save_for_backward(q_BMHI, keys_BNC, w_BMH)
        ctx.budget = budget
        logits_BMN = q_BMHI.new_empty(*q_BMHI.shape[:2], keys_BNC.shape[1], dtype=torch.float32)
        for m, n in _tiles(q_BMHI, keys_BNC, budget):
            dot_BmHn = dots(q_BMHI[:, m], float_keys(keys_BNC[:, n])).relu_()
            logits_BMN[:, m, n] = (w_BMH[:, m].float().unsqueeze(2) @ dot_BmHn).squeeze(2)
        return logits_BMN

    @staticmethod
    def backward(ctx: Any, grad_BMN: torch.Tensor) -> Any:
        q_BMHI, keys_BNC, w_BMH = ctx.saved_tensors
        dq, dw = torch.zeros_like(q_BMHI, dtype=torch.float32), torch.zeros_like(w_BMH, dtype=torch.float32)
        dkeys = torch.zeros_like(keys_BNC, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for m, n in _tiles(q_BMHI, keys_BNC, ctx.budget):
            keys_BnI, grad_Bmn = float_keys(keys_BNC[:, n]), grad_BMN[:, m, n]
            dot_BmHn = dots(q_BMHI[:, m], keys_BnI)
            active = dot_BmHn > 0
            dw[:, m] += (dot_BmHn.relu_() @ grad_Bmn.unsqueeze(-1)).squeeze(-1)
            ddot_BmHn = torch.where(active, grad_Bmn.unsqueeze(2) * w_BMH[:, m].float().unsqueeze(-1), 0.0)
            dq[:, m] += (ddot_BmHn.flatten(1, 2) @ keys_BnI).unflatten(1, ddot_BmHn.shape[1:3])
            if dkeys is not None:
                dkeys[:, n] += ddot_BmHn.flatten(1, 2).transpose(1, 2) @ q_BMHI[:, m].float().flatten(1, 2)
        return dq.to(q_BMHI.dtype), None if dkeys is None else dkeys.to(keys_BNC.dtype), dw.to(w_BMH.dtype), None


def _tiles(q_BMHI: torch.Tensor, keys_BNC: torch.Tensor, budget: int) -> Iterator[tuple[slice, slice]]:
    batch, queries, heads, _ = q_BMHI.shape
    query_tile = max(1, min(queries, budget // max(1, batch * heads * LEAST_CHUNKS)))
    chunk_tile = max(1, budget // max(1, batch * heads * query_tile))
    for n in range(0, keys_BNC.shape[1], chunk_tile):
        for m in range(0, queries, query_tile):
            yield slice(m, m + query_tile), slice(n, n + chunk_tile)


def dots(q_BmHI: torch.Tensor, keys_BnI: torch.Tensor) -> torch.Tensor:
    return (q_BmHI.float().flatten(1, 2) @ keys_BnI.transpose(-1, -2)).unflatten(1, q_BmHI.shape[1:3])


def float_keys(keys_BnC: torch.Tensor) -> torch.Tensor:
    return decode_index_rows(keys_BnC) if keys_BnC.dtype is torch.uint8 else keys_BnC.float()
