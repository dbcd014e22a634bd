"""What capture must write, from one forward of the stock model over all tokens, in plain loops.

Shape letters: S = tokens, T = chunks, E = hidden size, I = index_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

RATIO = 4


@dataclass
class Seen:
    """One CSA layer of the stock model."""

    hidden_SE: torch.Tensor
    keys_TI: torch.Tensor
    attention_ST: torch.Tensor
    """Head mean of the eager attention weights of the chunks."""
    lightning_ST: torch.Tensor
    """Softmax over the top-k of the scores."""


@torch.no_grad()
def watch(model: Any, ids: list[int]) -> list[Seen]:
    """Run the unswapped model and read its CSA layers through hooks."""
    hidden: list[torch.Tensor] = []
    attention: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    handles = []
    for layer in model.model.layers:
        if hasattr(layer.self_attn.compressor, "indexer"):
            handles += [
                layer.self_attn.register_forward_hook(
                    lambda module, args, kwargs, out: (
                        hidden.append((args[0] if args else kwargs["hidden_states"])[0]),
                        attention.append(out[1][0]),
                        None,
                    )[-1],
                    with_kwargs=True,
                ),
                layer.self_attn.compressor.indexer.scorer.register_forward_hook(
                    lambda module, args, out: (keys.append(args[1][0]), scores.append(out[0]), None)[-1]
                ),
            ]
    model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    topk = model.config.index_topk
    return [
        Seen(h, k, a[:, :, len(ids) : len(ids) + len(k)].mean(0), _lightning(s, topk))
        for h, k, a, s in zip(hidden, keys, attention, scores, strict=True)
    ]


def _lightning(scores_ST: torch.Tensor, topk: int) -> torch.Tensor:
    out = torch.zeros_like(scores_ST)
    for token, row in enumerate(scores_ST):
        visible = (token + 1) // RATIO
        best = row[:visible].topk(min(topk, visible))
        out[token, best.indices] = best.values.softmax(0)
    return out


def sums(table_ST: torch.Tensor, position: int, tau: int) -> torch.Tensor:
    """Sum over the tokens after a query, of the chunks that the query sees."""
    return table_ST[position + 1 : position + 1 + tau, : (position + 1) // RATIO].sum(0)


def vote(layers: list[Seen], position: int, tau: int, p: float, least: int) -> torch.Tensor:
    """The published top-p vote: greatest count over the tokens after a query, 0 below `least` layers."""
    tokens, visible = len(layers[0].hidden_SE), (position + 1) // RATIO
    most = torch.zeros(visible)
    for token in range(position + 1, min(position + 1 + tau, tokens)):
        count = torch.zeros((token + 1) // RATIO)
        for layer in layers:
            order = layer.lightning_ST[token].argsort(descending=True, stable=True)
            order = order[layer.lightning_ST[token, order] > 0]
            total, taken = 0.0, 0
            for rank, chunk in enumerate(order.tolist()):
                total += float(layer.lightning_ST[token, chunk])
                if total > p and rank > 0:
                    break
                count[chunk] += 1
                taken += 1
            if taken < len(order):
                count[order[taken]] += 1  # the first rank left out joins
        most = torch.maximum(most, torch.where(count >= least, count, 0)[:visible])
    return most
