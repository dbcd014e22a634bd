"""`flashmem inspect`: what is this file or directory?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import flashmem

from ..accounting import kv_report
from ..config import ModelDefaults, ModelGeometry
from .options import Json
from .output import answer, answer_json

_CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin")


def add_command(app: typer.Typer) -> None:
    app.command("inspect")(run)


def run(
    path: Annotated[Path, typer.Argument(help="A memory, a Memory Indexer, a model directory or a config.json.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every page of a memory.")] = False,
    json: Json = False,
) -> None:
    """Tell what a path holds and check it: memories, Memory Indexer checkpoints, models.

    Example: `flashmem inspect book.mem --verify`
    """
    facts = _facts(path, verify)
    if json:
        answer_json(facts)
    else:
        width = max(len(name) for name in facts)
        for name, value in facts.items():
            answer(f"{name.replace('_', ' '):<{width}}  {_shown(value)}")


def _facts(path: Path, verify: bool) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"nothing at {path}")
    if (path / "manifest.json").is_file():
        return _memory(path, verify)
    if (path / "indexer.safetensors").is_file() or path.suffix in _CHECKPOINTS:
        return _indexer(path)
    if path.name == "config.json" or (path / "config.json").is_file():
        return _model(path)
    raise ValueError(f"{path} is no memory, Memory Indexer or model")


def _memory(path: Path, verify: bool) -> dict[str, Any]:
    from ..memory import open_memory, read_manifest  # torch behind it takes seconds

    manifest = read_manifest(path)
    memory = open_memory(path)
    if verify:
        for record in range(memory.records.num_records):
            memory.records.row(record)
    session = {name: value for name, value in manifest["session"].items() if name != "cycle"}
    return {
        "kind": "memory",
        "version": manifest["version"],
        **session,
        "state_bytes": manifest["state"]["bytes"],
        "pages_bytes": manifest["pages"]["bytes"],
        "pages": manifest["pages"]["count"],
        "pages_verified": verify,
    }


def _indexer(path: Path) -> dict[str, Any]:
    indexer = flashmem.MemoryIndexer.from_pretrained(path)
    parameters = sum(parameter.numel() for parameter in indexer.retrievers.parameters())
    return {"kind": "memory indexer", **indexer.config.to_mapping(), "parameters": parameters}


def _model(path: Path) -> dict[str, Any]:
    geometry = ModelGeometry.from_json(path)
    kinds = Counter(geometry.layer_kinds)
    folder = path if path.is_dir() else path.parent
    defaults = ModelDefaults.of(folder)
    return {
        "kind": "model",
        "layers": geometry.num_layers,
        **{f"{kind}_layers": kinds[kind] for kind in ("window", "csa", "hca")},
        "target_layers": [geometry.csa_layers[csa] for csa in geometry.default_targets()],
        "hidden_size": geometry.hidden_size,
        "heads": geometry.num_heads,
        "head_dim": geometry.head_dim,
        "index_heads": geometry.index_heads,
        "index_head_dim": geometry.index_head_dim,
        "index_topk": geometry.index_topk,
        "sliding_window": geometry.sliding_window,
        "vocab_size": geometry.vocab_size,
        "max_positions": geometry.max_positions,
        "paper_bytes_per_token_fp8": _bytes_per_token(geometry),
        "weight_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "bundled_indexer": (folder / "indexer").is_dir(),
        "lsa_defaults": dict(defaults.lsa),
        "dtype_default": defaults.dtype,
        "question_form": defaults.question,
    }


def _bytes_per_token(geometry: ModelGeometry) -> float:
    tokens = geometry.csa_ratio * geometry.hca_ratio
    return kv_report(geometry, tokens, keep=1.0).paper.full_bytes / tokens


def _shown(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return repr(value)
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {item}" for name, item in value.items())
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{value:,}"


__all__ = ["add_command"]
