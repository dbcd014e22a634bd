"""Random DeepSeek-V4 models: small ones for tests and first steps, and skeletons of large ones for measurements."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from ..config import LayerKind, ModelGeometry

_LAYER_TYPES = {
    "W": "sliding_attention",
    "C": "compressed_sparse_attention",
    "H": "heavily_compressed_attention",
}

_LETTERS: dict[LayerKind, str] = {"window": "W", "csa": "C", "hca": "H"}


def random_model(layers: str = "WCHC", *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """Build a `DeepseekV4ForCausalLM` with random weights of unit-scale activations.

    `layers` spells the schedule: W window, C CSA, H HCA; lower case makes the MoE of that layer hash-routed.
    `sizes` overrides fields of `DeepseekV4Config`. The weights depend on `seed` alone.
    """
    if bad := sorted(set(layers.upper()) - set(_LAYER_TYPES)):
        raise ValueError(f"layers are spelled with W, C and H, got {bad}")
    values: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        "q_lora_rank": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 8,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 4,
        "max_position_embeddings": 1 << 20,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": None,
    }
    config = DeepseekV4Config(
        num_hidden_layers=len(layers),
        layer_types=[_LAYER_TYPES[c] for c in layers.upper()],
        mlp_layer_types=["hash_moe" if c.islower() else "moe" for c in layers],
        **(values | sizes),
    )
    model = DeepseekV4ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("tid2eid"):
                _route(tensor, config, generator)
            elif (spread := _spread(name, tensor)) is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
    return model.to(dtype)


@torch.no_grad()
def skeleton_model(
    geometry: ModelGeometry, *, num_experts: int, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> Any:
    """A random `DeepseekV4ForCausalLM` of a true geometry but for its experts, `num_experts` a layer.

    It is made in `dtype` on `device` at once, so that no more than these experts exist anywhere; on the device "meta"
    it takes no memory. Raises ValueError for fewer than one expert, or more than the geometry has.
    """
    g, device = geometry, torch.device(device)
    if not 1 <= num_experts <= g.num_experts:
        raise ValueError(f"experts must lie in 1..{g.num_experts}, got {num_experts}")
    config = DeepseekV4Config(
        num_hidden_layers=g.num_layers, layer_types=[_LAYER_TYPES[_LETTERS[kind]] for kind in g.layer_kinds],
        vocab_size=g.vocab_size, hidden_size=g.hidden_size, moe_intermediate_size=g.moe_intermediate_size,
        num_attention_heads=g.num_heads, head_dim=g.head_dim, partial_rotary_factor=g.compress_rope.dim / g.head_dim,
        q_lora_rank=g.q_lora_rank, n_routed_experts=num_experts,
        num_experts_per_tok=min(num_experts, g.num_experts_per_token), n_shared_experts=g.num_shared_experts,
        sliding_window=g.sliding_window, o_groups=g.o_groups, o_lora_rank=g.o_lora_rank, index_n_heads=g.index_heads,
        index_head_dim=g.index_head_dim, index_topk=g.index_topk, hc_mult=g.hc_mult,
        max_position_embeddings=g.max_positions, rms_norm_eps=g.rms_norm_eps, pad_token_id=None,
    )  # fmt: skip
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = DeepseekV4ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(usual)
    if device.type == "meta":
        return model
    draw, routes = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("tid2eid"):
            _route(tensor, config, routes)
        elif (spread := _spread(name, tensor)) is not None:
            tensor.normal_(0, spread, generator=draw)
    return model


def _route(table: torch.Tensor, config: DeepseekV4Config, generator: torch.Generator) -> None:
    """Give every token random experts of its own."""
    routes = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator).argsort(1)
    table.copy_(routes[:, : config.num_experts_per_tok])


def _spread(name: str, tensor: torch.Tensor) -> float | None:
    """Standard deviation that keeps activations at unit scale; None for what stays as the model makes it."""
    if name.endswith(("inv_freq", "scale", "correction_bias")) or "norm" in name:
        return None
    if tensor.dim() < 2 or "position_bias" in name or "embed" in name:
        return 1.0
    return tensor.shape[-1] ** -0.5
