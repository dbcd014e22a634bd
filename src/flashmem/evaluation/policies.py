"""The policies that are compared, and how `@match` gives a baseline what LSA had.

    full                every page: the exact model
    lsa, lsa+rescue     the engine's own rule (threshold or budget), without and with rescue
    lsa-stale           that rule one window late: every window is selected by the scores of the level 1 before its own,
                        the first one by those at the end of the document
    recency@match       the newest pages
    random@match        pages drawn by a seed, drawn anew every cycle (several seeds)
    carry-over@match    the best pages by the scores at the end of the document, in every window
    native@match        the best pages by the backbone's own Lightning Indexer at the boundary
    oracle@match        the pages that the full run attended most in the cycle that follows
    recency-tail        the paper's own: a constant tail of 8,192 tokens
    random-10%          the paper's own: that tail, and a tenth of all other pages
    NAME@0.05           recency, random, native, lsa or oracle at a fixed share of pages

`@match` takes, cycle by cycle, the number of pages that LSA held for the same item; answers with more cycles than LSA's
go on with its last number. All policies keep the sink and the newest pages, which count.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..config import LSAConfig
from ..policy import AllPages, BudgetPolicy, OraclePolicy, RandomPolicy, RecencyPolicy, make_policy
from ..types import PageView, Policy, Scorer, Selection

STANDARD = (
    "full", "lsa", "lsa+rescue", "recency@match", "random@match", "carry-over@match", "native@match", "oracle@match",
    "recency-tail", "random-10%",
)  # fmt: skip
TAIL_TOKENS = 8192
"""The paper's recency tail: inferred from its KV column, which is 0.029 GiB plus a tenth of the rest."""
_PLAIN = ("full", "lsa", "lsa+rescue", "lsa-stale", "recency-tail", "random-10%")
_BUDGETED = ("recency", "random", "carry-over", "native", "oracle", "lsa")
_DRAWN = ("random@match", "random-10%")
_SHARE = re.compile(r"(?P<kind>[a-z-]+)@(?P<share>match|\d*\.?\d+)")


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy as it is compared; seeds of one policy are contenders of one label."""

    label: str
    kind: str
    """full, lsa, lsa-stale, recency, random, carry-over, native, oracle, recency-tail or random-10%."""
    share: float | None = None
    matched: bool = False
    rescue: bool = False
    seed: int = 0

    @property
    def key(self) -> str:
        return f"{self.label}#{self.seed}"


@dataclass(slots=True)
class Reference:
    """What the runs of `full` and `lsa` on the same item tell about it, one entry per cycle after the question."""

    budgets: list[int] = field(default_factory=list)
    """Pages that LSA held."""
    masses: list[torch.Tensor] = field(default_factory=list)
    """Attention [P] that the full run gave every page, summed over heads, CSA layers and steps of the cycle."""
    stale: torch.Tensor | None = None
    """Chunk logits [N] of the level 1 before the question."""


def parse_policies(names: Sequence[str], *, seeds: int = 3) -> list[Contender]:
    """Contenders of the named policies, in order. Raises ValueError for unknown names and for a missing `lsa`."""
    made: list[Contender] = []
    for name in names:
        first = _parse(name)
        drawn = first.kind.startswith("random")
        made += [replace(first, seed=seed) for seed in range(seeds if drawn else 1)]
    if len({contender.key for contender in made}) < len(made):
        raise ValueError(f"policies are named twice: {', '.join(names)}")
    labels = {contender.label for contender in made}
    if any(contender.matched for contender in made) and "lsa" not in labels:
        raise ValueError("policies at @match need 'lsa' among the policies: its bytes are what they are given")
    if any(contender.kind == "oracle" for contender in made) and "full" not in labels:
        raise ValueError("the oracle needs 'full' among the policies: it keeps what the full run attended")
    return made


def _parse(name: str) -> Contender:
    if name in _PLAIN:
        kind, _, rescue = name.partition("+")
        return Contender(name, kind, rescue=bool(rescue))
    match = _SHARE.fullmatch(name)
    if match is None or match["kind"] not in _BUDGETED or (match["kind"] == "lsa" and match["share"] == "match"):
        known = ", ".join(STANDARD)
        raise ValueError(f"unknown policy {name!r}; known are {known}, and NAME@SHARE for {', '.join(_BUDGETED)}")
    if match["share"] == "match":
        return Contender(name, match["kind"], matched=True)
    share = float(match["share"])
    if not 0 < share <= 1:
        raise ValueError(f"policy {name!r}: the share must lie in (0, 1]")
    return Contender(name, match["kind"], share=share)


def build(
    contender: Contender, config: LSAConfig, csa_ratio: int, reference: Reference, first_cycle: int = 0
) -> Policy:
    """The policy object of a contender for one item; `first_cycle` level 1 runs came before the question's."""
    if contender.kind == "full":
        return AllPages()
    if contender.kind == "lsa":
        return make_policy(config if contender.share is None else replace(config, keep=contender.share))
    if contender.kind == "lsa-stale":
        return Stale(make_policy(config), _known(reference.stale))
    tail = -(-TAIL_TOKENS // (config.page_chunks * csa_ratio))
    if contender.kind == "recency-tail":
        return RecencyPolicy(pages=config.sink_pages + tail)
    if contender.kind == "random-10%":
        return TailAndRandom(tail, 0.1, contender.seed)
    return Scheduled(
        _MAKERS[contender.kind](reference), first_cycle, name=contender.label, seed=contender.seed,
        budgets=reference.budgets if contender.matched else None, share=contender.share,
        scorer="native" if contender.kind == "native" else "none",
    )  # fmt: skip


Maker = Callable[[int, int], Policy]
"""From (cycle after the question, pages) to the policy of that cycle."""

_MAKERS: dict[str, Callable[[Reference], Maker]] = {
    "recency": lambda _: lambda cycle, pages: RecencyPolicy(pages=pages),
    "random": lambda _: lambda cycle, pages: RandomPolicy(pages=pages),
    "native": lambda _: lambda cycle, pages: BudgetPolicy(pages=pages, scorer="native", name="native"),
    "carry-over": lambda told: lambda cycle, pages: Stale(BudgetPolicy(pages=pages), _known(told.stale)),
    "oracle": lambda told: lambda cycle, pages: _Ranked(_known(_at(told.masses, cycle)), pages),
}


def _known(scores: torch.Tensor | None) -> torch.Tensor:
    if scores is None:
        raise ValueError("the item's reference lacks the scores that this policy ranks by")
    return scores


def _at(masses: Sequence[torch.Tensor], cycle: int) -> torch.Tensor | None:
    """The mass of a cycle; where the full run had ended, of its last one."""
    return masses[min(cycle, len(masses) - 1)] if masses else None


@dataclass(slots=True)
class _Ranked:
    """`OraclePolicy` whatever the cycle."""

    scores_P: torch.Tensor
    pages: int
    name: str = "ranked"
    scorer: Scorer = "none"

    def select(self, view: PageView) -> Selection:
        return OraclePolicy(pages=self.pages, scores=[self.scores_P]).select(replace(view, cycle=0))


@dataclass(slots=True)
class Stale:
    """A policy one window late: it sees the scores that the boundary before saw, and is asked once at each.

    Chunks that did not exist then have no score; the always-kept pages are those of now.
    """

    late: Policy
    before_N: torch.Tensor
    """Chunk logits of the boundary before."""
    name: str = "lsa-stale"
    scorer: Scorer = "memory"

    def __post_init__(self) -> None:
        if self.late.scorer != "memory":
            raise ValueError(
                f"policy {self.late.name!r} does not go by the Memory Indexer's scores: they cannot be late"
            )

    def select(self, view: PageView) -> Selection:
        seen_N = self.before_N.new_full((view.num_chunks,), -math.inf)
        seen_N[: len(self.before_N)] = self.before_N
        if view.logits_N is not None:
            self.before_N = view.logits_N
        return self.late.select(replace(view, logits_N=seen_N))


@dataclass(slots=True)
class Scheduled:
    """Another budget in every cycle, counted from the question."""

    make: Maker
    first_cycle: int
    name: str
    seed: int
    budgets: Sequence[int] | None
    share: float | None
    scorer: Scorer

    def select(self, view: PageView) -> Selection:
        cycle = view.cycle - self.first_cycle
        if self.budgets is not None:
            pages = self.budgets[min(cycle, len(self.budgets) - 1)]
        else:
            pages = RecencyPolicy(keep=self.share).resident_pages(view)
        return self.make(cycle, pages).select(replace(view, cycle=cycle, seed=self.seed))


@dataclass(slots=True)
class TailAndRandom:
    """The newest pages, and a share of all others drawn by seed and cycle."""

    tail_pages: int
    share: float
    seed: int
    name: str = "random-10%"
    scorer: Scorer = "none"

    def select(self, view: PageView) -> Selection:
        tail = set(range(max(0, view.num_pages - self.tail_pages), view.num_pages)) | set(view.always)
        others = [page for page in range(view.num_pages) if page not in tail]
        drawn = random.Random(f"{self.seed} {view.cycle}").sample(others, round(self.share * len(others)))
        return Selection(tuple(sorted({*tail, *drawn})))


__all__ = [
    "STANDARD",
    "TAIL_TOKENS",
    "Contender",
    "Reference",
    "Scheduled",
    "Stale",
    "TailAndRandom",
    "build",
    "parse_policies",
]
