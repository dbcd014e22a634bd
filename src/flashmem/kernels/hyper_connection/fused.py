"""Hyper-connections in three small Triton kernels, for few tokens.

The weights from all channels (`fn`) are the bytes that count: many programs take a share of the channels each, and
leave partial sums behind. A second kernel adds them up, in two programs per token at once: one collapses the streams
and normalises the result, one makes post and comb, of which Sinkhorn is a long chain of tiny steps. The third spreads.

Shape letters: B = tokens, N = streams, E = hidden size, O = (2 + N) N weights of a token, C = shares of the channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import MOST_HIDDEN, MOST_STREAMS
from .reference import Connection

MOST_SHARES = 256
LEAST_CHANNELS = 128
"""Of one share: at V4-Flash's size there are then about as many shares as a Hopper device has multiprocessors."""
SHARED_TOKENS = 8
"""Tokens that one program multiplies with the weights it holds."""
SPREAD_CHANNELS = 512


def collapse_fused(streams_BNE: torch.Tensor, c: Connection) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, num_streams, hidden = streams_BNE.shape
    _check_sizes(num_streams, hidden)
    streams_BNE, outputs, channels = streams_BNE.contiguous(), len(c.base_O), num_streams * hidden
    block = max(LEAST_CHANNELS, triton.next_power_of_2(channels) // MOST_SHARES)
    shares = triton.cdiv(channels, block)
    tokens = min(SHARED_TOKENS, triton.next_power_of_2(batch))
    block_outputs = triton.next_power_of_2(outputs + 1)
    partial_BOC = streams_BNE.new_empty(batch, outputs + 1, shares, dtype=torch.float32)
    _project_kernel[(triton.cdiv(batch, tokens), shares)](
        streams_BNE, c.fn_OF.contiguous(), partial_BOC, batch, CHANNELS=channels, OUTPUTS=outputs, SHARES=shares,
        TOKENS=tokens, BLOCK_OUTPUTS=block_outputs, BLOCK_CHANNELS=block,
        num_warps=min(16, max(4, block_outputs * block // 1024)),
    )  # fmt: skip
    post_BN = partial_BOC.new_empty(batch, num_streams)
    comb_BNN = partial_BOC.new_empty(batch, num_streams, num_streams)
    normed_BE = streams_BNE.new_empty(batch, hidden)
    block_streams, block_hidden = triton.next_power_of_2(num_streams), triton.next_power_of_2(hidden)
    _finish_kernel[(batch, 2)](
        streams_BNE, partial_BOC, c.base_O.contiguous(), c.scale_3.contiguous(), c.norm_weight_E.contiguous(),
        post_BN, comb_BNN, normed_BE, c.streams_eps, c.mix_eps, c.norm_eps,
        ITERATIONS=c.sinkhorn_iterations, STREAMS=num_streams, HIDDEN=hidden, OUTPUTS=outputs, SHARES=shares,
        BLOCK_STREAMS=block_streams, BLOCK_HIDDEN=block_hidden, BLOCK_SHARES=triton.next_power_of_2(shares),
        num_warps=min(16, max(4, block_streams * block_hidden // 2048)),
    )  # fmt: skip
    return post_BN, comb_BNN, normed_BE


def spread_fused(
    out_BE: torch.Tensor, post_BN: torch.Tensor, comb_BNN: torch.Tensor, streams_BNE: torch.Tensor
) -> torch.Tensor:
    batch, num_streams, hidden = streams_BNE.shape
    _check_sizes(num_streams, hidden)
    new_BNE = torch.empty_like(streams_BNE, memory_format=torch.contiguous_format)
    _spread_kernel[(batch, num_streams, triton.cdiv(hidden, SPREAD_CHANNELS))](
        out_BE.contiguous(), post_BN.contiguous(), comb_BNN.contiguous(), streams_BNE.contiguous(), new_BNE,
        STREAMS=num_streams, HIDDEN=hidden, BLOCK_CHANNELS=SPREAD_CHANNELS,
    )  # fmt: skip
    return new_BNE


def _check_sizes(num_streams: int, hidden: int) -> None:
    if num_streams > MOST_STREAMS or hidden > MOST_HIDDEN:
        raise ValueError(
            f"{num_streams} streams of {hidden} channels; the fused kernel takes at most {MOST_STREAMS} of "
            f"{MOST_HIDDEN}"
        )


@triton.jit
def _project_kernel(
    streams_ptr, fn_ptr, partial_ptr, batch,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, SHARES: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One share of the channels for a few tokens: products with every row of fn, and the sum of squares after them."""
    share = tl.program_id(1)
    outputs = tl.arange(0, BLOCK_OUTPUTS)
    channels = share * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    fn = tl.load(
        fn_ptr + outputs[:, None] * CHANNELS + channels[None, :],
        mask=(outputs < OUTPUTS)[:, None] & (channels < CHANNELS)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    for token in range(TOKENS):
        # as a block: the interpreter takes no mask that is made with a scalar
        b = tl.program_id(0) * TOKENS + token + tl.zeros([BLOCK_CHANNELS], tl.int64)
        x = tl.load(streams_ptr + b * CHANNELS + channels, mask=(b < batch) & (channels < CHANNELS), other=0.0)
        x = x.to(tl.float32)[None, :]
        sums = tl.sum(x * tl.where((outputs == OUTPUTS)[:, None], x, fn), axis=1)
        at = tl.program_id(0) * TOKENS + token + tl.zeros([BLOCK_OUTPUTS], tl.int64)
        target = partial_ptr + (at * (OUTPUTS + 1) + outputs) * SHARES + share
        tl.store(target, sums, mask=(at < batch) & (outputs <= OUTPUTS))


@triton.jit
def _finish_kernel(
    streams_ptr, partial_ptr, base_ptr, scale_ptr, norm_ptr, post_ptr, comb_ptr, normed_ptr,
    streams_eps, mix_eps, norm_eps,
    ITERATIONS: tl.constexpr, STREAMS: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_STREAMS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_SHARES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    partial = partial_ptr + b * ((OUTPUTS + 1) * SHARES)
    streams = tl.arange(0, BLOCK_STREAMS)
    inside = streams < STREAMS
    if tl.program_id(1) == 0:
        _collapse(
            streams_ptr + b * (STREAMS * HIDDEN), partial, base_ptr, scale_ptr, norm_ptr, normed_ptr + b * HIDDEN,
            streams_eps, mix_eps, norm_eps, streams, inside,
            STREAMS, HIDDEN, OUTPUTS, SHARES, BLOCK_HIDDEN, BLOCK_SHARES,
        )  # fmt: skip
    else:
        post = _mixes(
            partial, base_ptr, tl.load(scale_ptr + 1), streams_eps, STREAMS + streams, inside,
            STREAMS, HIDDEN, OUTPUTS, SHARES, BLOCK_SHARES,
        )  # fmt: skip
        tl.store(post_ptr + b * STREAMS + streams, 2 * tl.sigmoid(post), mask=inside)
        flat = tl.arange(0, BLOCK_STREAMS * BLOCK_STREAMS)
        row = flat // BLOCK_STREAMS
        column = flat % BLOCK_STREAMS
        logits = _mixes(
            partial, base_ptr, tl.load(scale_ptr + 2), streams_eps, 2 * STREAMS + row * STREAMS + column,
            (row < STREAMS) & (column < STREAMS), STREAMS, HIDDEN, OUTPUTS, SHARES, BLOCK_SHARES,
        )  # fmt: skip
        logits = tl.reshape(logits, [BLOCK_STREAMS, BLOCK_STREAMS])
        comb = _sinkhorn(logits, inside, mix_eps, ITERATIONS)
        target = comb_ptr + b * (STREAMS * STREAMS) + streams[:, None] * STREAMS + streams[None, :]
        tl.store(target, comb, mask=inside[:, None] & inside[None, :])


@triton.jit
def _collapse(
    streams_ptr, partial, base_ptr, scale_ptr, norm_ptr, normed_ptr, streams_eps, mix_eps, norm_eps, streams, inside,
    STREAMS: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, BLOCK_SHARES: tl.constexpr,
):  # fmt: skip
    """Collapse one token's streams and normalise the result."""
    channels = tl.arange(0, BLOCK_HIDDEN)
    live = channels < HIDDEN
    # asked for first: they arrive while the weights are made
    x = tl.load(
        streams_ptr + streams[:, None] * HIDDEN + channels[None, :], mask=inside[:, None] & live[None, :], other=0.0
    )
    norm = tl.load(norm_ptr + channels, mask=live, other=0.0).to(tl.float32)
    pre = _mixes(
        partial, base_ptr, tl.load(scale_ptr), streams_eps, streams, inside,
        STREAMS, HIDDEN, OUTPUTS, SHARES, BLOCK_SHARES,
    )  # fmt: skip
    collapsed = tl.sum((tl.sigmoid(pre) + mix_eps)[:, None] * x.to(tl.float32), axis=0)
    collapsed = collapsed.to(normed_ptr.dtype.element_ty).to(tl.float32)  # a block's input is, before its norm
    square = tl.sum(collapsed * collapsed, axis=0) / HIDDEN
    normed = norm * (collapsed * tl.rsqrt(square + norm_eps))
    tl.store(normed_ptr + channels, normed.to(normed_ptr.dtype.element_ty), mask=live)


@triton.jit
def _sinkhorn(logits, inside, eps, ITERATIONS: tl.constexpr):
    """Rows by softmax, then columns and rows by turns; rows and columns of padding stay zero."""
    within = inside[:, None] & inside[None, :]
    peak = tl.max(tl.where(within, logits, float("-inf")), axis=1)
    comb = tl.exp(logits - tl.where(inside, peak, 0.0)[:, None])
    comb = tl.where(within, comb, 0.0)
    padding = tl.where(inside, 0.0, 1.0)  # added to sums: zero by zero is NaN
    comb = comb / (tl.sum(comb, axis=1) + padding)[:, None]
    comb = tl.where(within, comb + eps, 0.0)
    padding += eps
    comb = comb / (tl.sum(comb, axis=0) + padding)[None, :]
    for _ in range(ITERATIONS - 1):
        comb = comb / (tl.sum(comb, axis=1) + padding)[:, None]
        comb = comb / (tl.sum(comb, axis=0) + padding)[None, :]
    return comb


@triton.jit
def _mixes(
    partial, base_ptr, scale, eps, outputs, inside,
    STREAMS: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
):  # fmt: skip
    """Weights `outputs` of a token before their sigmoid or softmax, zero where not `inside`."""
    shares = tl.arange(0, BLOCK_SHARES)
    squares = tl.load(partial + OUTPUTS * SHARES + shares, mask=shares < SHARES, other=0.0)
    sums = tl.load(
        partial + outputs[:, None] * SHARES + shares[None, :],
        mask=inside[:, None] & (shares < SHARES)[None, :], other=0.0,
    )  # fmt: skip
    base = tl.load(base_ptr + outputs, mask=inside, other=0.0).to(tl.float32)
    normaliser = tl.rsqrt(tl.sum(squares, axis=0) / (STREAMS * HIDDEN) + eps)
    mixes = tl.sum(sums, axis=1) * normaliser * scale.to(tl.float32) + base
    # all of them to every warp: where the sums were made each warp has some, and whatever is made of them (Sinkhorn's
    # sums, the streams that they weight) would be laid out likewise, with barriers all along
    return tl.gather(mixes, tl.arange(0, mixes.shape[0]), axis=0)


@triton.jit
def _spread_kernel(
    out_ptr, post_ptr, comb_ptr, streams_ptr, new_ptr,
    STREAMS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some channels of one new stream: the old ones are read once for each new one, from the cache."""
    b, stream = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dtype: tl.constexpr = new_ptr.dtype.element_ty
    channels = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channels < HIDDEN
    out = tl.load(out_ptr + b * HIDDEN + channels, mask=inside, other=0.0).to(tl.float32)
    new = tl.load(post_ptr + b * STREAMS + stream).to(dtype).to(tl.float32) * out
    for old in tl.static_range(STREAMS):
        weight = tl.load(comb_ptr + (b * STREAMS + old) * STREAMS + stream).to(dtype).to(tl.float32)
        x = tl.load(streams_ptr + (b * STREAMS + old) * HIDDEN + channels, mask=inside, other=0.0)
        new += weight * x.to(tl.float32)
    tl.store(new_ptr + (b * STREAMS + stream) * HIDDEN + channels, new.to(dtype), mask=inside)


__all__ = ["collapse_fused", "spread_fused"]
