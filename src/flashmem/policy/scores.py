"""From chunk logits to page scores, and the rules that every policy shares.

Shape letters: Q = queries that share a history, N = chunks, P = pages, C = chunks of a page.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

TEMPERATURE = 0.25
"""Logits closer than this add up within a page; see `page_scores`."""


def always_kept(num_pages: int, sink: int, recency: int) -> tuple[int, ...]:
    """Return the first `sink` and the last `recency` pages, sorted, without duplicates."""
    if min(num_pages, sink, recency) < 0:
        raise ValueError(f"num_pages, sink and recency must not be negative, got {num_pages}, {sink}, {recency}")
    first, last = min(sink, num_pages), max(num_pages - recency, 0)
    return tuple(range(num_pages)) if last <= first else (*range(first), *range(last, num_pages))


def eligible_chunks(num_chunks: int, page_chunks: int, always: Collection[int]) -> torch.Tensor:
    """Return bool [N] on the CPU: chunks that exist now and are not on an always-kept page.

    The one mask of training, calibration and evaluation: what a policy can win or lose is among these chunks.
    """
    eligible_N = torch.ones(num_chunks, dtype=torch.bool)
    for page in always:
        eligible_N[page * page_chunks : (page + 1) * page_chunks] = False
    return eligible_N


def page_scores(logits_N: torch.Tensor, page_chunks: int, num_pages: int) -> torch.Tensor:
    """Return float32 scores [P] on the CPU: T logsumexp(logit / T) over the chunks of a page, -inf for none.

    A page is worth its best chunk, and a little more for each other chunk about as good. With T = 0.25 a page of
    64 doubtful chunks (logit 0) scores 0.25 ln 64 = 1.04, below a page with one certain chunk (logit 6). A count of
    chunks above threshold would turn this around and lose needles; the plain maximum would not tell a page with one
    good chunk from a page full of them. Raises ValueError if a logit is NaN or chunks do not fit the pages.
    """
    return pool_pages(_by_page(logits_N, page_chunks, num_pages)).cpu()


def pool_pages(logits_PC: torch.Tensor) -> torch.Tensor:
    """The formula of `page_scores`, differentiable, on logits [..., P, C] with -inf where there is no chunk."""
    return TEMPERATURE * torch.logsumexp(logits_PC / TEMPERATURE, dim=-1)


def page_maxima(logits_N: torch.Tensor, page_chunks: int, num_pages: int) -> torch.Tensor:
    """Return each page's best logit, float32 [P] on the CPU, -inf for a page without chunks."""
    return _by_page(logits_N, page_chunks, num_pages).amax(dim=1).cpu()


def _by_page(logits_N: torch.Tensor, page_chunks: int, num_pages: int) -> torch.Tensor:
    if page_chunks < 1 or logits_N.dim() != 1 or len(logits_N) > page_chunks * num_pages:
        raise ValueError(f"{tuple(logits_N.shape)} logits do not fit {num_pages} pages of {page_chunks} chunks")
    if bool(logits_N.isnan().any()):
        raise ValueError("chunk logits hold NaN")
    padded = logits_N.new_full((num_pages * page_chunks,), -math.inf, dtype=torch.float32)
    padded[: len(logits_N)] = logits_N
    return padded.view(num_pages, page_chunks)


def best_first(scores_P: torch.Tensor, excluded: Collection[int] = ()) -> list[int]:
    """Return the pages that are not excluded by falling score; ties go to the lower page."""
    order = torch.sort(scores_P, descending=True, stable=True).indices.tolist()
    gone = set(excluded)
    return [page for page in order if page not in gone]


__all__ = ["TEMPERATURE", "always_kept", "best_first", "eligible_chunks", "page_maxima", "page_scores", "pool_pages"]
