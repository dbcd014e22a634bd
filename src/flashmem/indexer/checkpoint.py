"""Files of a Memory Indexer: reading ours and the published joint format, writing ours.

Ours is a directory with `indexer.safetensors` and `config.json`. The published format is one state dict, `.safetensors`
or `.pt`, with keys `retrievers.l{csa}.{wq_a.weight, q_norm_weight, wq_b.weight, weights_proj.weight}` and nothing that
tells the sizes but the tensors themselves. Whatever is wrong with a file is one ValueError that names the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import IndexerConfig

log = logging.getLogger(__name__)

WEIGHTS_NAME = "indexer.safetensors"
CONFIG_NAME = "config.json"
PARTS = ("wq_a.weight", "q_norm_weight", "wq_b.weight", "weights_proj.weight")

_KEY = re.compile(r"retrievers\.l(\d+)\.(" + "|".join(re.escape(part) for part in PARTS) + ")")
_NESTED = ("model", "state_dict", "model_state")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# what torch.load raises on bytes that are no checkpoint, a cut one, or one with objects other than tensors
_LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights by published key (float32, checked for shape and finiteness once a config is known), and their config."""

    path: Path
    tensors: dict[str, torch.Tensor]
    config: IndexerConfig | None
    """None for files of the published format, which carry none."""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a directory of ours, a `.safetensors` or a `.pt` file; never runs code that a file carries."""
    path = Path(path)
    if path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file():
        path = path.parent
    if path.is_dir():
        return _read_directory(path)
    if not path.is_file():
        raise ValueError(f"no indexer checkpoint at {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        config = _embedded_config(path, tensors, metadata) if "flashmem_config" in metadata else None
    elif path.suffix in (".pt", ".pth", ".bin"):
        tensors, config = _read_torch(path), None
    else:
        raise ValueError(f"{path}: an indexer checkpoint is a directory, a .safetensors or a .pt file")
    return Checkpoint(path, _select(path, tensors), config)


def infer_config(checkpoint: Checkpoint, **settings: Any) -> IndexerConfig:
    """Sizes from the tensors of the first layer; everything else from `settings` and the published defaults."""
    layers = sorted({int(match[1]) for key in checkpoint.tensors if (match := _KEY.fullmatch(key))})
    if not layers:
        raise ValueError(f"{checkpoint.path}: no tensor named retrievers.l<csa index>.wq_a.weight")
    shapes = {}
    for part in PARTS:
        key, dims = f"retrievers.l{layers[0]}.{part}", 1 if part == "q_norm_weight" else 2
        if key not in checkpoint.tensors:
            raise ValueError(f"{checkpoint.path}: lacks {key}")
        shapes[part] = tuple(checkpoint.tensors[key].shape)
        if len(shapes[part]) != dims or 0 in shapes[part]:
            raise ValueError(f"{checkpoint.path}: {key} must have {dims} dimensions, none empty; found {shapes[part]}")
    (rank, hidden), (heads, _), (rows, _) = shapes["wq_a.weight"], shapes["weights_proj.weight"], shapes["wq_b.weight"]
    if rows % heads:
        raise ValueError(
            f"{checkpoint.path}: retrievers.l{layers[0]}.wq_b.weight must have a multiple of {heads} rows, "
            f"one block per head; found {shapes['wq_b.weight']}"
        )
    try:
        return IndexerConfig(
            hidden_size=hidden,
            q_rank=rank,
            num_heads=heads,
            head_dim=rows // heads,
            layers=tuple(layers),
            **settings,
        )
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error


def check_tensors(checkpoint: Checkpoint, config: IndexerConfig) -> None:
    """Raise ValueError naming the first key that is extra, missing, mis-shaped or not finite."""
    wanted = wanted_shapes(config)
    path, tensors = checkpoint.path, checkpoint.tensors
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(f"{path}: unexpected {_names(extra)}; target layers are {config.layers}")
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"{path}: lacks {_names(missing)}")
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{path}: {key} must be {shape}, found {tuple(tensors[key].shape)}")
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {key} {tuple(tensor.shape)} holds NaN or infinite values")


def wanted_shapes(config: IndexerConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "wq_a.weight": (config.q_rank, config.hidden_size),
        "q_norm_weight": (config.q_rank,),
        "wq_b.weight": (config.num_heads * config.head_dim, config.q_rank),
        "weights_proj.weight": (config.num_heads, config.hidden_size),
    }
    return {f"retrievers.l{csa}.{part}": shape for csa in config.layers for part, shape in shapes.items()}


def write_checkpoint(directory: str | Path, tensors: Mapping[str, torch.Tensor], config: IndexerConfig) -> None:
    """Write our format; a reader finds the old or the new indexer, whenever this process dies.

    Replacing the weights is the moment of change, so they carry their config inside; `config.json` follows, and names
    the weights it belongs to.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    values = config.to_mapping()
    digest = _checksum(json.dumps(values), plain)
    metadata = {"format": "pt", "flashmem_config": json.dumps(values), "flashmem_sha256": digest}
    _replace(directory / WEIGHTS_NAME, lambda temporary: save_file(plain, temporary, metadata=metadata))
    text = json.dumps({"format": "flashmem-indexer", "indexer_sha256": digest, **values}, indent=2) + "\n"
    _replace(directory / CONFIG_NAME, lambda temporary: Path(temporary).write_text(text))


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Sha256 of names, shapes, dtypes and bytes, in order of name."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum(config_text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256((config_text + digest_tensors(tensors)).encode()).hexdigest()


