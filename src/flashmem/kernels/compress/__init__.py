"""Pool the tokens of a window into one entry: per channel, a softmax-gated mean.

Shape letters: N = windows, R = slots of a window (8 for CSA: the previous window's Ca, then this window's Cb; 128 for
HCA), D = channels.
"""

from __future__ import annotations

from typing import Literal

import torch

from .reference import compress_reference

Impl = Literal["reference", "fused"]


def compress(kv_NRD: torch.Tensor, gate_NRD: torch.Tensor, *, impl: Impl | None = None) -> torch.Tensor:
    """Return pooled entries [N, D] in kv's dtype; a gate of -inf removes its slot (each channel needs one finite gate).

    Source: DeepSeek-V4 report, equations 9-12 and 20-23. Softmax and sum run in float32. The fused version (Triton)
    takes at most 256 slots.
    """
    if kv_NRD.shape != gate_NRD.shape:
        raise ValueError(f"kv {tuple(kv_NRD.shape)} and gate {tuple(gate_NRD.shape)} differ in shape")
    impl = impl or "reference"
    if impl == "reference" or (impl == "fused" and not kv_NRD.numel()):
        return compress_reference(kv_NRD, gate_NRD)
    if impl == "fused":
        from .fused import compress_fused  # needs triton

        return compress_fused(kv_NRD, gate_NRD)
    raise ValueError(f"unknown impl {impl!r}; choose 'reference' or 'fused'")


__all__ = ["compress"]
