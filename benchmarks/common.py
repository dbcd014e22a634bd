"""What the programs of this folder share beside `flashmem.bench.report`."""

from __future__ import annotations

import argparse
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashmem.backbone import random_model
from flashmem.bench import report
from flashmem.bench.report import ROOT, commit, log, machine, spread, timed, without_paths

V4_SHAPED: Mapping[str, Any] = {
    "layers": "WWCHCHC",
    "vocab_size": 1024,
    "hidden_size": 192,
    "moe_intermediate_size": 80,
    "num_attention_heads": 8,
    "head_dim": 64,
    "q_lora_rank": 96,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 64,
    "o_groups": 2,
    "o_lora_rank": 96,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 64,
    "hc_mult": 4,
}
"""A model of about 5 M parameters in the shape of V4-Flash: two window layers, then CSA and HCA by turns."""


def v4_shaped_model(seed: int = 0) -> Any:
    """A random float32 model of the geometry above."""
    sizes = dict(V4_SHAPED)
    return random_model(sizes.pop("layers"), seed=seed, **sizes)


def num_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """An argument parser with what all benchmarks take: `--out` and `--threads`."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--out", type=Path, required=True, metavar="FILE", help="result file, JSON")
    result.add_argument("--threads", type=int, default=defaults.get("threads", 2), help="CPU threads of torch")
    return result


def command_line() -> str:
    """How this program was called, with every absolute path cut to its last part."""
    return report.command_line(_program())


def write_result(path: Path, bench: str, result: Mapping[str, Any], started: Mapping[str, Any]) -> None:
    """Write one JSON object: the bench's name, its command, the machine as it was at the start, and the result."""
    report.write_result(path, bench, result, started, program=_program())


def _program() -> str:
    return "python -m benchmarks." + Path(sys.argv[0]).stem


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share: E. B. Wilson, 1927."""
    share, square = hits / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def peak_rss_bytes() -> int:
    """Most memory that this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


__all__ = [
    "ROOT",
    "V4_SHAPED",
    "command_line",
    "commit",
    "log",
    "machine",
    "num_parameters",
    "parser",
    "peak_rss_bytes",
    "spread",
    "timed",
    "v4_shaped_model",
    "wilson",
    "without_paths",
    "write_result",
]
