"""The scorer of one target layer: a hidden state in, a logit per chunk out.

Shape letters: B = batches with keys of their own, M = queries that share keys, E = hidden_size, R = q_rank,
H = heads, I = head_dim, N = chunks, C = I + 4 bytes of an index row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.index_rows import hadamard
from ..kernels.score_chunks import score_chunks
from .config import IndexerConfig
from .rope import apply_rope


class LayerScorer(nn.Module):
    """Dual encoder of one layer: the query side is here, the document side is the backbone's index key.

    Parameters keep the names and shapes of the published checkpoints: wq_a.weight [R, E], q_norm_weight [R],
    wq_b.weight [H*I, R], weights_proj.weight [H, E].
    """

    def __init__(self, config: IndexerConfig) -> None:
        super().__init__()
        self.config = config
        self.wq_a = nn.Linear(config.hidden_size, config.q_rank, bias=False)
        self.q_norm_weight = nn.Parameter(torch.ones(config.q_rank))
        self.wq_b = nn.Linear(config.q_rank, config.num_heads * config.head_dim, bias=False)
        self.weights_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)

    def queries(self, hidden_ME: torch.Tensor, positions_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 queries [M, H, I], after rotary embedding and Hadamard, and head weights [M, H].

        `hidden_ME` is the input of the layer's attention (after `input_layernorm`); computed in float32 whatever
        the dtype of weights and hidden states, but for the projections under autocast. Raises ValueError for a wrong
        shape or a position outside 0..2^24.
        """
        c = self.config
        if hidden_ME.dim() != 2 or hidden_ME.shape[1] != c.hidden_size or positions_M.shape != hidden_ME.shape[:1]:
            raise ValueError(
                f"hidden states must be [M, {c.hidden_size}] with positions [M], "
                f"got {tuple(hidden_ME.shape)} and {tuple(positions_M.shape)}"
            )
        x_ME = hidden_ME.float()
        a_MR = F.linear(x_ME, self.wq_a.weight.float()).float()
        a_MR = a_MR * torch.rsqrt(a_MR.square().mean(-1, keepdim=True) + c.rms_norm_eps) * self.q_norm_weight.float()
        q_MHI = F.linear(a_MR, self.wq_b.weight.float()).float().unflatten(-1, (c.num_heads, c.head_dim))
        if c.query_dtype == "bf16":
            q_MHI = q_MHI.bfloat16()
        q_MHI = hadamard(apply_rope(q_MHI, positions_M, c.rope))
        w_MH = F.linear(x_ME, self.weights_proj.weight.float()).float() * (c.head_dim**-0.5 * c.num_heads**-0.5)
        return q_MHI, w_MH

    def logits(self, hidden_BE: torch.Tensor, keys_BNC: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [B, N]: each hidden state against the keys of its own batch row.

        Keys are index rows, uint8 [B, N, I + 4], or the backbone's own index keys, floating point [B, N, I] and not
        yet rotated. The indexer's calibration offset is not in here (see `MemoryIndexer.combine`).
        """
        q_BHI, w_BH = self.queries(hidden_BE, positions_B)
        keys = keys_BNC if keys_BNC.dtype is torch.uint8 else hadamard(keys_BNC)
        return score_chunks(q_BHI.unsqueeze(1), keys, w_BH.unsqueeze(1)).squeeze(1)


__all__ = ["LayerScorer"]