def _read_directory(path: Path) -> Checkpoint:
    weights, config_path = path / WEIGHTS_NAME, path / CONFIG_NAME
    if not weights.is_file():
        others = sorted(item.name for item in path.iterdir() if item.suffix in (".safetensors", ".pt"))
        hint = f"; give one of its files: {_names(others)}" if others else ""
        raise ValueError(f"{path} has no {WEIGHTS_NAME}{hint}")
    if not config_path.is_file():
        raise ValueError(f"{path} has no {CONFIG_NAME}")
    try:
        values = json.loads(config_path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{config_path} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.pop("format", None) != "flashmem-indexer":
        raise ValueError(f"{config_path} is no indexer config: its 'format' must be 'flashmem-indexer'")
    described = values.pop("indexer_sha256", None)
    tensors, metadata = _read_safetensors(weights)
    config = _embedded_config(weights, tensors, metadata)
    if described == metadata["flashmem_sha256"]:
        config = _parse_config(config_path, values)
    else:
        log.warning("%s describes other weights (a save was interrupted); using the config in %s", config_path, weights)
    return Checkpoint(weights, _select(weights, tensors), config)


def _embedded_config(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> IndexerConfig:
    if "flashmem_config" not in metadata or "flashmem_sha256" not in metadata:
        raise ValueError(f"{path} carries no flashmem config; was it written by flashmem?")
    if _checksum(metadata["flashmem_config"], tensors) != metadata["flashmem_sha256"]:
        raise ValueError(f"{path} is damaged: its content does not have the checksum {metadata['flashmem_sha256']}")
    try:
        values = json.loads(metadata["flashmem_config"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its config is not JSON: {error}") from error
    return _parse_config(path, values)


def _parse_config(path: Path, values: Any) -> IndexerConfig:
    try:
        if not isinstance(values, dict):
            raise ValueError("the config must be an object")
        return IndexerConfig.from_mapping(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if not _is_table(key)}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, Any]:
    path.open("rb").close()  # a file that may not be read is no damaged file
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is damaged or holds more than tensors (code in a checkpoint is never run): {reason}"
        ) from error
    for name in _NESTED:
        if isinstance(values, Mapping) and isinstance(values.get(name), Mapping):
            values = values[name]
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold a state dict, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _select(path: Path, tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Published keys, float32, without the prefix of data-parallel training and without rotary tables."""
    selected = {}
    for name, tensor in tensors.items():
        key = name.removeprefix("module.")
        if _is_table(key):
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.dtype not in _FLOATS:
            found = (
                f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise ValueError(f"{path}: {key} must be a float32, bfloat16 or float16 tensor, found {found}")
        if key in selected:
            raise ValueError(f"{path}: {key} is there twice, with and without 'module.'")
        selected[key] = tensor.detach().float().contiguous()
    return selected


def _is_table(key: str) -> bool:
    return key.rsplit(".", 1)[-1] == "freqs_cis"


def _names(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _replace(path: Path, write: Callable[[str], object]) -> None:
    """Write beside the path, flush to disk, rename over it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "Checkpoint",
    "check_tensors",
    "digest_tensors",
    "infer_config",
    "read_checkpoint",
    "wanted_shapes",
    "write_checkpoint",
]
