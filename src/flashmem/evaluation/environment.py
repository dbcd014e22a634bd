"""What a number was measured with: code, versions and hardware."""

from __future__ import annotations

import hashlib
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from ..engine import Engine


def environment(engine: Engine) -> dict[str, Any]:
    """Versions and hardware of this process, and the checksum of flashmem's own code."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "flashmem": metadata.version("flashmem"),
        "code_sha256": code_digest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": engine.backbone.input_device.type,
        "cpu": cpu_name(),
        "gpus": gpus if engine.backbone.input_device.type == "cuda" else [],
        "threads": torch.get_num_threads(),
    }


def code_digest() -> str:
    """Checksum of the package's Python files."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Checksum of a fast tokenizer's file, or of another one's vocabulary; None without a tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def cpu_name() -> str:
    """The processor's model, as the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        return found[1].strip()
    return platform.processor() or platform.machine()


__all__ = ["code_digest", "cpu_name", "environment", "tokenizer_digest"]
