"""DeepSeek-V4's forward pass over a dict of parameters with their stock names, for training and for long evaluation.

All tokens of a batch run flattened through everything but the attention core, so that `torch.compile` sees the same
shapes at every row length. Weights keep their own dtype; matrix products run in `compute`, norms, softmax, hyper-
connections and routing in float32.

Shape letters: N = tokens of the batch (B rows of S), D = hidden, M = streams, H = heads, C = head_dim, W = window,
E = compressed entries of a row, I = index heads, J = index_dim, X = experts, F = expert width, K = rows per sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .recipe import Sizes

Params = Mapping[str, Tensor]
HIDDEN_LOGIT = -1e30
"""Logit of what must not be seen; finite, so that a row that sees nothing has no NaN."""


def parameter_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Stock names and shapes of all parameters."""
    s = sizes
    width = s.streams * s.hidden
    mixes = (2 + s.streams) * s.streams
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (s.vocab, s.hidden)}
    for index, kind in enumerate(s.layers):
        layer = {
            "self_attn.sinks": (s.heads,),
            "self_attn.q_a_proj.weight": (s.q_rank, s.hidden),
            "self_attn.q_a_norm.weight": (s.q_rank,),
            "self_attn.q_b_proj.weight": (s.heads * s.head_dim, s.q_rank),
            "self_attn.kv_proj.weight": (s.head_dim, s.hidden),
            "self_attn.kv_norm.weight": (s.head_dim,),
            "self_attn.o_a_proj.weight": (s.o_groups * s.o_rank, s.heads * s.head_dim // s.o_groups),
            "self_attn.o_b_proj.weight": (s.hidden, s.o_groups * s.o_rank),
            "mlp.gate.weight": (s.experts, s.hidden),
            "mlp.experts.gate_up_proj": (s.experts, 2 * s.expert_width, s.hidden),
            "mlp.experts.down_proj": (s.experts, s.hidden, s.expert_width),
            "mlp.shared_experts.gate_proj.weight": (s.expert_width, s.hidden),
            "mlp.shared_experts.up_proj.weight": (s.expert_width, s.hidden),
            "mlp.shared_experts.down_proj.weight": (s.hidden, s.expert_width),
            "input_layernorm.weight": (s.hidden,),
            "post_attention_layernorm.weight": (s.hidden,),
        }
        for part in ("attn_hc", "ffn_hc"):
            layer |= {f"{part}.fn": (mixes, width), f"{part}.base": (mixes,), f"{part}.scale": (3,)}
        if kind in "CH":
            layer |= _compressor_shapes("self_attn.compressor", s, s.head_dim, overlap=kind == "C")
        if kind == "C":
            indexer = "self_attn.compressor.indexer"
            layer |= _compressor_shapes(indexer, s, s.index_dim, overlap=True)
            layer |= {
                f"{indexer}.q_b_proj.weight": (s.index_heads * s.index_dim, s.q_rank),
                f"{indexer}.scorer.weights_proj.weight": (s.index_heads, s.hidden),
            }
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes | {
        "model.norm.weight": (s.hidden,),
        "model.hc_head.hc_fn": (s.streams, width),
        "model.hc_head.hc_base": (s.streams,),
        "model.hc_head.hc_scale": (1,),
        "lm_head.weight": (s.vocab, s.hidden),
    }


def _compressor_shapes(prefix: str, s: Sizes, dim: int, *, overlap: bool) -> dict[str, tuple[int, ...]]:
    width, ratio = (2 * dim, s.csa_ratio) if overlap else (dim, s.hca_ratio)
    return {
        f"{prefix}.position_bias": (ratio, width),
        f"{prefix}.kv_proj.weight": (width, s.hidden),
        f"{prefix}.gate_proj.weight": (width, s.hidden),
        f"{prefix}.kv_norm.weight": (dim,),
    }


def buffers(sizes: Sizes) -> dict[str, Tensor]:
    """What a checkpoint holds beside parameters: expert ids of every token, and zero correction biases.

    The hash sends token t to experts t mod X and its successors.
    """
    ids = torch.arange(sizes.vocab).unsqueeze(1) + torch.arange(sizes.experts_per_token)
    made: dict[str, Tensor] = {}
    for index in range(len(sizes.layers)):
        if index < sizes.hash_layers:
            made[f"model.layers.{index}.mlp.gate.tid2eid"] = ids % sizes.experts
        else:
            made[f"model.layers.{index}.mlp.gate.e_score_correction_bias"] = torch.zeros(sizes.experts)
    return made


def initial_parameters(sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """Float32 parameters: matrices with a standard deviation of fan-in to the power of -1/2, halved where they write
    to the streams."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(sizes).items():
        if name.endswith(("norm.weight", "layernorm.weight", "scale")):
            made[name] = torch.ones(shape)
        elif name.endswith(("base", "sinks", "position_bias")):
            made[name] = torch.zeros(shape)
        else:
            made[name] = torch.randn(shape, generator=generator) * _initial_std(name, shape)
    return made


def _initial_std(name: str, shape: tuple[int, ...]) -> float:
    root = shape[-1] ** -0.5
    if "embed_tokens" in name:
        return 0.3
    if name.endswith(("_hc.fn", "hc_fn")):
        return 0.01
    if name.endswith("mlp.gate.weight"):
        return 0.02
    if name.endswith(("compressor.gate_proj.weight", "indexer.gate_proj.weight")):
        return 0.3 * root
    if name.endswith(("o_b_proj.weight", "down_proj", "down_proj.weight", "lm_head.weight")):
        return 0.5 * root
    return root


def yarn_frequencies(sizes: Sizes) -> Tensor:
    """Inverse frequencies of the compress rope (YaRN with whole correction bounds, no attention scaling)."""
    dim, base, original = sizes.rope_dim, sizes.compress_theta, sizes.yarn_original
    plain = base ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if sizes.yarn_factor == 1:
        return plain

    def channel(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain / sizes.yarn_factor * ramp + plain * (1 - ramp)


def main_frequencies(sizes: Sizes) -> Tensor:
    return sizes.rope_theta ** -(torch.arange(0, sizes.rope_dim, 2, dtype=torch.float32) / sizes.rope_dim)


def rotations(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, rope_dim / 2] of flat positions."""
    angles = positions.reshape(-1, 1).float() * frequencies.to(positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last channels of [N, ..., C] pairwise (neighbours form a pair); cos and sin are [N, rope_dim / 2]."""
    while cos.dim() < x.dim():
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    still, moved = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    even, odd = moved.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((still, turned.to(x.dtype)), dim=-1)


def rms(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide if weight is None else wide * weight.float()


def project(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype))


def collapse(x_NMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, s: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Hyper-connection into a block: (write weights [N, M], stream mix [N, M, M], block input [N, D])."""
    M = s.streams
    mixes = F.linear(rms(x_NMD.flatten(1), s.norm_eps), fn.float())
    read, write, mix = mixes.split([M, M, M * M], dim=-1)
    read_b, write_b, mix_b = base.split([M, M, M * M])
    read = torch.sigmoid(read * scale[0] + read_b) + s.hc_eps
    write = 2 * torch.sigmoid(write * scale[1] + write_b)
    mix = torch.softmax((mix * scale[2] + mix_b).unflatten(-1, (M, M)), dim=-1) + s.hc_eps
    mix = mix / (mix.sum(-2, keepdim=True) + s.hc_eps)
    for _ in range(s.sinkhorn - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + s.hc_eps)
        mix = mix / (mix.sum(-2, keepdim=True) + s.hc_eps)
    return write, mix, (read.unsqueeze(-1) * x_NMD).sum(1)


def expand(x_NMD: Tensor, out_ND: Tensor, write: Tensor, mix: Tensor) -> Tensor:
    """Hyper-connection out of a block: every stream gets its share of the output and a mix of all streams."""
    mixed = (mix.unsqueeze(-1) * x_NMD.unsqueeze(2)).sum(1)
    return write.unsqueeze(-1) * out_ND.float().unsqueeze(1) + mixed


def compress(
    h_ND: Tensor, p: Params, ratio: int, s: Sizes, first: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
) -> Tensor:
    """Pool every `ratio` tokens into one entry [N / ratio, dim], normed and rotated to its first token's position.

    Where the projection is twice as wide as the norm, windows overlap: the first half of a token's channels goes to
    the next entry, the second half to its own. `first` [N / ratio] marks the first entry of a row.
    """
    dim = p["kv_norm.weight"].shape[0]
    kv = project(h_ND, p["kv_proj.weight"], dtype).unflatten(0, (-1, ratio))
    gate = project(h_ND, p["gate_proj.weight"], dtype).float().unflatten(0, (-1, ratio)) + p["position_bias"].float()
    if kv.shape[-1] == 2 * dim:
        before = gate[..., :dim].roll(1, 0).masked_fill(first.view(-1, 1, 1), HIDDEN_LOGIT)
        gate = torch.cat((before, gate[..., dim:]), dim=1)
        kv = torch.cat((kv[..., :dim].roll(1, 0), kv[..., dim:]), dim=1)
    pooled = rms((kv.float() * gate.softmax(1)).sum(1), s.norm_eps, p["kv_norm.weight"])
    return rotate(pooled, cos[::ratio], sin[::ratio]).to(dtype)


@dataclass(slots=True)
class Projected:
    """What a layer's first half hands to attention and to its second half."""

    write: Tensor
    mix: Tensor
    h_ND: Tensor
    low_NQ: Tensor
    """The query's low-rank part, which the Lightning Indexer shares."""
    q_NHC: Tensor
    kv_NC: Tensor
    entries_EC: Tensor | None
    keys_EJ: Tensor | None


def project_layer(
    x_NMD: Tensor, p: Params, kind: str, s: Sizes, cos: Tensor, sin: Tensor, first: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Everything before attention: fields of `Projected` in order."""
    write, mix, x = collapse(x_NMD, p["attn_hc.fn"], p["attn_hc.base"], p["attn_hc.scale"], s)
    h = rms(x, s.norm_eps, p["input_layernorm.weight"]).to(dtype)
    low = rms(project(h, p["self_attn.q_a_proj.weight"], dtype), s.norm_eps, p["self_attn.q_a_norm.weight"]).to(dtype)
    q = rms(project(low, p["self_attn.q_b_proj.weight"], dtype).unflatten(-1, (s.heads, s.head_dim)), s.norm_eps)
    kv = rms(project(h, p["self_attn.kv_proj.weight"], dtype), s.norm_eps, p["self_attn.kv_norm.weight"])
    q, kv = rotate(q, cos, sin).to(dtype), rotate(kv, cos, sin).to(dtype)
    entries = keys = None
    if kind in "CH":
        assert first is not None
        ratio = s.csa_ratio if kind == "C" else s.hca_ratio
        entries = compress(h, _under(p, "self_attn.compressor."), ratio, s, first, cos, sin, dtype)
    if kind == "C":  # the indexer learns from distillation alone: its input is detached
        assert first is not None
        indexer = _under(p, "self_attn.compressor.indexer.")
        keys = compress(h.detach(), indexer, s.csa_ratio, s, first, cos, sin, dtype)
    return write, mix, h, low, q, kv, entries, keys


def finish_layer(
    x_NMD: Tensor, o_NHC: Tensor, write: Tensor, mix: Tensor, p: Params, experts_of: Tensor | None, s: Sizes,
    cos: Tensor, sin: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Everything after attention: output projection, then the mixture of experts. `experts_of` [N, k] is the hash."""
    N = o_NHC.shape[0]
    o = rotate(o_NHC, cos, -sin).reshape(N, s.o_groups, -1).transpose(0, 1).to(dtype)
    o_a = p["self_attn.o_a_proj.weight"].to(dtype).view(s.o_groups, s.o_rank, -1)
    low = torch.bmm(o, o_a.transpose(1, 2)).transpose(0, 1).reshape(N, -1)
    x_NMD = expand(x_NMD, project(low, p["self_attn.o_b_proj.weight"], dtype), write, mix)
    write, mix, x = collapse(x_NMD, p["ffn_hc.fn"], p["ffn_hc.base"], p["ffn_hc.scale"], s)
    h = rms(x, s.norm_eps, p["post_attention_layernorm.weight"])
    return expand(x_NMD, mixture(h, p, experts_of, s, dtype), write, mix)


def mixture(h_ND: Tensor, p: Params, experts_of: Tensor | None, s: Sizes, dtype: torch.dtype) -> Tensor:
    """All experts for all tokens, those not chosen with weight zero: cheapest for a handful of small experts."""
    scores = torch.sqrt(F.softplus(F.linear(h_ND, p["mlp.gate.weight"].float())))
    if experts_of is None:
        biased = scores.detach() + p["mlp.gate.e_score_correction_bias"]
        experts_of = biased.topk(s.experts_per_token, dim=-1).indices
    chosen = scores * torch.zeros_like(scores).scatter(-1, experts_of, 1.0)
    chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * s.routed_scaling
    N, width = h_ND.shape[0], s.expert_width
    both = project(h_ND, p["mlp.experts.gate_up_proj"].flatten(0, 1), dtype).view(N, s.experts, 2 * width)
    act = F.silu(both[..., :width].clamp(max=s.swiglu_limit))
    act = act * both[..., width:].clamp(-s.swiglu_limit, s.swiglu_limit)
    act = (act.float() * chosen.unsqueeze(-1)).to(dtype).flatten(1)
    down = p["mlp.experts.down_proj"].to(dtype).transpose(1, 2).flatten(0, 1)
    gate = project(h_ND, p["mlp.shared_experts.gate_proj.weight"], dtype).clamp(max=s.swiglu_limit)
    up = project(h_ND, p["mlp.shared_experts.up_proj.weight"], dtype).clamp(-s.swiglu_limit, s.swiglu_limit)
    return act @ down + project(F.silu(gate) * up, p["mlp.shared_experts.down_proj.weight"], dtype)


def attend(
    q_BSHC: Tensor, kv_BSC: Tensor, entries_BEC: Tensor | None, allowed: Tensor | None, sinks_H: Tensor, ratio: int,
    visible_B: Tensor | None, s: Sizes,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Window, entries and sink in one softmax: (output [B, S, H, C], log-sum-exp [B, S, H]).

    `allowed` [B, S, E] (bool) restricts the entries further than causality does; `visible_B` hides them all.
    """
    B, S, H, C = q_BSHC.shape
    W, scale, device = s.window, C**-0.5, q_BSHC.device
    blocks = S // W
    own = kv_BSC.view(B, blocks, W, C)
    near = torch.cat((F.pad(own[:, :-1], (0, 0, 0, 0, 1, 0)), own), dim=2).flatten(0, 1)
    local = (q_BSHC.reshape(B * blocks, W * H, C) @ near.transpose(1, 2)).view(B, blocks, W, H, 2 * W).float() * scale
    row = torch.arange(W, device=device).view(1, W, 1, 1)
    column = torch.arange(2 * W, device=device).view(1, 1, 1, -1) - W
    started = (torch.arange(blocks, device=device) > 0).view(-1, 1, 1, 1)
    local = local.masked_fill(~((column <= row) & (column > row - W) & ((column >= 0) | started)), HIDDEN_LOGIT)
    total = torch.logaddexp(local.logsumexp(-1).view(B, S, H), sinks_H.float())
    far = None
    if entries_BEC is not None:
        far = (q_BSHC.reshape(B, S * H, C) @ entries_BEC.transpose(1, 2)).view(B, S, H, -1).float() * scale
        ready = torch.arange(far.shape[-1], device=device) < ((torch.arange(S, device=device) + 1) // ratio).view(S, 1)
        seen = ready if allowed is None else ready & allowed
        if visible_B is not None:
            seen = seen & visible_B.view(B, 1, 1)
        far = far.masked_fill(~(seen.unsqueeze(-2)), HIDDEN_LOGIT)
        total = torch.logaddexp(total, far.logsumexp(-1))
    weights = torch.exp(local - total.view(B, blocks, W, H, 1)).to(q_BSHC.dtype)
    out = (weights.view(B * blocks, W * H, 2 * W) @ near).view(B, S, H, C)
    if far is not None and entries_BEC is not None:
        shares = torch.exp(far - total.unsqueeze(-1)).to(q_BSHC.dtype)
        out = out + (shares.view(B, S * H, -1) @ entries_BEC).view(B, S, H, C)
    return out, total


def index_scores(
    low_BKQ: Tensor, h_BKD: Tensor, keys_BEJ: Tensor, p: Params, cos: Tensor, sin: Tensor, s: Sizes, dtype: torch.dtype
) -> Tensor:
    """Lightning scores [B, K, E] of K queries per row; cos and sin belong to the queries, flat."""
    B, K, _ = low_BKQ.shape
    q = project(low_BKQ, p["self_attn.compressor.indexer.q_b_proj.weight"], dtype).view(B * K, s.index_heads, -1)
    q = rotate(q, cos, sin).to(dtype).view(B, K * s.index_heads, -1)
    dots = torch.relu((q @ keys_BEJ.transpose(1, 2)).float()).view(B, K, s.index_heads, -1) * s.index_dim**-0.5
    heads = project(h_BKD, p["self_attn.compressor.indexer.scorer.weights_proj.weight"], dtype).float()
    return (dots * (heads * s.index_heads**-0.5).unsqueeze(-1)).sum(2)


def pick(scores_BSE: Tensor, k: int, ratio: int) -> Tensor:
    """Bool [B, S, E]: entries among the k best that exist; ties with the k-th all count."""
    S, E = scores_BSE.shape[1:]
    device = scores_BSE.device
    ready = torch.arange(E, device=device) < ((torch.arange(S, device=device) + 1) // ratio).view(S, 1)
    masked = scores_BSE.masked_fill(~ready, float("-inf"))
    return masked >= masked.topk(min(k, E), dim=-1).values[..., -1:]


def distil(
    q_NHC: Tensor, entries_BEC: Tensor, total_NH: Tensor, low_NQ: Tensor, h_ND: Tensor, keys_BEJ: Tensor, p: Params,
    cos: Tensor, sin: Tensor, rows_BK: Tensor, visible_B: Tensor | None, s: Sizes, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """KL of the indexer's softmax from the heads' summed attention over entries, weighted by that attention's mass.

    Only the indexer gets gradients. Rows that do not see their entries teach nothing.
    """
    B, K = rows_BK.shape
    S, E = q_NHC.shape[0] // B, entries_BEC.shape[1]
    flat = (rows_BK + torch.arange(B, device=rows_BK.device).view(-1, 1) * S).reshape(-1)
    unborn = torch.arange(E, device=rows_BK.device) >= ((rows_BK + 1) // s.csa_ratio).unsqueeze(-1)
    with torch.no_grad():
        q = q_NHC[flat].view(B, K * s.heads, s.head_dim)
        logits = (q @ entries_BEC.transpose(1, 2)).float().view(B, K, s.heads, E) * s.head_dim**-0.5
        logits = logits.masked_fill(unborn.unsqueeze(2), HIDDEN_LOGIT)
        attention = torch.exp(logits - total_NH[flat].view(B, K, s.heads, 1)).sum(2)
        mass = attention.sum(-1)
        teacher = attention / mass.clamp_min(1e-6).unsqueeze(-1)
        weight = mass / s.heads
        if visible_B is not None:
            weight = weight * visible_B.view(B, 1)
    low, h = low_NQ.detach()[flat].view(B, K, -1), h_ND.detach()[flat].view(B, K, -1)
    scores = index_scores(low, h, keys_BEJ, p, cos[flat], sin[flat], s, dtype).masked_fill(unborn, HIDDEN_LOGIT)
    student = F.log_softmax(scores, dim=-1).masked_fill(unborn, 0.0)
    kl = (teacher * (teacher.clamp_min(1e-9).log() - student)).sum(-1)
    return (kl * weight).sum() / weight.sum().clamp_min(1e-6)


def read_out(x_NMD: Tensor, p: Params, s: Sizes, dtype: torch.dtype) -> Tensor:
    """Float32 logits of the given tokens."""
    mixes = F.linear(rms(x_NMD.flatten(1), s.norm_eps), p["model.hc_head.hc_fn"].float())
    share = torch.sigmoid(mixes * p["model.hc_head.hc_scale"].float() + p["model.hc_head.hc_base"].float()) + s.hc_eps
    x = (share.unsqueeze(-1) * x_NMD).sum(1)
    return project(rms(x, s.norm_eps, p["model.norm.weight"]), p["lm_head.weight"], dtype).float()


def _under(p: Params, prefix: str) -> dict[str, Tensor]:
    """Parameters below a prefix, without it."""
    return {name[len(prefix) :]: value for name, value in p.items() if name.startswith(prefix)}


class Backbone:
    """The forward pass over one set of parameters (and buffers); `compiled` wraps its parts with torch.compile."""

    def __init__(self, sizes: Sizes, params: Params, *, compute: torch.dtype, compiled: bool = False) -> None:
        self.sizes, self.params, self.compute = sizes, params, compute
        self.layers = [_under(params, f"model.layers.{index}.") for index in range(len(sizes.layers))]
        device = params["lm_head.weight"].device
        self.main, self.yarn = main_frequencies(sizes).to(device), yarn_frequencies(sizes).to(device)
        wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._project, self._finish, self._attend = wrap(project_layer), wrap(finish_layer), wrap(attend)
        self._distil, self._read_out, self._index = wrap(distil), wrap(read_out), wrap(index_scores)

    def embed(self, ids_N: Tensor) -> Tensor:
        """Streams [N, M, D] of flat token ids, float32."""
        x = F.embedding(ids_N, self.params["model.embed_tokens.weight"]).float()
        return x.unsqueeze(1).expand(-1, self.sizes.streams, -1).contiguous()

    def first_entries(self, kind: str, B: int, S: int, device: torch.device) -> Tensor | None:
        if kind == "S":
            return None
        per_row = S // (self.sizes.csa_ratio if kind == "C" else self.sizes.hca_ratio)
        return torch.arange(B * per_row, device=device) % per_row == 0

    def index(self, low_NQ: Tensor, h_ND: Tensor, keys_EJ: Tensor, p: Params, cos: Tensor, sin: Tensor) -> Tensor:
        """Lightning scores [N, E] of one row's queries."""
        batched = (low_NQ.unsqueeze(0), h_ND.unsqueeze(0), keys_EJ.unsqueeze(0))
        return index_scores(*batched, p, cos, sin, self.sizes, self.compute)[0]

    def forward(
        self, ids_BS: Tensor, rows_R: Tensor | None = None, *, positions_BS: Tensor | None = None,
        visible_BL: Tensor | None = None, kl_rows_BK: Tensor | None = None, topk: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Dense forward of B rows: (logits of the flat positions `rows_R`, mean indexer loss).

        S must be a multiple of the window and of both ratios. `topk` restricts CSA layers to the Lightning Indexer's
        picks; `visible_BL` hides a CSA layer's entries from a row.
        """
        s, dtype = self.sizes, self.compute
        B, S = ids_BS.shape
        device = ids_BS.device
        if S % max(s.window, s.csa_ratio, s.hca_ratio if "H" in s.layers else 1):
            raise ValueError(f"row length {S} must be a multiple of the window and the compress ratios")
        ids_N = ids_BS.reshape(-1)
        plain = torch.arange(S, device=device).expand(B, S)
        turn = {"S": rotations(plain, self.main)}
        turn["C"] = turn["H"] = rotations(plain if positions_BS is None else positions_BS, self.yarn)
        x = self.embed(ids_N)
        losses: list[Tensor] = []
        csa = 0
        for kind, p in zip(s.layers, self.layers, strict=True):
            cos, sin = turn[kind]
            first = self.first_entries(kind, B, S, device)
            part = Projected(*self._project(x, p, kind, s, cos, sin, first, dtype))
            entries = None if part.entries_EC is None else part.entries_EC.view(B, -1, s.head_dim)
            visible, allowed, ratio = None, None, s.hca_ratio
            if kind == "C":
                ratio, keys = s.csa_ratio, part.keys_EJ.view(B, -1, s.index_dim)  # type: ignore[union-attr]
                visible = None if visible_BL is None else visible_BL[:, csa]
                csa += 1
                if topk is not None and topk < keys.shape[1]:
                    with torch.no_grad():
                        low, h = part.low_NQ.view(B, S, -1), part.h_ND.view(B, S, -1)
                        allowed = pick(self._index(low, h, keys, p, cos, sin, s, dtype), topk, ratio)
            q = part.q_NHC.view(B, S, s.heads, s.head_dim)
            o, total = self._attend(
                q, part.kv_NC.view(B, S, -1), entries, allowed, p["self_attn.sinks"], ratio, visible, s
            )
            if kind == "C" and kl_rows_BK is not None and entries is not None:
                losses.append(
                    self._distil(
                        part.q_NHC.detach(), entries.detach(), total.detach().flatten(0, 1), part.low_NQ.detach(),
                        part.h_ND.detach(), keys, p, cos, sin, kl_rows_BK, visible, s, dtype,
                    )
                )  # fmt: skip
            hashed = p.get("mlp.gate.tid2eid")
            experts_of = None if hashed is None else hashed[ids_N]
            x = self._finish(x, o.flatten(0, 1), part.write, part.mix, p, experts_of, s, cos, sin, dtype)
        logits = self._read_out(x if rows_R is None else x[rows_R], self.params, s, dtype)
        return logits, torch.stack(losses).mean() if losses else logits.new_zeros(())


def answer_loss(logits_RV: Tensor, targets_RC: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
    """(loss [R], right [R]): minus the log of the probability of all right tokens together, and whether the best
    token is one of them. Targets of -1 are unused; loss is weighted, `right` is not."""
    everything = logits_RV.logsumexp(-1)
    unused = targets_RC < 0
    wanted = logits_RV.gather(1, targets_RC.clamp_min(0)).masked_fill(unused, HIDDEN_LOGIT).logsumexp(-1)
    best = logits_RV.argmax(-1, keepdim=True)
    return (everything - wanted) * weights_R, ((best == targets_RC) & ~unused).any(-1)


def hidden_layers(sizes: Sizes, visible: Sequence[int], rows: int, device: torch.device) -> Tensor:
    """`visible_BL` in which only the CSA layers with the given CSA indices see their entries."""
    mask = torch.zeros(rows, len(sizes.csa_layers), dtype=torch.bool, device=device)
    mask[:, list(visible)] = True
    return mask


__all__ = [
    "HIDDEN_LOGIT",
    "Backbone",
    "Params",
    "Projected",
    "answer_loss",
    "attend",
    "buffers",
    "compress",
    "distil",
    "finish_layer",
    "hidden_layers",
    "index_scores",
    "initial_parameters",
    "main_frequencies",
    "parameter_shapes",
    "pick",
    "project_layer",
    "read_out",
    "rotations",
    "yarn_frequencies",
]
