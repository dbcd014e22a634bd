"""An untrained Memory Indexer: the backbone's own Lightning Indexer at the target layers, widened where asked.

Shape letters: E = hidden_size, r and R = q_rank before and after widening, h and H = heads, I = head_dim.

Widening keeps the function. Three things must be made up for: the mean of squares runs over R instead of r channels,
the head weights are scaled by H^-0.5 instead of h^-0.5, and new channels and heads must not speak yet but must learn:
- rank: new rows of wq_a are 0, so the mean shrinks by r/R; eps' = eps r/R and norm weights g' = g sqrt(r/R) give the
  old channels back exactly. New columns of wq_b are random, so that the new rows of wq_a have a gradient.
- heads: weights_proj is scaled by sqrt(H/h) and its new rows are 0; new rows of wq_b are random, so that the new rows
  of weights_proj have a gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from ..config import ModelGeometry
from .config import IndexerConfig

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_native(
    model: Any, layers: tuple[int, ...] | None, num_heads: int | None, q_rank: int | None, seed: int
) -> tuple[IndexerConfig, dict[str, torch.Tensor]]:
    """Return config and tensors by published key, float32, on the devices where the model holds them."""
    geometry = ModelGeometry.from_mapping(model.config.to_dict())
    layers = geometry.default_targets() if layers is None else tuple(layers)
    if beyond := [csa for csa in layers if not 0 <= csa < len(geometry.csa_layers)]:
        raise ValueError(f"CSA indices must lie in 0..{len(geometry.csa_layers) - 1}, got {beyond}")
    heads, rank = num_heads or geometry.index_heads, q_rank or geometry.q_lora_rank
    if heads < geometry.index_heads or rank < geometry.q_lora_rank:
        raise ValueError(
            f"native weights can be widened, not narrowed: heads {geometry.index_heads} -> {heads}, "
            f"rank {geometry.q_lora_rank} -> {rank}"
        )
    decoder = getattr(model, "model", model)
    tensors: dict[str, torch.Tensor] = {}
    rounded = set()
    for csa in layers:
        attention = decoder.layers[geometry.csa_layers[csa]].self_attn
        wq_b = _submodule(attention, "compressor.indexer.q_b_proj")
        rounded.add(wq_b.weight.dtype not in (torch.float32, torch.float64))
        parts = {
            "wq_a.weight": _float_weight(_submodule(attention, "q_a_proj")),
            "q_norm_weight": _float_weight(_submodule(attention, "q_a_norm")),
            "wq_b.weight": _float_weight(wq_b),
            "weights_proj.weight": _float_weight(_submodule(attention, "compressor.indexer.scorer.weights_proj")),
        }
        generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + csa)
        parts = widen(parts, rank=rank, heads=heads, head_dim=geometry.index_head_dim, generator=generator)
        tensors |= {f"retrievers.l{csa}.{name}": tensor for name, tensor in parts.items()}
    config = IndexerConfig(
        hidden_size=geometry.hidden_size,
        q_rank=rank,
        num_heads=heads,
        head_dim=geometry.index_head_dim,
        layers=layers,
        rope=geometry.compress_rope,
        query_dtype="bf16" if any(rounded) else "fp32",
        rms_norm_eps=geometry.rms_norm_eps * geometry.q_lora_rank / rank,
    )
    return config, tensors


def widen(
    parts: dict[str, torch.Tensor], *, rank: int, heads: int, head_dim: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """One layer's tensors at a larger rank and more heads; the function stays if eps is scaled by r/R too."""
    wq_a_rE, norm_r, wq_b_Xr = parts["wq_a.weight"], parts["q_norm_weight"], parts["wq_b.weight"]
    weights_hE = parts["weights_proj.weight"]
    old_rank, old_heads, hidden = wq_a_rE.shape[0], weights_hE.shape[0], wq_a_rE.shape[1]
    if (rank, heads) == (old_rank, old_heads):
        return parts

    wq_a_RE = wq_a_rE.new_zeros(rank, hidden)
    wq_a_RE[:old_rank] = wq_a_rE
    norm_R = norm_r.new_full((rank,), float(norm_r.abs().mean()))
    norm_R[:old_rank] = norm_r
    random_YR = torch.randn(heads * head_dim, rank, generator=generator, device="cpu") * float(
        wq_b_Xr.std(correction=0)
    )
    wq_b_YR = random_YR.to(wq_b_Xr.device)
    wq_b_YR[: old_heads * head_dim, :old_rank] = wq_b_Xr
    weights_HE = weights_hE.new_zeros(heads, hidden)
    weights_HE[:old_heads] = weights_hE * (heads / old_heads) ** 0.5
    return {
        "wq_a.weight": wq_a_RE,
        "q_norm_weight": norm_R * (old_rank / rank) ** 0.5,
        "wq_b.weight": wq_b_YR,
        "weights_proj.weight": weights_HE,
    }


def _submodule(attention: Any, name: str) -> Any:
    try:
        return attention.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the attention of a target layer has no {name}: is this a DeepSeek-V4 model?") from error


def _float_weight(module: Any) -> torch.Tensor:
    """A float32 copy of a module's weight; block-quantised float8 weights are multiplied by their scales."""
    weight = module.weight.detach()
    if weight.is_meta:
        raise ValueError("a target layer's weights are on the meta device (offloaded?); load those layers on a device")
    if weight.dtype in _PLAIN:
        return weight.float().clone()
    scale = getattr(module, "weight_scale_inv", None)
    if weight.dtype is not torch.float8_e4m3fn or scale is None:
        raise ValueError(
            f"weights of a target layer are {weight.dtype}; native needs float32, bfloat16 or float8 blocks"
        )
    scale = scale.detach().float()
    if scale.dim() == 2:
        rows, columns = module.block_size
        scale = scale.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return weight.float() * scale


__all__ = ["read_native"]
