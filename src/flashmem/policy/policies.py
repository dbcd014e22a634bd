"""Which pages stay on the device for the next window: pure functions of a `PageView`.

Budgets count pages that are resident in all, the always-kept ones included, so that policies are compared at the same
bytes. Every policy returns the always-kept pages, and breaks ties by score, then lower page.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..types import PageLimits, PageView, Scorer, Selection
from .scores import best_first, page_maxima, page_scores


@dataclass(kw_only=True, slots=True)
class ThresholdPolicy:
    """Keep every page with a chunk above the threshold, within a floor and a ceiling of pages beside the always-kept.

    The best page scores win under the ceiling (which `view.widen` lifts), and fill up to the floor.
    """

    threshold: float = 0.5
    """A probability: a chunk counts when its logit exceeds log(threshold / (1 - threshold))."""
    floor_pages: int = 4
    ceiling_pages: int | None = None
    scorer: Scorer = "memory"
    name: str = "lsa"

    def __post_init__(self) -> None:
        _check_scorer(self.scorer)
        _check_threshold(self.threshold)
        if self.floor_pages < 0 or (self.ceiling_pages is not None and self.ceiling_pages < self.floor_pages):
            raise ValueError(
                f"floor_pages must not be negative nor exceed ceiling_pages, got {self.floor_pages} and "
                f"{self.ceiling_pages}"
            )

    def select(self, view: PageView) -> Selection:
        ranked = best_first(_scores(view, self.name), view.always)
        above = _pages_above(view, self.threshold, ranked)
        ceiling = self._ceiling(view)
        wanted = [page for page in ranked if page in above][:ceiling]
        if len(wanted) < self.floor_pages:  # then nothing was cut, and the best of the others may come too
            wanted += [page for page in ranked if page not in above][: self.floor_pages - len(wanted)]
        return _selection(view, wanted, eligible_share=_share(len(above), view), truncated=len(above) > ceiling)

    def limits(self, view: PageView) -> PageLimits:
        return PageLimits(self.floor_pages, self._ceiling(view), _logit(self.threshold), above_first=True)

    def chosen(self, view: PageView, pages: tuple[int, ...], above: int) -> Selection:
        return Selection(pages, _share(above, view), above > self._ceiling(view))

    def _ceiling(self, view: PageView) -> int:
        return view.num_pages if self.ceiling_pages is None or view.widen else self.ceiling_pages


@dataclass(kw_only=True, slots=True)
class Budget:
    """A number of resident pages, always-kept ones included: a share of all pages (rounded up), or a count."""

    keep: float | None = None
    pages: int | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.pages is None):
            raise ValueError(f"a budget is either a share or a number of pages, got {self.keep} and {self.pages}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {self.keep}")
        if self.pages is not None and self.pages < 0:
            raise ValueError(f"pages must not be negative, got {self.pages}")

    def resident_pages(self, view: PageView) -> int:
        """Pages that may be resident in this view; `view.widen` doubles the budget."""
        # 0.1 * 30 is a little more than 3 in binary, and must not round up to 4
        pages = self.pages if self.keep is None else math.ceil(round(self.keep * view.num_pages, 9))
        assert pages is not None
        return min(view.num_pages, max(len(view.always), pages * (2 if view.widen else 1)))

    def room(self, view: PageView) -> int:
        """Pages that may be chosen beside the always-kept ones."""
        return self.resident_pages(view) - len(view.always)


@dataclass(kw_only=True, slots=True)
class BudgetPolicy(Budget):
    """Keep the best page scores within a fixed budget.

    With a threshold the selection also tells whether the budget cut off pages above it; the choice stays the same.
    """

    threshold: float | None = None
    scorer: Scorer = "memory"
    name: str = "lsa"

    def __post_init__(self) -> None:
        Budget.__post_init__(self)
        _check_scorer(self.scorer)
        if self.threshold is not None:
            _check_threshold(self.threshold)

    def select(self, view: PageView) -> Selection:
        ranked, room = best_first(_scores(view, self.name), view.always), self.room(view)
        if self.threshold is None:
            return _selection(view, ranked[:room])
        above = _pages_above(view, self.threshold, ranked)
        return _selection(view, ranked[:room], eligible_share=_share(len(above), view), truncated=len(above) > room)

    def limits(self, view: PageView) -> PageLimits:
        return PageLimits(self.room(view), self.room(view), None if self.threshold is None else _logit(self.threshold))

    def chosen(self, view: PageView, pages: tuple[int, ...], above: int) -> Selection:
        if self.threshold is None:
            return Selection(pages)
        return Selection(pages, _share(above, view), above > self.room(view))


@dataclass(kw_only=True, slots=True)
class AllPages:
    """Keep everything: the exact model."""

    scorer: Scorer = field(default="none", init=False)
    name: str = "all"

    def select(self, view: PageView) -> Selection:
        return Selection(tuple(range(view.num_pages)))


@dataclass(kw_only=True, slots=True)
class RecencyPolicy(Budget):
    """Keep the newest pages: what a plain sliding window would."""

    scorer: Scorer = field(default="none", init=False)
    name: str = "recency"

    def select(self, view: PageView) -> Selection:
        return _selection(view, _eligible(view)[::-1][: self.room(view)])


@dataclass(kw_only=True, slots=True)
class RandomPolicy(Budget):
    """Keep pages drawn by the view's seed and cycle."""

    scorer: Scorer = field(default="none", init=False)
    name: str = "random"

    def select(self, view: PageView) -> Selection:
        pages = _eligible(view)
        random.Random(f"{view.seed} {view.cycle}").shuffle(pages)  # a prefix of it: more budget, same pages and more
        return _selection(view, pages[: self.room(view)])


