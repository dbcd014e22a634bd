"""Labels from what was seen at every decoded token: sums over the next tau tokens, and the published vote.

Shape letters: T = decoded tokens, L = CSA layers, K = picks, Q = queries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

from .format import Csr
from .prompts import Evidence


def sample_queries(first: int, steps: int, tau: int, count: int, seed: int, rid: str) -> list[int]:
    """Positions of at most `count` queries, ascending, each with a decoded token after it.

    Level 1 runs at `first`, the end of the prompt, and every tau tokens; these come first, the end of the prompt before
    all. What is left of `count` is drawn among the other tokens, by seed and rid alone.
    """
    digest = hashlib.sha256(f"{seed} {rid}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def draw(candidates: Sequence[int], wanted: int) -> list[int]:
        order = torch.randperm(len(candidates), generator=generator)[:wanted]
        return [candidates[i] for i in order.tolist()]

    if not steps:
        return []
    boundaries = list(range(first + tau, first + steps, tau))
    others = [position for position in range(first + 1, first + steps) if (position - first) % tau]
    chosen = [first, *draw(boundaries, count - 1)]
    return sorted(chosen + draw(others, count - len(chosen)))


def windows(positions: Iterable[int], first: int, steps: int, tau: int) -> list[slice]:
    """Decoded tokens that each query's labels look at: those at position + 1 .. position + tau, as far as there are."""
    return [slice(p - first, min(p - first + tau, steps)) for p in positions]


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
    evidence: Sequence[Evidence], positions: Sequence[int], tau: int, ratio: int, num_chunks: Sequence[int]
) -> Csr:
    """Chunks that hold tokens of the evidence that each query's window needs."""
    rows = []
    for position, visible in zip(positions, num_chunks, strict=True):
        seen = torch.zeros(visible)
        for item in evidence:
            if item.answer is None or (item.answer[0] <= position + tau and item.answer[1] > position + 1):
                seen[item.span[0] // ratio : (item.span[1] - 1) // ratio + 1] = 1
        chunks = seen.nonzero()[:, 0]
        rows.append((chunks, seen[chunks]))
    return Csr.from_rows(rows)


__all__ = ["evidence_rows", "sample_queries", "sum_windows", "vote_windows", "votes", "windows"]
