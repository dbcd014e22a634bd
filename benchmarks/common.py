"""What every benchmark needs: where it ran, how it was timed, and its result file.

Result files are written by these programs only. They name no absolute path: paths in the command line are cut to their
last part.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from flashmem.backbone import random_model

ROOT = Path(__file__).resolve().parent.parent

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


def machine() -> dict[str, Any]:
    """Hardware, versions, commit and load of this run."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The checked-out commit, marked where the sources differ from it; "unknown" outside a checkout."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "src", "benchmarks")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+changes" if changed else "")


def command_line() -> str:
    """How this program was called, with every absolute path cut to its last part."""
    program = "python -m benchmarks." + Path(sys.argv[0]).stem
    return " ".join([program, *(re.sub(r"(^|=)/\S*?([^/\s]+)/?$", r"\1\2", word) for word in sys.argv[1:])])


def without_paths(text: str) -> str:
    """Text with every absolute path cut to its last part."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/'\"<>|]+/)+", "", text)


def write_result(path: Path, bench: str, result: Mapping[str, Any], started: Mapping[str, Any]) -> None:
    """Write one JSON object: the bench's name, its command, the machine as it was at the start, and the result."""
    load = [round(value, 2) for value in os.getloadavg()]
    rows = {"bench": bench, "command": command_line(), "machine": dict(started), "load_average_at_end": load}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**rows, **result}, indent=2) + "\n")
    log(f"wrote {path.name}")


def log(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def timed(function: Callable[[], object], synchronize: Callable[[], object] = lambda: None) -> float:
    """Seconds of one call."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes in milliseconds."""
    ms = sorted(1e3 * value for value in seconds)
    quartiles = statistics.quantiles(ms, n=4) if len(ms) > 1 else [ms[0]] * 3
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    return {name: round(value, 4) for name, value in zip(names, (ms[0], *quartiles, ms[-1]), strict=True)}


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


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        return found[1].strip()
    return platform.processor() or platform.machine()


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
