"""One token into the compressor rings of each session, and a pooled window of those whose token completes one.

Shape letters: B = sessions, P = rows of the pool of state, T = tokens of a window, N = windows of a ring (1 for HCA;
2 for CSA: the previous window's Ca, then the own one's Cb), S = slots of a ring (N x T), D = channels of an entry,
C = channels of a token (N x D).
"""

from __future__ import annotations

from typing import Literal

import torch

from .reference import pool_in_place_reference

Impl = Literal["reference", "fused"]


def pool_in_place(
    kv_PSC: torch.Tensor,
    gate_PSC: torch.Tensor,
    new_kv_BC: torch.Tensor,
    new_gate_BC: torch.Tensor,
    bias_TC: torch.Tensor,
    rows_B: torch.Tensor,
    positions_B: torch.Tensor,
    *,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Write each session's new token into its rings, by position, and return entries [B, D] as `compress` defines them.

    Rings are written in place: token `positions_B[b]` (int64, on the device, as `rows_B`) of the session in row
    `rows_B[b]` goes to slot position % S. A session whose window is not complete yet gets zeros, and its ring is not
    read. In the first window there is no previous one: tokens before position 0 have no part. The fused version
    (Triton) takes at most 256 slots.
    """
    (_, slots, width), tokens = kv_PSC.shape, len(bias_TC)
    windows, batch = slots // max(1, tokens), len(rows_B)
    if windows not in (1, 2) or windows * tokens != slots or width % windows or bias_TC.shape != (tokens, width):
        raise ValueError(
            f"a bias {tuple(bias_TC.shape)} does not fit rings {tuple(kv_PSC.shape)} of one or two windows"
        )
    if gate_PSC.shape != kv_PSC.shape or gate_PSC.dtype is not kv_PSC.dtype:
        raise ValueError(
            f"rings of kv {kv_PSC.dtype} {tuple(kv_PSC.shape)} and gate {gate_PSC.dtype} {tuple(gate_PSC.shape)} differ"
        )
    for new in (new_kv_BC, new_gate_BC):
        if new.shape != (batch, width) or new.dtype is not kv_PSC.dtype:
            raise ValueError(
                f"new tokens must be {kv_PSC.dtype} [{batch}, {width}], got {new.dtype} {tuple(new.shape)}"
            )
    for index in (rows_B, positions_B):
        if index.shape != (batch,) or index.dtype is not torch.int64:
            raise ValueError(f"rows and positions must be int64 [{batch}], got {index.dtype} {tuple(index.shape)}")
    impl = impl or "reference"
    if impl == "reference":
        return pool_in_place_reference(kv_PSC, gate_PSC, new_kv_BC, new_gate_BC, bias_TC, rows_B, positions_B)
    if impl == "fused":
        from .fused import pool_in_place_fused  # needs triton

        return pool_in_place_fused(kv_PSC, gate_PSC, new_kv_BC, new_gate_BC, bias_TC, rows_B, positions_B)
    raise ValueError(f"unknown impl {impl!r}; choose 'reference' or 'fused'")


__all__ = ["pool_in_place"]
