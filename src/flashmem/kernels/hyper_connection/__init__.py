"""Hyper-connections of a decode step: N residual streams become the one input of a block, and take up its output.

Shape letters: B = tokens, N = streams, E = hidden size, O = (2 + N) N weights of a token: pre N, post N, comb N x N.
"""

from __future__ import annotations

from typing import Literal

import torch

from .reference import Connection, collapse_reference, spread_reference

Impl = Literal["reference", "fused"]

MOST_STREAMS, MOST_HIDDEN = 8, 8192
"""That the fused version takes."""


def collapse(
    streams_BNE: torch.Tensor, connection: Connection, *, impl: Impl | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return post [B, N] and comb [B, N, N] (float32), and the block's input [B, E]: collapsed, rounded, normalised.

    Source: DeepSeek-V4 report, section 2.2; the norm is the RMSNorm in front of the block, rounded once. The fused
    version (Triton) takes at most MOST_STREAMS of MOST_HIDDEN channels. A token's result does not depend on the others.
    """
    if streams_BNE.ndim != 3 or not streams_BNE.is_floating_point():
        raise ValueError(f"streams must be floats [B, N, E], got {streams_BNE.dtype} {tuple(streams_BNE.shape)}")
    connection.check(*streams_BNE.shape[1:])
    impl = impl or "reference"
    if impl == "reference" or (impl == "fused" and not streams_BNE.numel()):
        return collapse_reference(streams_BNE, connection)
    if impl == "fused":
        from .fused import collapse_fused  # needs triton

        return collapse_fused(streams_BNE, connection)
    raise ValueError(f"unknown impl {impl!r}; choose 'reference' or 'fused'")


def spread(
    out_BE: torch.Tensor,
    post_BN: torch.Tensor,
    comb_BNN: torch.Tensor,
    streams_BNE: torch.Tensor,
    *,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Return new streams [B, N, E]: stream k gets post[k] of the block's output, and comb[j, k] of each old stream j.

    Both weights are rounded to the streams' dtype first; the sum runs in float32 and is rounded once.
    """
    batch, num_streams, hidden = streams_BNE.shape
    for name, tensor, shape in (
        ("out", out_BE, (batch, hidden)),
        ("post", post_BN, (batch, num_streams)),
        ("comb", comb_BNN, (batch, num_streams, num_streams)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} for {num_streams} streams of {hidden}, got {tuple(tensor.shape)}")
    if out_BE.dtype is not streams_BNE.dtype:
        raise ValueError(f"out is {out_BE.dtype}, the streams are {streams_BNE.dtype}")
    impl = impl or "reference"
    if impl == "reference" or (impl == "fused" and not streams_BNE.numel()):
        return spread_reference(out_BE, post_BN, comb_BNN, streams_BNE)
    if impl == "fused":
        from .fused import spread_fused  # needs triton

        return spread_fused(out_BE, post_BN, comb_BNN, streams_BNE)
    raise ValueError(f"unknown impl {impl!r}; choose 'reference' or 'fused'")


__all__ = ["MOST_HIDDEN", "MOST_STREAMS", "Connection", "collapse", "spread"]
