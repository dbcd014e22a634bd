"""The definition of pooling in place."""

from __future__ import annotations

import torch

from ..compress import compress


def pool_in_place_reference(
    kv_PSC: torch.Tensor,
    gate_PSC: torch.Tensor,
    new_kv_BC: torch.Tensor,
    new_gate_BC: torch.Tensor,
    bias_TC: torch.Tensor,
    rows_B: torch.Tensor,
    positions_B: torch.Tensor,
) -> torch.Tensor:
    slots, tokens = kv_PSC.shape[1], len(bias_TC)
    windows = slots // tokens
    kv_PSC[rows_B, positions_B % slots] = new_kv_BC
    gate_PSC[rows_B, positions_B % slots] = new_gate_BC
    at_BS = positions_B[:, None] + torch.arange(1 - slots, 1, device=positions_B.device)
    gone_BS1, pick = (at_BS < 0)[..., None], (rows_B[:, None], at_BS % slots)
    gate_BSC = (gate_PSC[pick].float() + bias_TC.repeat(windows, 1)).masked_fill(gone_BS1, float("-inf"))
    kv_BSC = kv_PSC[pick].masked_fill(gone_BS1, 0)
    entries_BD = compress(_series(kv_BSC, windows), _series(gate_BSC, windows))
    complete_B1 = ((positions_B + 1) % tokens == 0)[:, None]
    return torch.where(complete_B1, entries_BD, 0)


def _series(x_BSC: torch.Tensor, windows: int) -> torch.Tensor:
    """The first series of channels of the first window's tokens, the second of the second's: [B, S, D]."""
    of_window = zip(x_BSC.chunk(windows, dim=1), range(windows), strict=True)
    return torch.cat([window.chunk(windows, dim=2)[series] for window, series in of_window], dim=1)