@dataclass(kw_only=True, slots=True)
class CarryOverPolicy(Budget):
    """Keep what was resident in the window that ends and add nothing; over budget, the older pages go."""

    scorer: Scorer = field(default="none", init=False)
    name: str = "carry-over"

    def select(self, view: PageView) -> Selection:
        previous = set(view.previous)
        pages = [page for page in _eligible(view) if page in previous]
        return _selection(view, pages[::-1][: self.room(view)])


@dataclass(kw_only=True, slots=True)
class OraclePolicy(Budget):
    """Keep the best pages by scores that come from the future; an upper bound for evaluation.

    `scores[cycle]` holds one number per page; pages that it does not reach rank last.
    """

    scores: Sequence[Sequence[float] | torch.Tensor]
    scorer: Scorer = field(default="none", init=False)
    name: str = "oracle"

    def select(self, view: PageView) -> Selection:
        if not 0 <= view.cycle < len(self.scores):
            raise ValueError(f"the oracle knows cycles 0..{len(self.scores) - 1}, not {view.cycle}")
        known = torch.as_tensor(self.scores[view.cycle], dtype=torch.float32, device="cpu")
        ranked = best_first(page_scores(known[: view.num_pages], 1, view.num_pages), view.always)
        return _selection(view, ranked[: self.room(view)])


def _scores(view: PageView, name: str) -> torch.Tensor:
    return page_scores(_logits(view, name), view.page_chunks, view.num_pages)


def _logits(view: PageView, name: str) -> torch.Tensor:
    if view.logits_N is None:
        if view.num_chunks:
            raise ValueError(f"policy {name!r} needs the logits of {view.num_chunks} chunks, got none")
        return torch.empty(0)
    if len(view.logits_N) != view.num_chunks:
        raise ValueError(f"policy {name!r} needs {view.num_chunks} logits, got {len(view.logits_N)}")
    return view.logits_N


def _pages_above(view: PageView, threshold: float, pages: Iterable[int]) -> set[int]:
    if view.logits_N is None:
        return set()
    best_P = page_maxima(view.logits_N, view.page_chunks, view.num_pages)
    above_P = (best_P > _logit(threshold)).tolist()
    return {page for page in pages if above_P[page]}


def _eligible(view: PageView) -> list[int]:
    always = set(view.always)
    return [page for page in range(view.num_pages) if page not in always]


def _share(above: int, view: PageView) -> float:
    eligible = view.num_pages - len(view.always)
    return above / eligible if eligible else 0.0


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _selection(
    view: PageView, pages: Iterable[int], *, eligible_share: float = 0.0, truncated: bool = False
) -> Selection:
    return Selection(tuple(sorted({*view.always, *pages})), eligible_share=eligible_share, truncated=truncated)


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")


def _check_scorer(scorer: str) -> None:
    if scorer not in ("memory", "native"):
        raise ValueError(f"scorer must be 'memory' or 'native', got {scorer!r}")


__all__ = [
    "AllPages",
    "Budget",
    "BudgetPolicy",
    "CarryOverPolicy",
    "OraclePolicy",
    "RandomPolicy",
    "RecencyPolicy",
    "ThresholdPolicy",
]
