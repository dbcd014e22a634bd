"""Window pooling in one Triton kernel: each value is read once.

Shape letters: N = windows, R = slots of a window, D = channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_SLOTS = 256
BLOCK_CHANNELS = 64


def compress_fused(kv_NRD: torch.Tensor, gate_NRD: torch.Tensor) -> torch.Tensor:
    windows, slots, channels = kv_NRD.shape
    if slots > MOST_SLOTS:
        raise ValueError(f"{slots} slots; the fused kernel takes at most {MOST_SLOTS}")
    out_ND = kv_NRD.new_empty(windows, channels)
    _compress_kernel[(windows, triton.cdiv(channels, BLOCK_CHANNELS))](
        kv_NRD.contiguous(), gate_NRD.contiguous(), out_ND, SLOTS=slots, CHANNELS=channels,
        BLOCK_SLOTS=triton.next_power_of_2(slots), BLOCK_CHANNELS=BLOCK_CHANNELS,
    )  # fmt: skip
    return out_ND


@triton.jit
def _compress_kernel(
    kv_ptr, gate_ptr, out_ptr, SLOTS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK_SLOTS)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    at = window * (SLOTS * CHANNELS) + slots[:, None] * CHANNELS + channels[None, :]
    inside = (slots < SLOTS)[:, None] & (channels < CHANNELS)[None, :]
    gate = tl.load(gate_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    kv = tl.load(kv_ptr + at, mask=inside, other=0.0).to(tl.float32)
    peak = tl.max(gate, axis=0)
    weights = tl.exp(gate - tl.where(peak == float("-inf"), 0.0, peak)[None, :])
    pooled = tl.sum(kv * weights, axis=0) / tl.sum(weights, axis=0)
    out = out_ptr + window * CHANNELS + channels
    tl.store(out, pooled.to(out_ptr.dtype.element_ty), mask=channels < CHANNELS)


__all__ = ["compress_fused"]
