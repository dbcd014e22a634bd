"""The cut: which logit separates pages that stay from pages that go, chosen on documents that training never saw.

Two ways, each per length bucket:
- a target recall, by conformal risk control (Angelopoulos et al., arXiv 2208.02814): the highest cut whose risk, with
  the correction for n documents, is at most alpha. For a new document drawn like these, the expected share of what its
  windows need that is left out is then at most alpha. The document is the unit (its queries depend on each other), the
  statement is about the mean over draws of documents, and it is void for documents of another kind.
- a target budget: the lowest cut whose mean share of resident pages is at most the target. No guarantee.

The rule is the one that is served: a page stays if one of its chunks has a logit above the cut, or is always kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..capture.format import ShardReader
from ..indexer import MemoryIndexer
from . import metrics
from .data import PageRules, Queries, queries_of

Recall = Literal["need", "evidence"]


@dataclass(frozen=True, eq=False, slots=True)
class Curve:
    """One document: what a cut costs. Loss rises and share falls with the cut, in steps at `cuts`."""

    chunks: int
    cuts: np.ndarray
    """Ascending page maxima of all its served queries."""
    loss: np.ndarray
    """Mean over queries of the share left out when only pages above the cut stay; NaN if nothing is needed."""
    share: np.ndarray
    """Mean over queries of resident pages over all pages, always-kept ones included."""

    def at(self, cut: float, values: np.ndarray) -> float:
        """Value at a cut: nothing is left out below the least page maximum."""
        return float(values[np.searchsorted(self.cuts, cut, side="right")])


@dataclass(frozen=True, slots=True)
class Bucket:
    """The cut of histories up to so many chunks, and what it was seen to do on the calibration documents."""

    chunks: int
    cut: float
    documents: int
    recall: float
    share: float


def curve(queries: Queries, indexer: MemoryIndexer, recall: Recall) -> Curve | None:
    """A document's curve; None where no served query needs anything that could be lost."""
    needed = queries.need if recall == "need" else queries.evidence
    if needed is None:
        raise ValueError(f"document {queries.rid!r} has no evidence to calibrate on")
    with torch.no_grad():
        logits = queries.logits(indexer)
    eligible_QP = queries.eligible_pages()
    maxima_QP = queries.by_page(logits.masked_fill(~queries.eligible, -math.inf), fill=-math.inf).amax(-1)
    need_QP = queries.by_page(needed).sum(-1).double()
    usable = need_QP.sum(1) > 0
    if not bool(usable.any()):
        return None
    rank = _Steps(maxima_QP, eligible_QP)
    left_out = rank.below(torch.where(usable[:, None], need_QP / need_QP.sum(1, keepdim=True).clamp_min(1e-12), 0.0))
    pages_Q = torch.tensor([queries.rules.num_pages(n) for n in queries.num_chunks.tolist()])
    gone = rank.below(eligible_QP.double() / pages_Q[:, None]) / len(queries)
    return Curve(int(queries.num_chunks.max()), rank.cuts, left_out / int(usable.sum()), 1 - gone)


class _Steps:
    """Sums over all pages of a document whose maximum is at most a cut, for every cut at once."""

    def __init__(self, maxima_QP: torch.Tensor, eligible_QP: torch.Tensor) -> None:
        self.eligible = eligible_QP
        values, self.order = maxima_QP[eligible_QP].sort()
        self.cuts = values.double().numpy()

    def below(self, weights_QP: torch.Tensor) -> np.ndarray:
        """[number of cuts + 1]: element i is the sum over the i pages with the least maxima."""
        sums = weights_QP[self.eligible][self.order].double().cumsum(0).numpy()
        return np.concatenate(([0.0], sums))


def conformal_cut(curves: Sequence[Curve], alpha: float) -> float:
    """The highest cut with n/(n+1) mean loss + 1/(n+1) <= alpha. Raises ValueError where n is too small for alpha."""
    n = len(curves)
    if 1 / (n + 1) > alpha:
        raise ValueError(f"{n} documents cannot promise a miss of at most {alpha}: at least {math.ceil(1 / alpha) - 1}")
    return _highest(curves, lambda cut: sum(c.at(cut, c.loss) for c in curves) / (n + 1) + 1 / (n + 1) <= alpha)


