"""The definition of hyper-connections.

Shape letters: B = tokens, N = streams, E = hidden size, O = (2 + N) N weights of a token: pre N, post N, comb N x N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Connection:
    """What a layer has learned about one of its blocks' streams, and the norm in front of that block."""

    fn_OF: torch.Tensor
    """Weights from all channels of all streams, [O, N * E]."""
    base_O: torch.Tensor
    scale_3: torch.Tensor
    """Of pre, post and comb."""
    norm_weight_E: torch.Tensor
    streams_eps: float
    """Added to the mean square of all channels of all streams."""
    mix_eps: float
    """Added to pre, to comb before Sinkhorn, and to Sinkhorn's sums."""
    norm_eps: float
    sinkhorn_iterations: int

    def check(self, num_streams: int, hidden_size: int) -> None:
        """Raise ValueError unless this fits so many streams."""
        outputs = (2 + num_streams) * num_streams
        for name, tensor, shape in (
            ("fn", self.fn_OF, (outputs, num_streams * hidden_size)),
            ("base", self.base_O, (outputs,)),
            ("scale", self.scale_3, (3,)),
            ("norm_weight", self.norm_weight_E, (hidden_size,)),
        ):
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} must be {shape} for {num_streams} streams of {hidden_size}, got {tuple(tensor.shape)}"
                )
        if self.sinkhorn_iterations < 1:
            raise ValueError(f"sinkhorn_iterations must be positive, got {self.sinkhorn_iterations}")


def collapse_reference(streams_BNE: torch.Tensor, c: Connection) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, num_streams, hidden = streams_BNE.shape
    flat_BF = streams_BNE.float().reshape(batch, num_streams * hidden)
    mixes_BO = normalised(flat_BF, c.streams_eps) @ c.fn_OF.float().T
    lengths = [num_streams, num_streams, num_streams * num_streams]
    parts = zip(mixes_BO.split(lengths, dim=1), c.scale_3, c.base_O.split(lengths), strict=True)
    pre_BN, post_BN, comb_BK = (mix * scale.float() + base.float() for mix, scale, base in parts)
    pre_BN, post_BN = pre_BN.sigmoid() + c.mix_eps, 2 * post_BN.sigmoid()
    comb_BNN = sinkhorn(comb_BK.unflatten(1, (num_streams, num_streams)), c.mix_eps, c.sinkhorn_iterations)
    collapsed_BE = (pre_BN[:, :, None] * streams_BNE.float()).sum(dim=1).to(streams_BNE.dtype)
    normed_BE = c.norm_weight_E.float() * normalised(collapsed_BE.float(), c.norm_eps)
    return post_BN, comb_BNN, normed_BE.to(streams_BNE.dtype)


def spread_reference(
    out_BE: torch.Tensor, post_BN: torch.Tensor, comb_BNN: torch.Tensor, streams_BNE: torch.Tensor
) -> torch.Tensor:
    dtype = streams_BNE.dtype
    post_BN, comb_BNN = post_BN.to(dtype).float(), comb_BNN.to(dtype).float()
    # the sum is over the first axis of comb, which is not symmetric
    mixed_BNE = comb_BNN.transpose(1, 2) @ streams_BNE.float()
    return (post_BN[:, :, None] * out_BE.float()[:, None] + mixed_BNE).to(dtype)


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Rows of mean square one."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def sinkhorn(logits_BNN: torch.Tensor, eps: float, iterations: int) -> torch.Tensor:
    """Matrices whose rows and columns nearly sum to one: rows by softmax, then columns and rows by turns."""
    comb_BNN = logits_BNN.softmax(dim=2) + eps
    for iteration in range(iterations):
        if iteration:
            comb_BNN = comb_BNN / (comb_BNN.sum(dim=2, keepdim=True) + eps)
        comb_BNN = comb_BNN / (comb_BNN.sum(dim=1, keepdim=True) + eps)
    return comb_BNN


__all__ = ["Connection", "collapse_reference", "spread_reference"]
