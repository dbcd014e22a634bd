"""Level 1 of several sessions at once: from observed tokens to the pages of the next window.

Where decoding runs on the fused kernels and a policy needs page scores only (`types.ByPageScores`), one launch scores
the pages of all sessions and another selects; only page ids and counts come to the host. What needs the logits of
chunks is computed session by session on the reference: other policies, rescue (which selects twice from the same
logits), target layers on several devices, and histories beyond the selection kernel's limit.
Shape letters: B = sessions, P = pages of the longest history, N = chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..kernels.paged import to_device
from ..kernels.select_pages import MOST_PAGES, select_pages
from ..policy import TEMPERATURE
from ..types import ByPageScores, PageLimits, PageView, Selection

if TYPE_CHECKING:
    from .cycle import Cycle


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """What level 1 of one session selects, and what it was chosen by."""

    selection: Selection
    view: PageView
    scores_P: torch.Tensor | None = None
    """Page scores where they lie, if the view has no logits that give them."""


def choose(cycles: Sequence[Cycle]) -> list[Choice]:
    """Run level 1 of these sessions, of one engine, now; in their order."""
    choices: dict[int, Choice] = {}
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for at, cycle in enumerate(cycles):
        if (key := _group(cycle)) is None:
            choices[at] = cycle.choose_by_logits()
        else:
            groups.setdefault(key, []).append(at)
    for members in groups.values():
        choices |= dict(zip(members, _choose_in_place([cycles[at] for at in members]), strict=True))
    return [choices[at] for at in range(len(cycles))]


def _group(cycle: Cycle) -> tuple[int, int, bool] | None:
    """Sessions of the same group share their launches; None where level 1 needs the logits of chunks."""
    policy, pages = cycle.policy, cycle.pages
    if cycle.config.kernels != "fused" or cycle.config.rescue or not isinstance(policy, ByPageScores):
        return None
    if policy.scorer == "none" or not pages.num_chunks or pages.num_pages > MOST_PAGES:
        return None
    indexer = cycle.scorers[policy.scorer]
    if len({pages.index_rows(cycle.layers[csa]).device for csa in indexer.target_layers}) > 1:
        return None
    observed = len(cycle.state.observed_positions())
    return id(indexer), observed, policy.limits(cycle.view()).above_first


def _choose_in_place(cycles: Sequence[Cycle]) -> list[Choice]:
    scores_BP, best_BP = score_group(cycles)
    views = [cycle.view() for cycle in cycles]
    found = select_group(cycles, views, scores_BP, best_BP)
    choices = []
    for cycle, view, scores_P, (pages, above) in zip(cycles, views, scores_BP, found, strict=True):
        assert isinstance(cycle.policy, ByPageScores)
        choices.append(Choice(cycle.policy.chosen(view, pages, above), view, scores_P[: view.num_pages]))
    return choices


def score_group(cycles: Sequence[Cycle]) -> tuple[torch.Tensor, torch.Tensor]:
    """Page scores [B, P] and best logits [B, P] of sessions that share a scorer and have observed as many tokens."""
    first = cycles[0]
    indexer, pool = first.scorers[first.policy.scorer], first.state.pool
    layers = {csa: first.layers[csa] for csa in indexer.target_layers}
    states = [cycle.state for cycle in cycles]
    return indexer.page_scores_in_place(
        {csa: pool.observed(layer, states) for csa, layer in layers.items()},
        {csa: [cycle.pages.index_rows(layer) for cycle in cycles] for csa, layer in layers.items()},
        torch.stack([state.observed_positions() for state in states]),
        page_chunks=first.config.page_chunks, temperature=TEMPERATURE, ensemble=first.config.ensemble,
    )  # fmt: skip


def select_group(
    cycles: Sequence[Cycle], views: Sequence[PageView], scores_BP: torch.Tensor, best_BP: torch.Tensor
) -> list[tuple[tuple[int, ...], int]]:
    """Selected pages of every session, and how many eligible ones are above its threshold; waits for the device.

    Raises ValueError where a logit is NaN.
    """
    config, device = cycles[0].config, scores_BP.device
    limits = [_limits(cycle, view) for cycle, view in zip(cycles, views, strict=True)]
    numbers = torch.tensor([[view.num_pages for view in views], [x.least for x in limits], [x.most for x in limits]])
    pages_B, least_B, most_B = to_device(numbers.int(), device)
    none = float("inf")  # no page is above it
    threshold_B = to_device(torch.tensor([none if x.threshold is None else x.threshold for x in limits]), device)
    above_BP = (best_BP > threshold_B[:, None]).int()
    with torch.cuda.device_of(scores_BP):  # Triton launches on the current device
        picks = select_pages(
            scores_BP, pages_B, least_B, most_B, sink=config.sink_pages, recency=config.recency_pages,
            above_BP=above_BP if limits[0].above_first else None, impl="fused",
        )  # fmt: skip
    above_B = picks.above_B
    if not limits[0].above_first:
        page_P = torch.arange(scores_BP.shape[1], device=device)
        eligible_BP = (page_P >= config.sink_pages) & (page_P < (pages_B - config.recency_pages)[:, None])
        above_B = (above_BP * eligible_BP).sum(1, dtype=torch.int32)
    broken_B = scores_BP.isnan().any(1).int()
    heads = torch.stack((picks.counts_B, above_B, broken_B), 1)
    longest = max(min(view.num_pages, x.most + len(view.always)) for view, x in zip(views, limits, strict=True))
    found = torch.cat((heads, picks.pages_BP[:, :longest]), 1).tolist()
    if any(broken for _, _, broken, *_ in found):
        raise ValueError("chunk logits hold NaN")
    return [(tuple(pages[:count]), above) for count, above, _, *pages in found]


def _limits(cycle: Cycle, view: PageView) -> PageLimits:
    assert isinstance(cycle.policy, ByPageScores)
    return cycle.policy.limits(view)


__all__ = ["Choice", "choose"]
