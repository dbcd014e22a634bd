"""The definition of a chunk's logit."""

from __future__ import annotations

import torch


def score_chunks_reference(q_BMHI: torch.Tensor, keys_BNI: torch.Tensor, w_BMH: torch.Tensor) -> torch.Tensor:
    dot_BMHN = torch.einsum("bmhi,bni->bmhn", q_BMHI.float(), keys_BNI.float())
    return (dot_BMHN.relu() * w_BMH.float().unsqueeze(-1)).sum(dim=2)
