"""The largest logit over observed tokens, tile by tile; its gradient goes to the token that gave it and to no other.

The forward scores every token. The backward sorts the (query, chunk) pairs by the token that won them and cuts each
token's chunks into tiles, so that it multiplies as much as for one observed token. What products are rounded to, and
why the backward needs their signs only, is in `tiled`.

Shape letters: Q = queries that share keys, m = observed tokens of a query, M = Q m, Z = pairs with a gradient,
Y = tiles, T = chunks of a tile; others as in `score_chunks`.
"""

from __future__ import annotations

from typing import Any

import torch

from .tiled import (
    LEAST_CHUNKS,
    default_budget,
    dots,
    of_queries,
    product_dtype,
    split_keys,
    summed,
    weighted_relu,
    where_positive,
)


def score_chunks_max_tiled(
    q_QmHI: torch.Tensor, keys_NC: torch.Tensor, w_QmH: torch.Tensor, seen_Qm: torch.Tensor | None
) -> torch.Tensor:
    dtype = product_dtype(q_QmHI.device)
    with torch.autocast(q_QmHI.device.type, enabled=False):
        return _Maximum.apply(  # type: ignore[no-untyped-call]
            q_QmHI, keys_NC, w_QmH, seen_Qm, dtype
        )


class _Maximum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_QmHI: torch.Tensor,
        keys_NC: torch.Tensor,
        w_QmH: torch.Tensor,
        seen_Qm: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> Any:
        queries, observed, heads, _ = q_QmHI.shape
        chunks = len(keys_NC)
        q, w = q_QmHI.to(dtype), w_QmH.to(dtype)
        best_QN = q_QmHI.new_empty(queries, chunks, dtype=torch.float32)
        token_QN = torch.empty(queries, chunks, dtype=torch.int16, device=q_QmHI.device)
        budget = default_budget(q_QmHI.device)
        query_tile = max(1, budget // (observed * heads * LEAST_CHUNKS))
        chunk_tile = max(LEAST_CHUNKS, budget // (observed * heads * min(query_tile, max(1, queries))))
        for n in range(0, chunks, chunk_tile):
            keys_nI, scale_n = split_keys(keys_NC[n : n + chunk_tile], dtype)
            for t in range(0, queries, query_tile):
                tile = slice(t, t + query_tile)
                logits_tmn = weighted_relu(dots(q[tile], keys_nI), w[tile]) * scale_n
                if seen_Qm is not None:
                    logits_tmn.masked_fill_(~seen_Qm[tile].unsqueeze(-1), -torch.inf)
                best_QN[tile, n : n + chunk_tile], token_QN[tile, n : n + chunk_tile] = logits_tmn.max(1)
        ctx.save_for_backward(q_QmHI, keys_NC, w_QmH, token_QN)
        ctx.dtype = dtype
        return best_QN

    @staticmethod
    def backward(ctx: Any, grad_QN: torch.Tensor) -> Any:
        q_QmHI, keys_NC, w_QmH, token_QN = ctx.saved_tensors
        q_MHI, w_MH, heads = q_QmHI.flatten(0, 1), w_QmH.flatten(0, 1), q_QmHI.shape[2]
        rounded_MHI = q_MHI.to(ctx.dtype)
        sums_MHI = torch.zeros_like(q_MHI, dtype=torch.float32)
        dkeys = torch.zeros_like(keys_NC, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        row_Y, chunk_YT, grad_YT = _tiles_by_token(grad_QN, token_QN, q_QmHI.shape[1])
        tiles = max(1, default_budget(q_MHI.device) // max(1, heads * LEAST_CHUNKS))
        with torch.autocast(q_MHI.device.type, enabled=False):
            for y in range(0, len(row_Y), tiles):
                row_y, chunk_yT = row_Y[y : y + tiles], chunk_YT[y : y + tiles]
                keys_yTI, scale_yT = split_keys(keys_NC[chunk_yT], ctx.dtype)
                dot_y1HT = dots(rounded_MHI[row_y].unsqueeze(1), keys_yTI)
                passed_yHT = where_positive((grad_YT[y : y + tiles] * scale_yT).unsqueeze(1), dot_y1HT).squeeze(1)
                sums_MHI.index_add_(0, row_y, summed(passed_yHT, keys_yTI))
                if dkeys is not None:
                    weighted_yHI = (w_MH[row_y].unsqueeze(-1) * q_MHI[row_y]).to(ctx.dtype)
                    dkeys.index_add_(
                        0, chunk_yT.flatten(), summed(passed_yHT.transpose(1, 2), weighted_yHI).flatten(0, 1)
                    )
        dq, dw = of_queries(sums_MHI, q_MHI, w_MH)
        return dq.view_as(q_QmHI), None if dkeys is None else dkeys.to(keys_NC.dtype), dw.view_as(w_QmH), None, None


def _tiles_by_token(
    grad_QN: torch.Tensor, token_QN: torch.Tensor, observed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs with a gradient in tiles of one token each: its row in M [Y], chunks and gradients [Y, T].

    Tiles are filled up with chunk 0 and a gradient of 0.
    """
    query_Z, chunk_Z = grad_QN.nonzero(as_tuple=True)
    row_Z, order_Z = (query_Z * observed + token_QN[query_Z, chunk_Z]).sort(stable=True)
    query_Z, chunk_Z = query_Z[order_Z], chunk_Z[order_Z]
    count_M = row_Z.bincount(minlength=len(grad_QN) * observed)
    tiles_M = -(-count_M // LEAST_CHUNKS)
    before_M = (tiles_M.cumsum(0) - tiles_M) * LEAST_CHUNKS - (count_M.cumsum(0) - count_M)
    place_Z = before_M[row_Z] + torch.arange(len(row_Z), device=row_Z.device)
    row_Y = torch.arange(len(count_M), device=row_Z.device).repeat_interleave(tiles_M)
    chunk_YT = chunk_Z.new_zeros(len(row_Y), LEAST_CHUNKS)
    grad_YT = grad_QN.new_zeros(len(row_Y), LEAST_CHUNKS)
    chunk_YT.view(-1)[place_Z] = chunk_Z
    grad_YT.view(-1)[place_Z] = grad_QN[query_Z, chunk_Z]
    return row_Y, chunk_YT, grad_YT
