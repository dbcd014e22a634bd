"""Geometries by name, by directory and by file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashmem.accounting import resolve_geometry

FLASH_CONFIG = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
}


def test_flash() -> None:
    flash = resolve_geometry("deepseek-ai/DeepSeek-V4-Flash")
    assert flash.csa_layers == tuple(range(2, 43, 2))
    assert flash.hca_layers == tuple(range(3, 42, 2))
    assert [flash.csa_layers[index] for index in flash.default_targets()] == [22, 26, 42]


def test_pro() -> None:
    pro = resolve_geometry("deepseek-v4-pro")
    assert (pro.num_layers, len(pro.csa_layers), len(pro.hca_layers)) == (61, 30, 31)


def test_built_in_flash_equals_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLASH_CONFIG))
    assert (
        resolve_geometry(tmp_path)
        == resolve_geometry(tmp_path / "config.json")
        == resolve_geometry("deepseek-v4-flash")
    )


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="deepseek-v4-flash, deepseek-v4-pro"):
        resolve_geometry("gpt-oss")
    with pytest.raises(ValueError, match="no model config"):
        resolve_geometry(tmp_path)
