"""A model small enough for the benches on a CPU, with the kinds of layers of V4-Flash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flashmem.accounting import resolve_geometry
from flashmem.bench.skeleton import Skeleton
from flashmem.config import ModelGeometry

FLASH = resolve_geometry("deepseek-v4-flash")


def small_geometry() -> ModelGeometry:
    return replace(
        FLASH, layer_kinds=("window", "csa", "hca", "csa"), hidden_size=64, vocab_size=128, num_heads=4, head_dim=64,
        q_lora_rank=32, o_groups=2, o_lora_rank=16, sliding_window=16, index_heads=4, index_head_dim=32, index_topk=8,
        compress_rope=replace(FLASH.compress_rope, dim=16), moe_intermediate_size=32, num_experts=8, hc_mult=2,
    )  # fmt: skip


def small_skeleton(**changes: Any) -> Skeleton:
    values: dict[str, Any] = {
        "geometry": small_geometry(), "experts": 2, "dtype": torch.float32, "device": torch.device("cpu"),
        "keep": 0.3, "churn": 0.5, "tau": 4, "page_chunks": 4, "fill_tokens": 256,
    }  # fmt: skip
    return Skeleton(**values | changes)


def small_config(directory: Path) -> Path:
    """A config.json with about the sizes above."""
    values = {
        "model_type": "deepseek_v4", "num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4], "hidden_size": 64,
        "vocab_size": 128, "num_attention_heads": 4, "head_dim": 64, "q_lora_rank": 32, "o_groups": 2,
        "o_lora_rank": 16, "sliding_window": 16, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 8,
        "qk_rope_head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "hc_mult": 2,
    }  # fmt: skip
    path = directory / "config.json"
    path.write_text(json.dumps(values))
    return path
