"""The definition in matrix products over tiles, so that no tensor of all queries, heads and chunks exists.

Neither forward nor backward keeps products: the backward computes every tile again. A row's scale stays outside,
relu(q . s k) = s relu(q . k), and its e4m3 values are exact in bfloat16. Of a product the backward needs the sign only:
with G_h = sum over n of grad_n [q_h . k_n > 0] k_n, the gradient of q_h is w_h G_h and that of w_h is q_h . G_h.

Under autocast to bfloat16 the factors of products are rounded to it, and products as well; logits, gradients and all
sums stay float32. Autocast itself must not see these functions: it would round logits in the forward, and nothing in
the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..index_rows import split_index_rows
from ..tiles import for_device

# products of one tile: 4 MiB stay in a CPU's cache; a GPU wants few large launches (256 MiB in float32)
ELEMENT_BUDGET = {"cpu": 1 << 20, "cuda": 1 << 26}
LEAST_CHUNKS = 64  # below this many columns a matrix product wastes more than the tile saves


def score_chunks_tiled(
    q_BMHI: torch.Tensor, keys_BNC: torch.Tensor, w_BMH: torch.Tensor, *, element_budget: int | None = None
) -> torch.Tensor:
    budget, dtype = element_budget or default_budget(q_BMHI.device), product_dtype(q_BMHI.device)
    with torch.autocast(q_BMHI.device.type, enabled=False):
        return _Tiled.apply(  # type: ignore[no-untyped-call]
            q_BMHI, keys_BNC, w_BMH, budget, dtype
        )


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BMHI: torch.Tensor, keys_BNC: torch.Tensor, w_BMH: torch.Tensor, budget: int, dtype: torch.dtype
    ) -> Any:
        ctx.save_for_backward(q_BMHI, keys_BNC, w_BMH)
        ctx.budget, ctx.dtype = budget, dtype
        q, w = q_BMHI.to(dtype), w_BMH.to(dtype)
        logits_BMN = q_BMHI.new_empty(*q_BMHI.shape[:2], keys_BNC.shape[1], dtype=torch.float32)
        for m, n in _tiles(q_BMHI, keys_BNC, budget):
            keys_BnI, scale_Bn = split_keys(keys_BNC[:, n], dtype)
            logits_BMN[:, m, n] = weighted_relu(dots(q[:, m], keys_BnI), w[:, m]) * scale_Bn.unsqueeze(1)
        return logits_BMN

    @staticmethod
    def backward(ctx: Any, grad_BMN: torch.Tensor) -> Any:
        q_BMHI, keys_BNC, w_BMH = ctx.saved_tensors
        q = q_BMHI.to(ctx.dtype)
        sums_BMHI = torch.zeros_like(q_BMHI, dtype=torch.float32)
        dkeys = torch.zeros_like(keys_BNC, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with torch.autocast(q.device.type, enabled=False):
            for m, n in _tiles(q_BMHI, keys_BNC, ctx.budget):
                keys_BnI, scale_Bn = split_keys(keys_BNC[:, n], ctx.dtype)
                grad_Bmn = grad_BMN[:, m, n] * scale_Bn.unsqueeze(1)
                passed_BXn = where_positive(grad_Bmn, dots(q[:, m], keys_BnI)).flatten(1, 2)
                sums_BMHI[:, m] += summed(passed_BXn, keys_BnI).unflatten(1, (-1, q.shape[2]))
                if dkeys is not None:
                    weighted_BXI = (w_BMH[:, m].unsqueeze(-1) * q_BMHI[:, m]).to(ctx.dtype).flatten(1, 2)
                    dkeys[:, n] += summed(passed_BXn.transpose(1, 2), weighted_BXI)
        dq, dw = of_queries(sums_BMHI, q_BMHI, w_BMH)
        return dq, None if dkeys is None else dkeys.to(keys_BNC.dtype), dw, None, None


def _tiles(q_BMHI: torch.Tensor, keys_BNC: torch.Tensor, budget: int) -> Iterator[tuple[slice, slice]]:
    batch, queries, heads, _ = q_BMHI.shape
    query_tile = max(1, min(queries, budget // max(1, batch * heads * LEAST_CHUNKS)))
    chunk_tile = max(1, budget // max(1, batch * heads * query_tile))
    for n in range(0, keys_BNC.shape[1], chunk_tile):
        for m in range(0, queries, query_tile):
            yield slice(m, m + query_tile), slice(n, n + chunk_tile)


def default_budget(device: torch.device) -> int:
    return for_device(ELEMENT_BUDGET, device)


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 under autocast to it, else float32."""
    rounds = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) is torch.bfloat16
    return torch.bfloat16 if rounds else torch.float32


def split_keys(keys_nC: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [..., n, I] for products, and the float32 scales [..., n] that stay outside (ones for float keys)."""
    if keys_nC.dtype is torch.uint8:
        values_nI, scale_n = split_index_rows(keys_nC)
        return values_nI.to(dtype), scale_n
    return keys_nC.to(dtype), keys_nC.new_ones(keys_nC.shape[:-1], dtype=torch.float32)


def dots(q_BmHI: torch.Tensor, keys_BnI: torch.Tensor) -> torch.Tensor:
    """Products [B, m, H, n]."""
    return (q_BmHI.flatten(1, 2) @ keys_BnI.transpose(-1, -2)).unflatten(1, q_BmHI.shape[1:3])


def weighted_relu(dot_BmHn: torch.Tensor, w_BmH: torch.Tensor) -> torch.Tensor:
    """Sum over heads of w * relu(products), float32 [B, m, n]; overwrites the products."""
    logits_X1n = summed(w_BmH.flatten(0, 1).unsqueeze(1), dot_BmHn.relu_().flatten(0, 1))
    return logits_X1n.squeeze(1).unflatten(0, w_BmH.shape[:2])


def where_positive(grad_Bmn: torch.Tensor, dot_BmHn: torch.Tensor) -> torch.Tensor:
    """The gradient of every head's chunk where its product is positive, else 0, in the dtype of the products."""
    grad_BmHn = grad_Bmn.to(dot_BmHn.dtype).unsqueeze(2).expand_as(dot_BmHn)
    return torch.ops.aten.threshold_backward(grad_BmHn, dot_BmHn, 0)  # where() and a comparison, in one pass


def summed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of batches of matrices in float32, whatever the dtype of the factors."""
    if a.dtype is torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def of_queries(sums: torch.Tensor, q: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of queries and head weights from the sums G."""
    return (w.unsqueeze(-1) * sums).to(q.dtype), (q * sums).sum(-1).to(w.dtype)
