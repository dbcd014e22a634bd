"""Settings and model configs: what is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashmem import LSAConfig, ModelGeometry
from flashmem.accounting import resolve_geometry
from flashmem.config import check_sampling

FLASH: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 43,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "hidden_size": 4096,
    "vocab_size": 129_280,
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
    "compress_rope_theta": 160_000,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65_536},
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
}
"""V4-Flash in the published spelling."""


def test_published_spelling() -> None:
    assert ModelGeometry.from_mapping(FLASH) == resolve_geometry("deepseek-v4-flash")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'deepseek_v4', got 'llama'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": [1]}, r"hidden_size must be an integer, got \[1\]"),
        ({"head_dim": "512"}, "head_dim must be an integer, got '512'"),
        ({"vocab_size": True}, "vocab_size must be an integer, got True"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"index_topk": 0}, "index_topk must be at least 1"),
        ({"compress_rates": [4]}, "compress_rates must be an object"),
        ({"compress_rate_csa": 0}, "csa_ratio must be at least 1"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "lacks 'factor'"),
        ({"rope_parameters": 3}, "rope_parameters must be an object"),
        ({"compress_rope_theta": "big"}, "compress_rope_theta must be a number"),
        ({"qk_rope_head_dim": 63}, "positive even number, got 63"),
        ({"qk_rope_head_dim": 256}, "rope dim 256 exceeds"),
        ({"compress_ratios": None}, "neither 'layer_types' nor 'compress_ratios'"),
        ({"compress_ratios": [4]}, "must be a list of 43 layers"),
        ({"compress_ratios": "4" * 43}, "must be a list of 43 layers"),
        ({"compress_ratios": [5] * 43}, "unknown compress_ratios: 5"),
        ({"compress_ratios": [[4]] * 43}, r"unknown compress_ratios: \[4\]"),
        ({"compress_ratios": [0] * 43}, "no CSA layer"),
        ({"layer_types": ["full_attention"] * 43}, "unknown layer_types: 'full_attention'"),
    ],
)
def test_model_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelGeometry.from_mapping(FLASH | change)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000, "\udcff"])
def test_files_that_are_no_model_config(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    for given in (path, tmp_path):
        with pytest.raises(ValueError, match=r"config\.json is (not JSON|no model config)"):
            ModelGeometry.from_json(given)
    with pytest.raises(ValueError, match="no model config at"):
        ModelGeometry.from_json(tmp_path / "other.json")
    path.write_text(json.dumps(FLASH))
    assert ModelGeometry.from_json(tmp_path).num_layers == 43


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_chunks": 2}, "page_chunks must be a power of two from 4, got 2"),
        ({"page_chunks": 12}, "power of two from 4, got 12"),
        ({"page_chunks": "4"}, "page_chunks must be an integer, got '4'"),
        ({"page_chunks": None}, "page_chunks must be an integer, got None"),
        ({"tau": 0}, "tau must be at least 1"),
        ({"tau": 2.5}, "tau must be an integer"),
        ({"lead": 64}, "lead must be below tau=64, got 64"),
        ({"lead": -1}, "lead must not be negative"),
        ({"threshold": 1.0}, "threshold must lie between 0 and 1"),
        ({"threshold": float("nan")}, "threshold must lie between 0 and 1, got nan"),
        ({"keep": 0}, r"keep must lie in \(0, 1\], got 0"),
        ({"keep": 1.5}, r"keep must lie in \(0, 1\], got 1.5"),
        ({"keep": float("nan")}, r"keep must lie in \(0, 1\], got nan"),
        ({"keep": "0.1"}, "keep must be a number"),
        ({"ceiling_pages": 3}, "ceiling_pages must be at least floor_pages=4, got 3"),
        ({"recency_pages": 0}, "recency_pages must be at least 1"),
        ({"observation_window": 0}, "observation_window must be at least 1"),
        ({"ensemble": "median"}, "ensemble must be 'max' or 'mean', got 'median'"),
        ({"rescue": 1}, "rescue must be true or false"),
        ({"rescue_recall": 2.0}, "rescue_recall must lie in"),
        ({"kv_format": "int4"}, "kv_format must be"),
        ({"device_budget_bytes": 0}, "device_budget_bytes must be positive, got 0"),
        ({"disk_budget_bytes": 5}, "disk_budget_bytes needs disk_path"),
        ({"disk_path": 5}, "disk_path must be a text, got 5"),
        ({"max_sessions": 0}, "max_sessions must be at least 1"),
        ({"colour": 1}, "unknown options: colour; known are"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSAConfig.from_mapping(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "finite number from 0, got -1.0"),
        ({"temperature": float("nan")}, "finite number from 0, got nan"),
        ({"temperature": float("inf")}, "finite number from 0, got inf"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"seed": 1 << 64}, "seed must fit into 64 bits"),
    ],
)
def test_decoding_options_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sampling(**change)
