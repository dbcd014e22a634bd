"""What every measurement needs: where it ran, how it was timed, and its result file.

Result files are written by programs only. They name no absolute path: paths in the command line are cut to their last
part.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ..evaluation.environment import cpu_name

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parents[1]
"""The checkout, if this package is used from one."""


def machine() -> dict[str, Any]:
    """Hardware, versions, commit and load of this run."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def release(device: torch.device) -> None:
    """Give back what nobody refers to any more, of the device too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


CASE = ("bench", "peer", "chunks", "pages", "batch", "layers", "planar", "precision", "ordered", "kv_format")
"""What tells one timed case of a kernel from another; its variants differ in their tiles."""


def fastest(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The fastest variant of every timed case of `flashmem bench kernels`, by `CASE`."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if (us := row.get("warm_us", row.get("us"))) is not None:
            key = tuple(row.get(name) for name in CASE)
            if key not in best or us < best[key].get("warm_us", best[key].get("us")):
                best[key] = row
    return best


def commit() -> str:
    """The checked-out commit, marked where the sources differ from it; "unknown" outside a checkout."""
    if ROOT / "src" / "flashmem" != PACKAGE:
        return "unknown"
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "src", "benchmarks")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+changes" if changed else "")


def command_line(program: str) -> str:
    """How this program was called, with every absolute path cut to its last part."""
    return " ".join([program, *(re.sub(r"(^|=)/\S*?([^/\s]+)/?$", r"\1\2", word) for word in sys.argv[1:])])


def without_paths(text: str) -> str:
    """Text with every absolute path cut to its last part."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/'\"<>|]+/)+", "", text)


def write_result(
    path: Path, bench: str, result: Mapping[str, Any], started: Mapping[str, Any], *, program: str
) -> None:
    """Write one JSON object: the bench's name, its command, the machine as it was at the start, and the result."""
    load = [round(value, 2) for value in os.getloadavg()]
    rows = {"bench": bench, "command": command_line(program), "machine": dict(started), "load_average_at_end": load}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**rows, **result}, indent=2) + "\n")
    log(f"wrote {path.name}")


OnRow = Callable[[dict[str, Any]], None]
"""Told each row as soon as it is measured, before rows are compared: what is cut off must lose nothing."""


def unheard(row: dict[str, Any]) -> None:
    """For those who wait for the end."""


def log(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def timed(function: Callable[[], object], synchronize: Callable[[], object] = lambda: None) -> float:
    """Seconds of one call."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits for all work of a device."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes in milliseconds."""
    ms = sorted(1e3 * value for value in seconds)
    quartiles = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else [ms[0]] * 3
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    return {name: round(value, 4) for name, value in zip(names, (ms[0], *quartiles, ms[-1]), strict=True)}


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


__all__ = [
    "ROOT",
    "command_line",
    "commit",
    "fastest",
    "log",
    "machine",
    "release",
    "spread",
    "synchronizer",
    "timed",
    "without_paths",
    "write_result",
]
