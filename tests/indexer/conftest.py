from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM


def _tiny_config(**changes: object) -> DeepseekV4Config:
    """Five layers of which three are CSA; 16 index heads, so that ReLU scores do not tie at zero."""
    csa, hca, window = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"
    settings = {
        "vocab_size": 64,
        "hidden_size": 48,
        "num_hidden_layers": 5,
        "layer_types": [window, csa, hca, csa, csa],
        "mlp_layer_types": ["moe"] * 5,
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 20,
        "o_groups": 2,
        "o_lora_rank": 16,
        "sliding_window": 16,
        "index_n_heads": 16,
        "index_head_dim": 24,
        "index_topk": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "hc_mult": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
    }
    return DeepseekV4Config(**(settings | changes))


def _tiny_model(**changes: object) -> DeepseekV4ForCausalLM:
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM._from_config(_tiny_config(**changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_a_norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., DeepseekV4Config]:
    return _tiny_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., DeepseekV4ForCausalLM]:
    return _tiny_model


@pytest.fixture(scope="session")
def model() -> DeepseekV4ForCausalLM:
    return _tiny_model()
