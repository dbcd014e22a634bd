"""The definition of a chunk's logit, of how logits of layers and tokens merge, and of what a page is worth."""

from __future__ import annotations

import torch


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
