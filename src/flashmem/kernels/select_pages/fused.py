"""Page selection in Triton: one program per session finds the best pages and writes them in order.

Shape letters: B = sessions, P = pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..paged import places
from ..triton_parts import largest, rank_bits
from . import MOST_PAGES


def select_pages_fused(
    scores_BP: torch.Tensor,
    num_pages_B: torch.Tensor,
    least_B: torch.Tensor,
    most_B: torch.Tensor,
    sink: int,
    recency: int,
    above_BP: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, pages = scores_BP.shape
    if pages > MOST_PAGES:
        raise ValueError(f"{pages} pages; the fused kernel takes at most {MOST_PAGES}")
    out = torch.empty(batch, pages, dtype=torch.int32, device=scores_BP.device)
    counts, above = (torch.zeros(batch, dtype=torch.int32, device=scores_BP.device) for _ in range(2))
    if out.numel():
        block = min(MOST_PAGES, places(pages, 64))
        _select_kernel[(batch,)](
            scores_BP.contiguous(), out if above_BP is None else above_BP.contiguous(), num_pages_B, least_B, most_B,
            out, counts, above, pages, sink, recency,
            ABOVE=above_BP is not None, BLOCK_PAGES=block, num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
    return out, counts, above


@triton.jit(do_not_specialize=["width", "sink", "recency"])
def _select_kernel(
    scores_ptr, hits_ptr, num_pages_ptr, least_ptr, most_ptr, out_ptr, counts_ptr, above_ptr, width, sink, recency,
    ABOVE: tl.constexpr, BLOCK_PAGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    num_pages = tl.load(num_pages_ptr + b)
    page = tl.arange(0, BLOCK_PAGES)
    live = page < num_pages
    eligible = live & (page >= sink) & (page < num_pages - recency)
    ranks = rank_bits(tl.load(scores_ptr + b * width + page, mask=eligible, other=0.0))
    wanted = tl.load(least_ptr + b)
    if ABOVE:
        hit = eligible & (tl.load(hits_ptr + b * width + page, mask=eligible, other=0) > 0)
        above = tl.sum(hit.to(tl.int32), axis=0)
        wanted = tl.maximum(wanted, above)
        tl.store(above_ptr + b, above)
    wanted = tl.minimum(wanted, tl.load(most_ptr + b))
    if ABOVE:  # pages above the threshold come first: no others if these are enough, else all of these
        enough = wanted <= above
        others = tl.where(enough, 0, tl.minimum(ranks, 0xFFFFFFFE))
        ranks = tl.where(hit, tl.where(enough, ranks, 0xFFFFFFFF), others)
    place, picked = largest(tl.where(eligible, ranks, 0), wanted)
    # all live pages that are not eligible are kept too: `sink` before the eligible ones, the others behind
    choices = tl.maximum(num_pages - recency - sink, 0)
    always_before = tl.where(page < sink, page, page - choices + picked)
    kept_before = tl.where(place >= 0, place + sink, always_before)
    kept = (place >= 0) | (live & (eligible == 0))
    count = num_pages - choices + picked
    tl.store(out_ptr + b * width + kept_before, page, mask=kept)
    tl.store(out_ptr + b * width + page, tl.full([BLOCK_PAGES], -1, tl.int32), mask=(page >= count) & (page < width))
    tl.store(counts_ptr + b, count)


__all__ = ["select_pages_fused"]
