"""The definition of level 2: scores, and an order without ties.

A rank key is an int64 whose high half is the score as an order-preserving int32 and whose low half falls with the
chunk id, so that keys are unique and any top-k over them is exact and deterministic.
"""

from __future__ import annotations

import torch

LARGEST_ID = (1 << 31) - 1
NOTHING = torch.iinfo(torch.int64).min


def lightning_scores_reference(q_BHI: torch.Tensor, w_BH: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores [B, N] of keys [B, N, I] (one set per query) or [N, I] (shared by all queries)."""
    batch, heads, dim = q_BHI.shape
    if keys.dim() == 2:
        dots_BHN = (q_BHI.float().reshape(batch * heads, dim) @ keys.float().T).view(batch, heads, -1)
    else:
        dots_BHN = q_BHI.float() @ keys.float().transpose(1, 2)
    return torch.bmm(w_BH.float()[:, None], dots_BHN.relu_())[:, 0]


def rank_keys(scores_BN: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Rank keys [B, N] of chunks `ids`, `NOTHING` where not valid; both broadcast. In place: passes are the cost."""
    bits = (scores_BN + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 one score
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys = bits.to(torch.int64)
    keys <<= 32
    keys |= LARGEST_ID - ids
    return keys.masked_fill_(~valid, NOTHING)


def merge_best(best_BK: torch.Tensor, keys_BN: torch.Tensor) -> torch.Tensor:
    return torch.cat((best_BK, keys_BN), dim=1).topk(best_BK.shape[1], dim=1).values


def pick_ids(keys_BK: torch.Tensor) -> torch.Tensor:
    return torch.where(keys_BK == NOTHING, -1, LARGEST_ID - (keys_BK & 0xFFFFFFFF))
