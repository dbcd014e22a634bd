"""Pool the tokens of a window into one entry: per channel, a softmax-gated mean.

Shape letters: N = windows, R = slots of a window (8 for CSA: the previous window's Ca, then this window's Cb; 128 for
HCA), D = channels.
"""

from __future__ import annotations

import torch

from .reference import compress_reference


def compress(kv_NRD: torch.Tensor, gate_NRD: torch.Tensor) -> torch.Tensor:
    """Return pooled entries [N, D] in kv's dtype; a gate of -inf removes its slot (each channel needs one finite gate).

    Source: DeepSeek-V4 report, equations 9-12 and 20-23. Softmax and sum run in float32.
    """
    if kv_NRD.shape != gate_NRD.shape:
        raise ValueError(f"kv {tuple(kv_NRD.shape)} and gate {tuple(gate_NRD.shape)} differ in shape")
    return compress_reference(kv_NRD, gate_NRD)


__all__ = ["compress"]
