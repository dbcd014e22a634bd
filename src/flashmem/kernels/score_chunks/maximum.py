"""The largest logit over observed tokens, tile by tile; its gradient goes to the token that gave it and to no other.

Shape letters: Q = queries that share keys, m = observed tokens of a query, Z = (query, chunk) pairs with a gradient;
others as in `score_chunks`.
"""

from __future__ import annotations

from typing import Any

import torch

from .tiled import ELEMENT_BUDGET, LEAST_CHUNKS, dots, float_keys


def score_chunks_max_tiled(
    q_QmHI: torch.Tensor, keys_NC: torch.Tensor, w_QmH: torch.Tensor, seen_Qm: torch.Tensor | None
) -> torch.Tensor:
    return _Maximum.apply(  # type: ignore[no-untyped-call]
        q_QmHI, keys_NC, w_QmH, seen_Qm
    )


class _Maximum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_QmHI: torch.Tensor, keys_NC: torch.Tensor, w_QmH: torch.Tensor, seen_Qm: torch.Tensor | None
    ) -> Any:
        queries, observed, heads, _ = q_QmHI.shape
        chunks = len(keys_NC)
        best_QN = q_QmHI.new_empty(queries, chunks, dtype=torch.float32)
        token_QN = torch.empty(queries, chunks, dtype=torch.int64, device=q_QmHI.device)
        budget = ELEMENT_BUDGET.get(q_QmHI.device.type, ELEMENT_BUDGET["cuda"])
        query_tile = max(1, budget // (observed * heads * LEAST_CHUNKS))
        chunk_tile = max(LEAST_CHUNKS, budget // (observed * heads * min(query_tile, max(1, queries))))
        for n in range(0, chunks, chunk_tile):
            keys_nI = float_keys(keys_NC[n : n + chunk_tile])
            for t in range(0, queries, query_tile):
                tile = slice(t, t + query_tile)
                dot_tmHn = dots(q_QmHI[tile], keys_nI).relu_()
                logits_tmn = (w_QmH[tile].float().unsqueeze(2) @ dot_tmHn).squeeze(2)
                if seen_Qm is not None:
                    logits_tmn.masked_fill_(~seen_Qm[tile].unsqueeze(-1), -torch.inf)
                best_QN[tile, n : n + chunk_tile], token_QN[tile, n : n + chunk_tile] = logits_tmn.max(1)
        ctx.save_for_backward(q_QmHI, keys_NC, w_QmH, token_QN)
        return best_QN

    @staticmethod
    def backward(ctx: Any, grad_QN: torch.Tensor) -> Any:
        q_QmHI, keys_NC, w_QmH, token_QN = ctx.saved_tensors
        observed, heads, width = q_QmHI.shape[1:]
        q_MHI, w_MH = q_QmHI.flatten(0, 1).float(), w_QmH.flatten(0, 1).float()
        dq, dw = torch.zeros_like(q_MHI), torch.zeros_like(w_MH)
        dkeys = torch.zeros_like(keys_NC, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        query_Z, chunk_Z = grad_QN.nonzero(as_tuple=True)
        row_Z, grad_Z = query_Z * observed + token_QN[query_Z, chunk_Z], grad_QN[query_Z, chunk_Z]
        tile = max(1, ELEMENT_BUDGET.get(q_QmHI.device.type, ELEMENT_BUDGET["cuda"]) // (heads * width))
        for z in range(0, len(row_Z), tile):
            row, chunk, grad = row_Z[z : z + tile], chunk_Z[z : z + tile], grad_Z[z : z + tile, None]
            keys_zI, q_zHI = float_keys(keys_NC[chunk]), q_MHI[row]
            dot_zH = (q_zHI @ keys_zI.unsqueeze(-1)).squeeze(-1)
            dw.index_add_(0, row, grad * dot_zH.relu())
            ddot_zH = torch.where(dot_zH > 0, grad * w_MH[row], 0.0)
            dq.index_add_(0, row, ddot_zH.unsqueeze(-1) * keys_zI.unsqueeze(1))
            if dkeys is not None:
                dkeys.index_add_(0, chunk, (ddot_zH.unsqueeze(1) @ q_zHI).squeeze(1))
        return (
            dq.view_as(q_QmHI).to(q_QmHI.dtype),
            None if dkeys is None else dkeys.to(keys_NC.dtype),
            dw.view_as(w_QmH).to(w_QmH.dtype),
            None,
        )
