"""Values and protocols that cross folders. Imports only `config`.

Shape letters: B = sessions of a decode batch, P = pages of the longest page table in it, C = chunks per page,
K = picked chunks, N = chunks, D = head_dim, I = index_head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

Scorer = Literal["memory", "native", "none"]


class FlashmemError(Exception):
    """Base of the errors that are not a caller's bad value."""


class BudgetError(FlashmemError):
    """Work that does not fit a budget; nothing was changed."""

    def __init__(self, tier: str, needed: int, available: int) -> None:
        super().__init__(f"{tier}: {needed:,} bytes needed, {available:,} available")
        self.tier, self.needed, self.available = tier, needed, available


class DamagedError(FlashmemError):
    """A file that is truncated, altered, foreign or of an unknown version."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Pages wanted for the next window."""

    pages: tuple[int, ...]
    """Sorted, without duplicates; the always-kept pages are among them."""
    eligible_share: float = 0.0
    """Share of eligible pages with a chunk above threshold (0 where the policy has no threshold)."""
    truncated: bool = False
    """True when the ceiling cut off pages above threshold."""

    def __post_init__(self) -> None:
        if list(self.pages) != sorted(set(self.pages)):
            raise ValueError(f"a selection must be sorted and free of duplicates, got {self.pages[:8]}...")


@dataclass(frozen=True, slots=True)
class PageView:
    """What a policy sees of one session at a window boundary."""

    num_pages: int
    """Pages that exist, the one being filled included."""
    page_chunks: int
    num_chunks: int
    always: tuple[int, ...]
    """Sink and recency pages; the policy must return them, and scores only the others (the eligible ones)."""
    logits_N: torch.Tensor | None
    """Float32 chunk logits of the scorer that the policy asked for, or None."""
    previous: tuple[int, ...] = ()
    """The selection of the window that ends."""
    cycle: int = 0
    seed: int = 0
    widen: bool = False
    """Rescue: ignore the ceiling this time."""


@runtime_checkable
class Policy(Protocol):
    """Scores in, `Selection` out; a pure function of the view."""

    name: str
    scorer: Scorer

    def select(self, view: PageView) -> Selection: ...


@dataclass(frozen=True, slots=True)
class PageLimits:
    """How a policy chooses among the eligible pages, if page scores are all that it needs."""

    least: int
    most: int
    """Pages wanted: as many as are above the threshold, at least and at most this."""
    threshold: float | None = None
    """A logit: a page is above it when one of its chunks is. None: `most` pages are wanted."""
    above_first: bool = False
    """Whether pages above the threshold come before others with better scores; else `least` is `most`."""


@runtime_checkable
class ByPageScores(Policy, Protocol):
    """A policy whose choice can be made beside the scores: the best pages, by score, then lower page.

    What it selects is what `select` does, which sees chunk logits.
    """

    def limits(self, view: PageView) -> PageLimits: ...

    def chosen(self, view: PageView, pages: tuple[int, ...], above: int) -> Selection:
        """The selection from the best pages within the limits, the always-kept ones included, sorted.

        `above`: eligible pages above the threshold. The view holds no logits.
        """
        ...


class LayerHistory(Protocol):
    """All chunks of one CSA layer of one session, for prefill: resident or not, whole tiers behind it."""

    num_chunks: int
    keys_rotated: bool
    """True when keys are in the Hadamard basis, so that the query must be rotated too."""

    def keys(self, first: int, last: int) -> torch.Tensor:
        """Index keys [last - first, I] of chunks first..last-1, in the compute dtype, on the layer's device."""
        ...

    def kv(self, chunk_ids: torch.Tensor) -> torch.Tensor:
        """KV entries [..., D] of the given chunk ids (int64, each in 0..num_chunks-1), in the compute dtype."""
        ...


class PrefillPages(Protocol):
    """One session's pages as prefill writes and reads them."""

    num_chunks: int

    def reserve(self, count: int) -> None:
        """Make room for `count` chunks after `num_chunks`; raises BudgetError before anything changes."""
        ...

    def write(
        self, layer: int, kv_ND: torch.Tensor, keys_NI: torch.Tensor, *, impl: Literal["fused"] | None = None
    ) -> None:
        """Store one layer's entries of the N chunks that follow `num_chunks` (uncommitted)."""
        ...

    def history(self, layer: int, num_chunks: int) -> LayerHistory:
        """Readable view of the first `num_chunks` chunks, uncommitted ones of this layer included."""
        ...

    def commit(self, count: int) -> None:
        """Make `count` written chunks permanent in all layers; finished pages go to host or disk."""
        ...


class DecodePages(Protocol):
    """The resident pages of a batch of sessions as a decode step reads them."""

    def keys_rotated(self, layer: int) -> bool: ...

    def keys(self, layer: int) -> torch.Tensor:
        """Index keys [B, P, C, I] in the compute dtype; rows past a page's valid length are unspecified."""
        ...

    def chunk_ids(self, layer: int) -> torch.Tensor:
        """Int64 [B, P * C] chunk id of every key, -1 where there is no chunk to attend (pad, past the end)."""
        ...

    def kv(self, layer: int, picks_BK: torch.Tensor) -> torch.Tensor:
        """KV entries [B, K, D] of flat indices into P * C; every pick must be valid."""
        ...

    def write(self, layer: int, rows: torch.Tensor, kv_ND: torch.Tensor, keys_NI: torch.Tensor) -> None:
        """Store the chunk that batch rows `rows` (int64 [N] on the CPU) completed in this step."""
        ...


@dataclass(slots=True)
class TierBytes:
    """Bytes and pages held in one tier by one session."""

    pages: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Traffic:
    """What a session's pages moved, and how often."""

    pages_to_device: int = 0
    bytes_to_device: int = 0
    pages_to_host: int = 0
    bytes_to_host: int = 0
    pages_to_disk: int = 0
    bytes_to_disk: int = 0
    flips: int = 0


def check_sorted_unique(pages: Sequence[int], num_pages: int) -> None:
    """Raise ValueError if pages are not sorted, unique and below num_pages."""
    if list(pages) != sorted(set(pages)) or (pages and not 0 <= pages[0] <= pages[-1] < num_pages):
        raise ValueError(f"pages must be sorted, unique and in 0..{num_pages - 1}, got {list(pages)[:8]}")
