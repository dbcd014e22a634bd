"""The definition of a query, of a chunk's logit, of how logits of layers and tokens merge, and of a page's worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..index_rows import hadamard
from ..norm_rope import norm_rope


@dataclass(frozen=True, eq=False, slots=True)
class QueryFinish:
    """What projections lack to be queries and head weights; by default nothing.

    G = pairs of tables, P = rotated pairs of channels.
    """

    rope: tuple[torch.Tensor, torch.Tensor] | None = None
    """Cos and sin [..., P] of the last 2P channels, as in `norm_rope`; G divides the number of queries."""
    hadamard: bool = False
    """Turn queries into the basis of index rows."""
    weight_scale: float = 1.0

    def tables(self, queries: int, channels: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cos and sin [G, P] for so many queries; ValueError where they do not fit."""
        if self.rope is None:
            return None
        cos_GP, sin_GP = (table.flatten(0, -2) for table in self.rope)
        tables, pairs = cos_GP.shape
        if sin_GP.shape != cos_GP.shape or 2 * pairs > channels or not tables or queries % tables:
            raise ValueError(
                f"cos {tuple(cos_GP.shape)} and sin {tuple(sin_GP.shape)} do not fit {queries} queries of {channels} "
                "channels"
            )
        return cos_GP, sin_GP


FINISHED = QueryFinish()


def finish_queries_reference(
    q: torch.Tensor, w: torch.Tensor, finish: QueryFinish
) -> tuple[torch.Tensor, torch.Tensor]:
    if (rope := finish.tables(w.shape[:-1].numel(), q.shape[-1])) is not None:
        q = norm_rope(q, rope=rope)
    return hadamard(q) if finish.hadamard else q, w.float() * finish.weight_scale


def score_chunks_reference(q_BMHI: torch.Tensor, keys_BNI: torch.Tensor, w_BMH: torch.Tensor) -> torch.Tensor:
    dot_BMHN = torch.einsum("bmhi,bni->bmhn", q_BMHI.float(), keys_BNI.float())
    return (dot_BMHN.relu() * w_BMH.float().unsqueeze(-1)).sum(dim=2)


def merge_logits_reference(logits_LBMN: torch.Tensor, valid_BN: torch.Tensor, mean: bool) -> torch.Tensor:
    """Logits [B, N] over layers and tokens alike, -inf where there is no chunk."""
    merged_BN = logits_LBMN.mean(dim=(0, 2)) if mean else logits_LBMN.amax(dim=(0, 2))
    return merged_BN.masked_fill(~valid_BN, float("-inf"))


def reduce_pages_reference(
    logits_BN: torch.Tensor, page_chunks: int, temperature: float, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    missing = -logits_BN.shape[1] % page_chunks
    padded = torch.nn.functional.pad(logits_BN, (0, missing), value=float("-inf"))
    logits_BPC = padded.unflatten(1, (padded.shape[1] // page_chunks, page_chunks))
    score_BP = temperature * torch.logsumexp(logits_BPC / temperature, dim=2)
    return logits_BPC.amax(dim=2), score_BP, (logits_BPC > threshold).sum(dim=2, dtype=torch.int32)
