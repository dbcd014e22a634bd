"""The definition of attention over several key sets with a sink.

The sink is one more logit per head in the softmax, whose value vector is zero (DeepSeek-V4 report, core attention;
`eager_attention_forward` in transformers' deepseek_v4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def attend_reference(
    q_BHD: torch.Tensor, sets: Sequence[tuple[torch.Tensor, torch.Tensor]], sinks_H: torch.Tensor, scale: float
) -> torch.Tensor:
    # bytes of invalid rows are undefined, and a NaN there would survive a zero weight
    kvs = [kv.masked_fill(~valid[..., None], 0) if kv.dim() == 3 else kv for kv, valid in sets]
    logits = [
        ((q_BHD @ kv.transpose(-1, -2)).float() * scale).masked_fill(~valid[:, None], float("-inf"))
        for kv, (_, valid) in zip(kvs, sets, strict=True)
    ]
    sink_BH1 = sinks_H.float().expand(q_BHD.shape[0], -1)[..., None]
    weights = torch.cat((*logits, sink_BH1), dim=-1).softmax(dim=-1).to(q_BHD.dtype)
    parts = weights[..., :-1].split([kv.shape[-2] for kv in kvs], dim=-1)
    return sum((part @ kv for part, kv in zip(parts, kvs, strict=True)), start=torch.zeros_like(q_BHD))


def band_mask(
    first_query: int, queries: int, first_key: int, keys: int, window: int, device: torch.device
) -> torch.Tensor:
    """Bool [queries, keys]: a key is seen if it is not after its query and among the last `window` tokens."""
    q = torch.arange(first_query, first_query + queries, device=device)[:, None]
    k = torch.arange(first_key, first_key + keys, device=device)
    return (k <= q) & (k > q - window)
