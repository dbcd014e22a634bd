"""A random DeepSeek-V4 of any small geometry: for tests, benchmarks and first steps without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

_LAYER_TYPES = {
    "W": "sliding_attention",
    "C": "compressed_sparse_attention",
    "H": "heavily_compressed_attention",
}


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
                routes = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator).argsort(1)
                tensor.copy_(routes[:, : config.num_experts_per_tok])
            elif name.endswith(("inv_freq", "scale", "correction_bias")) or "norm" in name:
                continue
            else:
                spread = 1.0 if tensor.dim() < 2 or "position_bias" in name else tensor.shape[-1] ** -0.5
                spread = 1.0 if "embed" in name else spread
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
    return model.to(dtype)