def budget_cut(curves: Sequence[Curve], share: float) -> float:
    """The lowest cut whose mean resident share is at most `share`. Raises ValueError if always-kept pages exceed it."""
    least = float(np.mean([c.share[-1] for c in curves]))
    if least > share:
        raise ValueError(f"the always-kept pages alone are {least:.4f} of all, more than {share}")
    cuts = np.unique(np.concatenate([c.cuts for c in curves]))
    return _first(cuts, lambda cut: float(np.mean([c.at(cut, c.share) for c in curves])) <= share)


def _highest(curves: Sequence[Curve], holds: Callable[[float], bool]) -> float:
    """Greatest candidate cut at which a condition that only fails upwards still holds."""
    cuts = np.unique(np.concatenate([c.cuts for c in curves]))
    low, high = -1, len(cuts) - 1  # -1: below all of them nothing is left out
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(float(cuts[middle])) else (low, middle - 1)
    return float(np.nextafter(cuts[0], -math.inf)) if low < 0 else _between(cuts, low)


def _first(cuts: np.ndarray, holds: Callable[[float], bool]) -> float:
    """Least candidate cut from which a condition that only fails downwards holds."""
    low, high = 0, len(cuts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(float(cuts[middle])) else (middle + 1, high)
    return _between(cuts, low)


def _between(cuts: np.ndarray, index: int) -> float:
    """Halfway to the next candidate: the same pages, and no tie that rounding could turn."""
    return float(cuts[index]) if index + 1 == len(cuts) else float(cuts[index] + cuts[index + 1]) / 2


def curves_of(
    shards: ShardReader,
    indexer: MemoryIndexer,
    rules: PageRules,
    *,
    recall: Recall,
    layer_weights: Mapping[int, float] | None = None,
) -> list[Curve]:
    """Curves of all documents, the indexer's present offsets taken out."""
    bare = indexer.derive(logit_offset=0.0, length_offsets=()).eval()
    target = {"mass": 1.0} if shards.meta.labels else {"vote": 1.0}
    made = (
        curve(
            metrics.served(queries_of(document, shards.meta, rules, target=target, layer_weights=layer_weights),
                           shards.meta.tau),
            bare, recall,
        )
        for document in shards
    )  # fmt: skip
    return [item for item in made if item is not None]


def calibrate(
    indexer: MemoryIndexer,
    curves: Iterable[Curve],
    *,
    alpha: float | None = None,
    share: float | None = None,
    buckets: Sequence[int] = (),
) -> tuple[MemoryIndexer, list[Bucket]]:
    """Return the indexer with its cut at probability 0.5, and what was chosen per length bucket.

    Give one of `alpha` (the share of the need that may be missed) and `share` (of pages to keep). `buckets` are upper
    bounds in chunks, ascending; longer histories use the last. Raises ValueError for an empty bucket.
    """
    if (alpha is None) == (share is None):
        raise ValueError("give either a miss to allow (alpha) or a share of pages to keep, not both")
    for name, value in (("alpha", alpha), ("share", share)):
        if value is not None and not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    known = list(curves)
    bounds = list(buckets) or [max((c.chunks for c in known), default=0)]
    if bounds != sorted(set(bounds)):
        raise ValueError(f"buckets must ascend, got {bounds}")
    made = []
    for low, high in zip([0, *bounds[:-1]], bounds, strict=True):
        last = high == bounds[-1]
        members = [c for c in known if low < c.chunks and (last or c.chunks <= high)]
        if not members:
            raise ValueError(f"no calibration document has {low + 1}..{high} chunks")
        if alpha is not None:
            cut = conformal_cut(members, alpha)
        else:
            assert share is not None
            cut = budget_cut(members, share)
        made.append(
            Bucket(
                chunks=high,
                cut=cut,
                documents=len(members),
                recall=1 - float(np.mean([c.at(cut, c.loss) for c in members])),
                share=float(np.mean([c.at(cut, c.share) for c in members])),
            )
        )
    offsets = tuple((bucket.chunks, -bucket.cut) for bucket in made)
    return indexer.derive(logit_offset=0.0, length_offsets=offsets), made


__all__ = ["Bucket", "Curve", "budget_cut", "calibrate", "conformal_cut", "curve", "curves_of"]
