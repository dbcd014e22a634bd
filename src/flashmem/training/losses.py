"""What a Memory Indexer is trained for. Every loss takes the logits that are served and a document's `Queries`.

The published ones (public training code, train.py) work on single chunks drawn beside the positives: `bce`, `focal`
(gamma, no alpha) and `pairwise` (BPR). Ours see all eligible chunks, the true prior with them:
- chunk-kl: KL from the need to the softmax over eligible chunks, as DeepSeek distils the Lightning Indexer;
- page-kl: the same for pages, with the page score that the policy ranks by against the page's need;
- budget: the need missed when only the best pages of a budget stay, with a soft edge at the budget's last page.
Queries that need nothing eligible teach nothing and are left out. Shape letters as in `data`; B = drawn budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..policy import pool_pages
from .config import TrainConfig
from .data import Queries

Loss = Callable[[torch.Tensor, Queries, TrainConfig, torch.Generator], torch.Tensor]


def total_loss(
    logits_QN: torch.Tensor, queries: Queries, config: TrainConfig, generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum, and every loss by name, detached. `generator` lives on the CPU."""
    parts = {name: _LOSSES[name](logits_QN, queries, config, generator) for name in config.losses}
    total = sum((weight * parts[name] for name, weight in config.losses.items()), logits_QN.new_zeros(()))
    return total, {name: part.detach() for name, part in parts.items()}


def page_logits(logits_QN: torch.Tensor, queries: Queries) -> torch.Tensor:
    """Page scores [Q, P] as the policy ranks by; -inf for pages that it cannot choose."""
    existing = torch.arange(logits_QN.shape[1], device=logits_QN.device) < queries.num_chunks[:, None]
    # a page without a chunk would have no gradient to give: a large negative number instead of -inf inside
    masked = logits_QN.masked_fill(~existing, _NEVER)
    pooled_QP = pool_pages(queries.by_page(masked, fill=_NEVER))
    return pooled_QP.masked_fill(~queries.eligible_pages(), -math.inf)


_NEVER = -1e4
_FAR = 10.0


def chunk_kl(logits_QN: torch.Tensor, queries: Queries, config: TrainConfig, _: torch.Generator) -> torch.Tensor:
    return _listwise(logits_QN.masked_fill(~queries.eligible, -math.inf), queries.need)


def page_kl(logits_QN: torch.Tensor, queries: Queries, config: TrainConfig, _: torch.Generator) -> torch.Tensor:
    return _listwise(page_logits(logits_QN, queries), queries.by_page(queries.need).sum(-1))


def budget(logits_QN: torch.Tensor, queries: Queries, config: TrainConfig, generator: torch.Generator) -> torch.Tensor:
    scores_QP, need_QP = page_logits(logits_QN, queries), queries.by_page(queries.need).sum(-1)
    low, high = config.budgets
    share = low + (high - low) * torch.rand(len(queries), generator=generator)
    always = config.sink_pages + config.recency_pages
    pages_Q = -(-queries.num_chunks.cpu() // config.page_chunks)
    room_Q = ((share * pages_Q).ceil().long() - always).clamp_min(1)
    ranked_QP = scores_QP.detach().sort(dim=1, descending=True).values
    room_Q = torch.minimum(room_Q.to(scores_QP.device), queries.eligible_pages().sum(1).clamp_min(1))
    # halfway between the last page that stays and the first that goes; pages that cannot be chosen rank last
    last_Q1 = ranked_QP.gather(1, room_Q[:, None] - 1)
    first_out_Q1 = ranked_QP.gather(1, room_Q[:, None].clamp(max=ranked_QP.shape[1] - 1))
    edge_Q1 = (last_Q1 + torch.maximum(first_out_Q1, last_Q1 - _FAR * config.budget_width)) / 2
    kept_QP = ((scores_QP - edge_Q1) / config.budget_width).sigmoid()
    kept_QP = torch.where(queries.eligible_pages(), kept_QP, 0.0)
    total_Q = need_QP.sum(1)
    missed_Q = 1 - (need_QP * kept_QP).sum(1) / total_Q.clamp_min(1e-9)
    return _mean(missed_Q, total_Q > 0)


def bce(logits_QN: torch.Tensor, queries: Queries, config: TrainConfig, generator: torch.Generator) -> torch.Tensor:
    return _chosen_bce(logits_QN, queries, config, generator, gamma=0.0)


def focal(logits_QN: torch.Tensor, queries: Queries, config: TrainConfig, generator: torch.Generator) -> torch.Tensor:
    return _chosen_bce(logits_QN, queries, config, generator, gamma=config.focal_gamma)


def _chosen_bce(
    logits_QN: torch.Tensor, queries: Queries, config: TrainConfig, generator: torch.Generator, *, gamma: float
) -> torch.Tensor:
    chosen = _sample(queries, config, generator)
    logits, wanted = logits_QN[chosen], (queries.need > 0).float()[chosen]
    if not len(logits):  # a document without a single vote
        return logits_QN.sum() * 0
    plain = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return ((1 - (-plain).exp()).clamp_min(0) ** gamma * plain).mean() if gamma else plain.mean()


def pairwise(
    logits_QN: torch.Tensor, queries: Queries, config: TrainConfig, generator: torch.Generator
) -> torch.Tensor:
    chosen, wanted = _sample(queries, config, generator), queries.need > 0
    per_query = []
    for logits_N, chosen_N, wanted_N in zip(logits_QN, chosen, wanted, strict=True):
        positive, negative = logits_N[chosen_N & wanted_N], logits_N[chosen_N & ~wanted_N]
        if len(positive) and len(negative):
            per_query.append(-F.logsigmoid(positive[:, None] - negative).mean())
    return torch.stack(per_query).mean() if per_query else logits_QN.sum() * 0


_LOSSES: dict[str, Loss] = {
    "bce": bce, "focal": focal, "pairwise": pairwise, "chunk-kl": chunk_kl, "page-kl": page_kl, "budget": budget,
}  # fmt: skip


def _listwise(scores: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    """Mean over queries of KL(need / its sum || softmax(scores)); scores are -inf where there is no choice."""
    total_Q = need.sum(1)
    share = need / total_Q.clamp_min(1e-9)[:, None]
    usable_Q = total_Q > 0
    rows = torch.where(usable_Q[:, None], scores, 0.0)  # a row of nothing but -inf would be NaN
    log_p = rows.log_softmax(1).masked_fill(share == 0, 0.0)
    entropy_Q = torch.special.entr(share).sum(1)
    return _mean(-(share * log_p).sum(1) - entropy_Q, usable_Q)


def _mean(values_Q: torch.Tensor, usable_Q: torch.Tensor) -> torch.Tensor:
    return torch.where(usable_Q, values_Q, 0.0).sum() / usable_Q.sum().clamp_min(1)


def _sample(queries: Queries, config: TrainConfig, generator: torch.Generator) -> torch.Tensor:
    """Bool [Q, N]: eligible positives, and `negatives` times as many eligible others of the same query."""
    wanted = queries.need > 0
    if config.negatives is None:
        return queries.eligible
    others = queries.eligible & ~wanted
    draws = torch.rand(others.shape, generator=generator).to(others.device).masked_fill(~others, 2.0)
    count_Q = (wanted.sum(1) * config.negatives).ceil().long()
    rank = draws.argsort(1).argsort(1)
    return wanted | ((rank < count_Q[:, None]) & others)


__all__ = ["page_logits", "total_loss"]
