"""Loading a model and its tokenizer with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DeepseekV4ForCausalLM


def load_model(
    name: str | Path, *, device: str | torch.device | None, dtype: str | torch.dtype, device_map: Any, **arguments: Any
) -> tuple[Any, Any]:
    """Load a local directory or a hub name; returns the model and its tokenizer (None where a directory has none).

    `device` is where the whole model goes, CUDA if there is one by default; `device_map` spreads layers instead.
    """
    if device is not None and device_map is not None:
        raise ValueError("give device or device_map, not both")
    local = Path(name)
    if local.is_dir() and not (local / "config.json").is_file():
        raise ValueError(f"{local} is no model directory: it has no config.json")
    model = DeepseekV4ForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map, **arguments)
    if device_map is None:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    has_tokenizer = not local.is_dir() or any(local.glob("tokenizer*"))
    return model, AutoTokenizer.from_pretrained(name) if has_tokenizer else None
