"""What page scores are worth at a budget: how much of what a window needs is on the pages that would stay.

Only moments at which level 1 runs count: the beginning of an answer, and every tau tokens in it. Always-kept pages are
outside: what is on them cannot be won or lost. Shape letters: Q = queries, P = pages, G = budgets, D = documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..policy import Budget, always_kept
from ..types import PageView
from .data import Queries
from .losses import page_logits

BUDGETS = (0.025, 0.05, 0.075, 0.10, 0.15)
WANTED = 0.01
"""A page is wanted, where a yes or no is needed, if it holds this share of what the window needs."""
RESAMPLES = 4000
BINS = 15

PageScorer = Callable[[Queries], torch.Tensor]
"""Page scores [Q, P] of a document's queries; higher is better, -inf for pages that cannot be chosen."""


def served(queries: Queries, tau: int) -> Queries:
    """The queries at which level 1 runs."""
    since = queries.positions[:, -1] - (queries.turns[:, 0] - 1)
    return queries.pick((since % tau == 0).nonzero()[:, 0])


def page_view(queries: Queries, query: int) -> PageView:
    """What a budget sees of a query."""
    rules, chunks = queries.rules, int(queries.num_chunks[query])
    pages = rules.num_pages(chunks)
    return PageView(
        num_pages=pages,
        page_chunks=rules.page_chunks,
        num_chunks=chunks,
        always=always_kept(pages, rules.sink_pages, rules.recency_pages),
        logits_N=None,
    )


@dataclass(frozen=True, eq=False, slots=True)
class Recalls:
    """Per query and budget, NaN where a query needs nothing that could be lost."""

    need_QG: np.ndarray
    """Share of the need (attention mass, as the target defines it) on the pages that stay."""
    evidence_QG: np.ndarray
    """Share of the evidence chunks."""


def recalls(scores_QP: torch.Tensor, queries: Queries, budgets: Sequence[float] = BUDGETS) -> Recalls:
    """Keep the best pages of each budget (ties: lower page), always-kept pages counted in it as the policies do."""
    scores_QP = scores_QP.masked_fill(~queries.eligible_pages(), -math.inf)
    order_QP = scores_QP.sort(dim=1, descending=True, stable=True).indices
    rank_QP = torch.empty_like(order_QP).scatter_(1, order_QP, torch.arange(order_QP.shape[1]).expand_as(order_QP))
    room_QG = torch.tensor(
        [[Budget(keep=keep).room(page_view(queries, query)) for keep in budgets] for query in range(len(queries))]
    ).view(len(queries), len(budgets))
    kept_QGP = (rank_QP.unsqueeze(1) < room_QG.unsqueeze(-1)) & queries.eligible_pages().unsqueeze(1)

    def share(values_QN: torch.Tensor | None) -> np.ndarray:
        if values_QN is None:
            return np.full(room_QG.shape, np.nan)
        pages_QP = queries.by_page(values_QN).sum(-1).double()
        total_Q = pages_QP.sum(1)
        got_QG = (kept_QGP * pages_QP.unsqueeze(1)).sum(-1) / total_Q.unsqueeze(1)
        return torch.where((total_Q > 0).unsqueeze(1), got_QG, math.nan).numpy()

    return Recalls(share(queries.need), share(queries.evidence))


def area(recall_G: np.ndarray, budgets: Sequence[float] = BUDGETS) -> np.ndarray:
    """Mean recall over the range of budgets (trapezoids), over the last axis."""
    return np.trapezoid(recall_G, budgets, axis=-1) / (budgets[-1] - budgets[0])


def wanted_pages(queries: Queries) -> torch.Tensor:
    """Bool [Q, P]."""
    need_QP = queries.by_page(queries.need).sum(-1)
    return need_QP >= WANTED * need_QP.sum(1, keepdim=True).clamp_min(1e-9)


def calibration_error(probability: np.ndarray, wanted: np.ndarray) -> float:
    """Expected calibration error over bins of equal count: mean |share wanted - mean probability|."""
    order = np.argsort(probability, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    gaps = [abs(float(wanted[part].mean()) - float(probability[part].mean())) * len(part) for part in parts]
    return sum(gaps) / max(1, len(order))


def document_means(per_query: Sequence[np.ndarray]) -> np.ndarray:
    """[D, ...] of one array per document: means over its queries that have a value, NaN where none has."""
    made = []
    for values in per_query:
        known = ~np.isnan(values)
        counts = known.sum(0)
        made.append(np.where(counts, np.where(known, values, 0).sum(0) / np.maximum(counts, 1), np.nan))
    return np.stack(made)


def bootstrap(values_D: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """Mean over documents with its 95 % percentile interval; documents without a value are left out."""
    values_D = values_D[~np.isnan(values_D)]
    if not len(values_D):
        return math.nan, math.nan, math.nan
    picks = np.random.default_rng(seed).integers(0, len(values_D), size=(resamples, len(values_D)))
    low, high = np.percentile(values_D[picks].mean(1), [2.5, 97.5])
    return float(values_D.mean()), float(low), float(high)


# ---- scorers of pages


def by_indexer(indexer: torch.nn.Module) -> PageScorer:
    """The page scores that a Memory Indexer serves."""

    def score(queries: Queries) -> torch.Tensor:
        with torch.no_grad():
            return page_logits(queries.logits(indexer), queries)  # type: ignore[arg-type]

    return score


def recency(queries: Queries) -> torch.Tensor:
    return torch.arange(queries.num_pages, dtype=torch.float32).expand(len(queries), -1)


def random_pages(seed: int) -> PageScorer:
    def score(queries: Queries) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + hash_of(queries.rid))
        return torch.rand(len(queries), queries.num_pages, generator=generator)

    return score


def oracle(queries: Queries) -> torch.Tensor:
    """What the window will need, known beforehand."""
    return queries.by_page(queries.need).sum(-1)


def carry_over(tau: int) -> PageScorer:
    """What the last window that had ended needed; pages that it did not need by recency."""

    def score(queries: Queries) -> torch.Tensor:
        need_QP, newest_P = oracle(queries), torch.arange(queries.num_pages) * 1e-9
        ends = torch.minimum(queries.positions[:, -1] + tau, queries.turns[:, 1] - 1).tolist()
        rows = []
        for query, position in enumerate(queries.positions[:, -1].tolist()):
            before = [other for other in range(query) if ends[other] <= position]
            rows.append((need_QP[before[-1]] if before else torch.zeros(queries.num_pages)) + newest_P)
        return torch.stack(rows)

    return score


def hash_of(text: str) -> int:
    """A small number that is the same on every machine."""
    return sum(byte * 31**i for i, byte in enumerate(text.encode())) % 1_000_003


__all__ = [
    "BUDGETS",
    "PageScorer",
    "Recalls",
    "area",
    "bootstrap",
    "by_indexer",
    "calibration_error",
    "carry_over",
    "document_means",
    "oracle",
    "random_pages",
    "recalls",
    "recency",
    "served",
    "wanted_pages",
]
