"""Pooling in place in one Triton kernel: a program writes and pools some channels of one session.

No program reads what another one writes: it owns its channels in all slots and series, and takes the newest token from
where it came. Shape letters: B = sessions, P = rows of the pool, T = tokens of a window, S = slots, D = channels of an
entry, C = channels of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_SLOTS = 256
VALUES = 2048
"""Of a ring, per program: a session alone must fill many multiprocessors, and a row's piece a sector of memory."""


def pool_in_place_fused(
    kv_PSC: torch.Tensor,
    gate_PSC: torch.Tensor,
    new_kv_BC: torch.Tensor,
    new_gate_BC: torch.Tensor,
    bias_TC: torch.Tensor,
    rows_B: torch.Tensor,
    positions_B: torch.Tensor,
) -> torch.Tensor:
    (_, slots, width), tokens, batch = kv_PSC.shape, len(bias_TC), len(rows_B)
    if slots > MOST_SLOTS:
        raise ValueError(f"{slots} slots; the fused kernel takes at most {MOST_SLOTS}")
    if not (kv_PSC.is_contiguous() and gate_PSC.is_contiguous()):
        raise ValueError(f"rings are written in place and must be contiguous, got strides {kv_PSC.stride()}")
    channels, block_slots = width * tokens // slots, triton.next_power_of_2(slots)
    out_BD = kv_PSC.new_empty(batch, channels)
    if not out_BD.numel():
        return out_BD
    block_channels = min(64, max(16, VALUES // block_slots))
    _pool_kernel[(batch, triton.cdiv(channels, block_channels))](
        kv_PSC, gate_PSC, new_kv_BC.contiguous(), new_gate_BC.contiguous(), bias_TC.contiguous(),
        rows_B.contiguous(), positions_B.contiguous(), out_BD,
        TOKENS=tokens, WINDOWS=slots // tokens, CHANNELS=channels, BLOCK_SLOTS=block_slots,
        BLOCK_CHANNELS=block_channels, num_warps=4 if block_slots > 16 else 2,
    )  # fmt: skip
    return out_BD


@triton.jit
def _pool_kernel(
    kv_ptr, gate_ptr, new_kv_ptr, new_gate_ptr, bias_ptr, rows_ptr, positions_ptr, out_ptr,
    TOKENS: tl.constexpr, WINDOWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = TOKENS * WINDOWS
    WIDTH: tl.constexpr = CHANNELS * WINDOWS
    b = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channels < CHANNELS
    ring = tl.load(rows_ptr + b) * (SLOTS * WIDTH)
    newest = tl.load(positions_ptr + b)
    place = ring + (newest % SLOTS) * WIDTH
    for series in tl.static_range(WINDOWS):
        at = series * CHANNELS + channels
        # after the loop, the last series: the one that the newest token's window pools
        new_kv = tl.load(new_kv_ptr + b * WIDTH + at, mask=inside, other=0.0)
        new_gate = tl.load(new_gate_ptr + b * WIDTH + at, mask=inside, other=0.0)
        tl.store(kv_ptr + place + at, new_kv, mask=inside)
        tl.store(gate_ptr + place + at, new_gate, mask=inside)
    pooled = tl.zeros([BLOCK_CHANNELS], tl.float32)
    if (newest + 1) % TOKENS == 0:
        token = tl.arange(0, BLOCK_SLOTS)
        is_newest = (token == SLOTS - 1)[:, None]
        older = (token < SLOTS - 1) & (newest - (SLOTS - 1) + token >= 0)
        older = older[:, None] & inside[None, :]
        channel = (token // TOKENS * CHANNELS)[:, None] + channels[None, :]
        live = (token < SLOTS)[:, None] & inside[None, :]
        bias = tl.load(bias_ptr + (token % TOKENS * WIDTH)[:, None] + channel, mask=live, other=0.0).to(tl.float32)
        oldest = ((newest + 1) % SLOTS).to(tl.int32)
        slot = ring + ((oldest + token) % SLOTS * WIDTH)[:, None] + channel
        gate = tl.load(gate_ptr + slot, mask=older, other=float("-inf"))
        kv = tl.load(kv_ptr + slot, mask=older, other=0.0)
        gate = tl.where(is_newest, new_gate[None, :], gate).to(tl.float32) + bias
        kv = tl.where(is_newest, new_kv[None, :], kv).to(tl.float32)
        weights = tl.exp(gate - tl.max(gate, axis=0)[None, :])
        pooled = tl.sum(kv * weights, axis=0) / tl.sum(weights, axis=0)
    tl.store(out_ptr + b * CHANNELS + channels, pooled.to(out_ptr.dtype.element_ty), mask=inside)


__all__ = ["pool_in_place_fused"]
