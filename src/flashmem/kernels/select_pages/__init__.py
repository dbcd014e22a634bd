"""Select the pages of the next window from page scores, on the device, for a batch of sessions.

The rule is that of `policy.ThresholdPolicy` and `policy.BudgetPolicy`. Shape letters: B = sessions, P = pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .reference import select_pages_reference

Impl = Literal["reference", "fused"]
MOST_PAGES = 1 << 15
"""Pages that one program of the fused version holds in registers."""


@dataclass(frozen=True, eq=False, slots=True)
class PagePicks:
    """The selected pages of each session."""

    pages_BP: torch.Tensor
    """Int32, ascending, -1 after the last."""
    counts_B: torch.Tensor
    """Int32: selected pages, the always-kept ones included."""
    above_B: torch.Tensor
    """Int32: eligible pages with a chunk above threshold; 0 where `above_BP` was not given."""


def select_pages(
    scores_BP: torch.Tensor,
    num_pages_B: torch.Tensor,
    least_B: torch.Tensor,
    most_B: torch.Tensor,
    *,
    sink: int,
    recency: int,
    above_BP: torch.Tensor | None = None,
    impl: Impl | None = None,
) -> PagePicks:
    """Keep the first `sink` and last `recency` pages and, of the others, the best: by score, then lower page.

    num_pages_B, least_B, most_B: int32; pages beside the always-kept ones number as many as are above the threshold
    (`above_BP`, int32: chunks above it; those pages go first), at least `least_B`, at most `most_B`. A fixed budget is
    least_B = most_B without `above_BP`. Scores past a session's pages are ignored.
    """
    batch = len(scores_BP)
    for name, x in (("num_pages_B", num_pages_B), ("least_B", least_B), ("most_B", most_B)):
        if x.shape != (batch,) or x.dtype is not torch.int32:
            raise ValueError(f"{name} must be int32 [{batch}], got {x.dtype} {tuple(x.shape)}")
    if above_BP is not None and (above_BP.shape != scores_BP.shape or above_BP.dtype is not torch.int32):
        raise ValueError(
            f"above_BP must be int32 {tuple(scores_BP.shape)}, got {above_BP.dtype} {tuple(above_BP.shape)}"
        )
    if sink < 0 or recency < 0:
        raise ValueError(f"sink and recency must not be negative, got {sink} and {recency}")
    impl = impl or "reference"
    if impl == "reference":
        return PagePicks(*select_pages_reference(scores_BP, num_pages_B, least_B, most_B, sink, recency, above_BP))
    if impl == "fused":
        from .fused import select_pages_fused  # needs triton

        return PagePicks(*select_pages_fused(scores_BP, num_pages_B, least_B, most_B, sink, recency, above_BP))
    raise ValueError(f"unknown impl {impl!r}; choose 'reference' or 'fused'")


__all__ = ["MOST_PAGES", "PagePicks", "select_pages"]
