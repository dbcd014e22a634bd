"""Geometries known by name, so that accounting needs no weights and no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..config import ModelGeometry, RopeConfig

# config.json of deepseek-ai/DeepSeek-V4-Flash; its compress_ratios are [0, 0] + [4, 128] * 20 + [4] and one MTP entry.
_FLASH = ModelGeometry(
    layer_kinds=("window", "window", *(("csa", "hca") * 20), "csa"),
    hidden_size=4096,
    vocab_size=129_280,
    num_heads=64,
    head_dim=512,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    sliding_window=128,
    csa_ratio=4,
    hca_ratio=128,
    index_heads=64,
    index_head_dim=128,
    index_topk=512,
    compress_rope=RopeConfig(theta=160_000.0, dim=64, factor=16.0, original_positions=65_536),
    rms_norm_eps=1e-6,
    hc_mult=4,
    moe_intermediate_size=2048,
    num_experts=256,
    num_experts_per_token=6,
    num_shared_experts=1,
    max_positions=1_048_576,
)

# config.json of deepseek-ai/DeepSeek-V4-Pro; its compress_ratios are [128, 128] + [4, 128] * 29 + [4] and one MTP
# entry. The sizes are those of the DeepSeek-V4 report (arXiv 2606.19348, section 4.2.1), top-k 1024 included.
_PRO = replace(
    _FLASH,
    layer_kinds=("hca", "hca", *(("csa", "hca") * 29), "csa"),
    hidden_size=7168,
    num_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    index_topk=1024,
    moe_intermediate_size=3072,
    num_experts=384,
)

_BUILT_IN: Mapping[str, ModelGeometry] = {"deepseek-v4-flash": _FLASH, "deepseek-v4-pro": _PRO}
DEMO = "flashmem-demo"
MODEL_NAMES = (*_BUILT_IN, DEMO)
"""Names that `resolve_geometry` knows."""


def resolve_geometry(name_or_path: str | Path) -> ModelGeometry:
    """The geometry of a known name (an organisation before it is ignored), a model directory or a `config.json`.

    Raises ValueError that lists the known names.
    """
    path = Path(name_or_path)
    if path.exists():
        return ModelGeometry.from_json(path)
    name = str(name_or_path).lower().removeprefix("deepseek-ai/")
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if name == DEMO:
        return ModelGeometry.from_json(shipped_model())
    raise ValueError(f"no model {str(name_or_path)!r}: neither a file nor one of {', '.join(MODEL_NAMES)}")


def shipped_model() -> Path:
    """The directory of the small model that comes with the package; raises ValueError if this copy has none."""
    directory = Path(__file__).resolve().parents[1] / "models" / "demo"
    if not (directory / "config.json").is_file():
        raise ValueError("this copy of flashmem comes without the demo model; name a model directory instead")
    return directory


__all__ = ["DEMO", "MODEL_NAMES", "resolve_geometry", "shipped_model"]
