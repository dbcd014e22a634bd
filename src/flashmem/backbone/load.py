"""Loading a model and its tokenizer with transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, DeepseekV4ForCausalLM

from ..config import ModelGeometry

_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


def load_model(
    name: str | Path, *, device: str | torch.device | None, dtype: str | torch.dtype, device_map: Any, **arguments: Any
) -> tuple[Any, Any]:
    """Load a local directory or a hub name; returns the model and its tokenizer (None where a directory has none).

    `device` is where the whole model goes, CUDA if there is one by default; `device_map` spreads layers instead.
    Raises ValueError for a directory that holds no DeepSeek-V4, or not all of its weights.
    """
    if device is not None and device_map is not None:
        raise ValueError("give device or device_map, not both")
    place = find_device(device)
    local = Path(name)
    if local.exists() or not _HUB_NAME.fullmatch(str(name)):
        if not (local / "config.json").is_file():
            raise ValueError(f"{local} is no model directory: it has no config.json")
        ModelGeometry.from_json(local)  # of another kind, transformers would make random weights of it
    try:
        model, info = DeepseekV4ForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=device_map, ignore_mismatched_sizes=True, output_loading_info=True,
            **arguments,
        )  # fmt: skip
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name}: the model cannot be loaded: {error}") from error
    # transformers fills these with random values and a warning
    unusable = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if unusable:
        more = f" and {len(unusable) - 1} more" if len(unusable) > 1 else ""
        raise ValueError(f"{name}: the checkpoint lacks {unusable[0]}{more}, or has it in another shape")
    if device_map is None:
        model.to(place)
    return model, _tokenizer(name)


def find_device(name: str | torch.device | None) -> torch.device:
    """A device that is there, CUDA if there is one by default; raises ValueError for any other."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device {name!r}: this machine has {count} CUDA devices that PyTorch can use")
    return device


def _tokenizer(name: str | Path) -> Any:
    """None where a directory has none."""
    local = Path(name)
    if local.is_dir() and not any(local.glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: the tokenizer cannot be loaded: {error}") from error
