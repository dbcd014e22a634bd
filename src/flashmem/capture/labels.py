"""Labels from what was seen at every decoded token: sums over the next tau tokens, and the published vote.

Shape letters: T = decoded tokens, L = CSA layers, K = picks, Q = queries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from .format import Csr
from .prompts import Evidence


class Query(NamedTuple):
    """A position whose next token belongs to the answer [start, end)."""

    position: int
    start: int
    end: int


def sample_queries(turns: Sequence[tuple[int, int]], tau: int, count: int, seed: int, rid: str) -> list[Query]:
    """At most `count` queries, ascending, in turns that do not overlap.

    A turn is an answer's tokens [start, end). Level 1 runs at start - 1 and every tau tokens from there; these come
    first, the beginnings of turns before all. What is left of `count` is drawn among the turns' other tokens, by seed
    and rid alone.
    """
    digest = hashlib.sha256(f"{seed} {rid}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def draw(candidates: Sequence[Query], wanted: int) -> list[Query]:
        if wanted >= len(candidates) and wanted:
            return list(candidates)
        order = torch.randperm(len(candidates), generator=generator)[:wanted]
        return [candidates[i] for i in order.tolist()]

    every = [[Query(p, start, end) for p in range(start - 1, end - 1)] for start, end in turns if start < end]
    beginnings = [turn[0] for turn in every]
    boundaries = [query for turn in every for query in turn[tau::tau]]
    others = [query for turn in every for offset, query in enumerate(turn) if offset % tau]
    chosen: list[Query] = []
    for candidates in (beginnings, boundaries, others):
        chosen += draw(candidates, count - len(chosen))
    return sorted(chosen)


def windows(queries: Iterable[Query], first: int, tau: int) -> list[slice]:
    """Decoded tokens, counted from `first` + 1, that each query's labels look at: tau after it, within its turn."""
    return [slice(query.position - first, min(query.position + tau, query.end - 1) - first) for query in queries]


def sum_windows(
    ids_TK: torch.Tensor, values_TK: torch.Tensor, spans: Sequence[slice], num_chunks: Sequence[int]
) -> Csr:
    """Sum of values per chunk over each window; chunks that a query does not see are left out."""
    rows = []
    for span, visible in zip(spans, num_chunks, strict=True):
        ids, values = ids_TK[span].flatten().long(), values_TK[span].flatten()
        good = (ids >= 0) & (ids < visible)
        total = torch.bincount(ids[good], weights=values[good].double(), minlength=visible)
        chunks = total.nonzero()[:, 0]
        rows.append((chunks, total[chunks]))
    return Csr.from_rows(rows)


def votes(ids_LK: torch.Tensor, probabilities_LK: torch.Tensor, p: float, layers: int) -> tuple[torch.Tensor, ...]:
    """One token's vote: chunks in the top-p set of at least `layers` layers, and how many; picks come best first.

    The published rule: the ranks whose cumulated probability stays within p, rank 1 in any case, and the next one.
    """
    within = ((probabilities_LK.cumsum(1) <= p) & (ids_LK >= 0)).sum(1, keepdim=True).clamp_min(1) + 1
    chosen = (torch.arange(ids_LK.shape[1]) < within) & (ids_LK >= 0)
    chunks, counts = ids_LK[chosen].unique(return_counts=True)
    golden = counts >= layers
    return chunks[golden], counts[golden]


def vote_windows(tokens: Sequence[tuple[torch.Tensor, ...]], spans: Sequence[slice], num_chunks: Sequence[int]) -> Csr:
    """Greatest count of each chunk over each window of tokens' (chunks, counts)."""
    rows = []
    for span, visible in zip(spans, num_chunks, strict=True):
        chunks = torch.cat([torch.empty(0, dtype=torch.int64), *(chunks.long() for chunks, _ in tokens[span])])
        counts = torch.cat([torch.empty(0, dtype=torch.int64), *(counts.long() for _, counts in tokens[span])])
        good = (chunks >= 0) & (chunks < visible)
        most = torch.zeros(visible, dtype=torch.int64).scatter_reduce_(0, chunks[good], counts[good], "amax")
        golden = most.nonzero()[:, 0]
        rows.append((golden, most[golden]))
    return Csr.from_rows(rows)


def evidence_rows(
    evidence: Sequence[Evidence],
    queries: Sequence[Query],
    tau: int,
    ratio: int,
    num_chunks: Sequence[int],
) -> Csr:
    """Chunks that hold tokens of the evidence that each query's window needs."""
    rows = []
    for (position, _, end), visible in zip(queries, num_chunks, strict=True):
        seen, last = torch.zeros(visible), min(position + tau, end - 1)
        for item in evidence:
            if item.answer is None or (item.answer[0] <= last and item.answer[1] > position + 1):
                seen[item.span[0] // ratio : (item.span[1] - 1) // ratio + 1] = 1
        chunks = seen.nonzero()[:, 0]
        rows.append((chunks, seen[chunks]))
    return Csr.from_rows(rows)


__all__ = ["Query", "evidence_rows", "sample_queries", "sum_windows", "vote_windows", "votes", "windows"]
