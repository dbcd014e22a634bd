"""The definition of window pooling."""

from __future__ import annotations

import torch


def compress_reference(kv_NRD: torch.Tensor, gate_NRD: torch.Tensor) -> torch.Tensor:
    weights_NRD = gate_NRD.float().softmax(dim=1)
    return (kv_NRD.float() * weights_NRD).sum(dim=1).to(kv_NRD.dtype)
