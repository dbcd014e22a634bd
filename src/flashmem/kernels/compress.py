"""Pool the tokens of a window into one entry: per channel, a softmax-gated mean.

The definition; a decode step pools in the sessions' rings (`pool_in_place`). Shape letters: N = windows, R = slots of a
window (8 for CSA: the previous window's Ca, then this window's Cb; 128 for HCA), D = channels.
"""

from __future__ import annotations

import torch


def compress(kv_NRD: torch.Tensor, gate_NRD: torch.Tensor) -> torch.Tensor:
    """Return pooled entries [N, D] in kv's dtype; a gate of -inf removes its slot (each channel needs one finite gate).

    Source: DeepSeek-V4 report, equations 9-12 and 20-23. Softmax and sum run in float32.
    """
    if kv_NRD.shape != gate_NRD.shape:
        raise ValueError(f"kv {tuple(kv_NRD.shape)} and gate {tuple(gate_NRD.shape)} differ in shape")
    weights_NRD = gate_NRD.float().softmax(dim=1)
    return (kv_NRD.float() * weights_NRD).sum(dim=1).to(kv_NRD.dtype)


__all__ = ["compress"]
