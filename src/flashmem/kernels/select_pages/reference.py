"""The definition of page selection."""

from __future__ import annotations

import torch


def select_pages_reference(
    scores_BP: torch.Tensor,
    num_pages_B: torch.Tensor,
    least_B: torch.Tensor,
    most_B: torch.Tensor,
    sink: int,
    recency: int,
    above_BP: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pages_BP = torch.full(scores_BP.shape, -1, dtype=torch.int32)
    above_B = torch.zeros(len(scores_BP), dtype=torch.int32)
    counts = []
    for b, num_pages in enumerate(num_pages_B.tolist()):
        always = {*range(min(sink, num_pages)), *range(max(num_pages - recency, 0), num_pages)}
        scores = scores_BP[b].tolist()
        hit = [False] * num_pages if above_BP is None else [count > 0 for count in above_BP[b].tolist()]
        eligible = [page for page in range(num_pages) if page not in always]
        ranked = sorted(eligible, key=lambda page: (not hit[page], -scores[page], page))
        above_B[b] = sum(hit[page] for page in eligible)
        wanted = min(max(int(above_B[b]), int(least_B[b])), int(most_B[b]))
        kept = sorted(always | set(ranked[:wanted]))
        pages_BP[b, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
        counts.append(len(kept))
    device = scores_BP.device
    return pages_BP.to(device), torch.tensor(counts, dtype=torch.int32, device=device), above_B.to(device)
