"""A long prefill: the stock forward of transformers up to its longest length under a memory limit, then ours.

The stock model runs whole, without a cache and with the logits of the last token only, which is the least that it can
do, and in pieces with its cache. Lengths double from the first; one is not tried where it would exceed a limit if time
and memory grew as they did before. Before anything is timed, the logits of all paths at the first length are compared
with those of the stock model in float32. Peak bytes are those above what the loaded model takes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..backbone.adapter import Backbone, cache_argument
from ..config import LSAConfig
from ..engine import Engine
from . import report

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}
"""Relative error of logits in the norm, by the model's dtype: sums in another order may choose another expert or pick
another chunk where scores nearly tie, and do so within the stock model, too: whole and in pieces."""
WHOLE, PIECES = "stock, whole", "stock, in pieces"
OURS: dict[str, str] = {"reference": "flashmem", "fused": "flashmem, fused"}
"""Our paths by their `prefill_kernels`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Where a path stops."""

    peak_bytes: int
    seconds: float
    """For one prefill of the stock paths."""
    our_seconds: float


@dataclass(slots=True)
class _Prefill:
    """One path, and the rows that it has given."""

    name: str
    run: Callable[[list[int]], torch.Tensor]
    """Float32 logits [V] of the last token."""
    on_row: report.OnRow
    rows: list[dict[str, Any]] = field(default_factory=list)


def run(
    model: Any, *, config: LSAConfig, indexer: Any, first: int, lengths: Sequence[int], limits: Limits,
    stock_chunk: int = 2048, kernels: Sequence[Literal["reference", "fused"]] = ("reference",),
    on_row: report.OnRow = report.unheard,
) -> dict[str, Any]:  # fmt: skip
    """Rows of all paths, and ours over the stock ones at their longest lengths; raises AssertionError for wrong logits.

    `lengths` are what our paths, one for each of `kernels`, are measured at beside the longest ones of the stock model,
    which in pieces runs `stock_chunk` tokens at a time.
    """
    device = model.model.embed_tokens.weight.device
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (max(first, *lengths, 2),), generator=torch.Generator().manual_seed(1)).tolist()
    stock = [
        _Prefill(WHOLE, lambda ids: _whole(model, ids), on_row),
        _Prefill(PIECES, lambda ids: _in_pieces(model, ids, stock_chunk), on_row),
    ]
    configs = [replace(config, prefill_kernels=each) for each in kernels]
    ours = [_our_path(model, indexer, each, limits.our_seconds, on_row) for each in configs]
    unlimited = [_our_path(model, indexer, each, math.inf, on_row) for each in configs]
    Backbone(model).detach()  # a bfloat16 model needs it before transformers 5.20, see there
    wanted = _whole(copy.deepcopy(model).float(), ids[:first])
    report.release(device)
    errors = {path.name: _error(path.run(ids[:first]), wanted) for path in (*stock, *unlimited)}
    tolerance = TOLERANCE[model.dtype]
    for path in ours:
        assert errors[path.name] <= tolerance, (
            f"{path.name}: logits differ from the stock model's by {errors[path.name]:.2g}, {tolerance:.2g} is allowed"
        )
    for path in stock:
        if errors[path.name] > tolerance:
            path.rows.append({"path": path.name, "failed": f"logits differ by {errors[path.name]:.2g}: not timed"})
            continue
        _lengthen(path, ids, first, limits, device)
    longest = {path.name: rows[-1] for path in stock if (rows := _measured(path.rows))}
    for tokens in sorted({*lengths, *(row["tokens"] for row in longest.values())}):
        for path in ours:
            path.rows.append(_measure(path, ids, tokens, device))
    return {
        "device": str(device),
        "dtype": str(model.model.embed_tokens.weight.dtype).removeprefix("torch."),
        "prefill_chunk": config.prefill_chunk,
        "stock_chunk": stock_chunk,
        "page_chunks": config.page_chunks,
        "keep": config.keep,
        "tolerance": tolerance,
        "errors_at_first": errors,
        "peak_limit_bytes": limits.peak_bytes,
        "rows": [row for path in (*stock, *ours) for row in path.rows],
        "ratios": [_ratio(row, path) for row in longest.values() for path in ours],
    }


def _lengthen(path: _Prefill, ids: list[int], tokens: int, limits: Limits, device: torch.device) -> None:
    """Double the length until a limit is met; the last row says which."""
    while tokens <= len(ids):
        row = _measure(path, ids, tokens, device)
        path.rows.append(row)
        if "failed" in row:
            return
        before, tokens = (_measured(path.rows)[-2:])[0], 2 * tokens
        for name, most in (("peak_bytes", limits.peak_bytes), ("seconds", limits.seconds)):
            growth = row[name] / before[name] if before[name] else 2.0
            if (expected := row[name] * min(4.0, max(2.0, growth))) > most:
                reason = f"not tried: about {expected:,.0f} {name.replace('_', ' ')}, the limit is {most:,.0f}"
                path.rows.append({"path": path.name, "tokens": tokens, "failed": reason})
                return


def _measure(path: _Prefill, ids: list[int], tokens: int, device: torch.device) -> dict[str, Any]:
    row: dict[str, Any] = {"path": path.name, "tokens": tokens}
    peak = _Peak(device)
    try:
        seconds = report.timed(lambda: path.run(ids[:tokens]), report.synchronizer(device))
    except (torch.OutOfMemoryError, _OutOfTime) as error:
        row["failed"] = "out of device memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
    else:
        row |= {"seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}
        row["peak_bytes"] = peak.above()
    report.release(device)
    report.log(" ".join(f"{name}={value}" for name, value in row.items()))
    path.on_row(row)
    return row


def _measured(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "failed" not in row]


def _ratio(stock: dict[str, Any], ours: _Prefill) -> dict[str, Any]:
    """A stock path at its longest length over one of ours at the same."""
    (row,) = (row for row in ours.rows if row["tokens"] == stock["tokens"])
    ratio: dict[str, Any] = {"path": stock["path"], "over": ours.name, "tokens": stock["tokens"]}
    if "failed" not in row:
        ratio["seconds_ratio"] = round(stock["seconds"] / row["seconds"], 3)
        ratio["peak_bytes_ratio"] = round(stock["peak_bytes"] / max(1, row["peak_bytes"]), 3)
    return ratio


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ---- the paths


@torch.no_grad()
def _whole(model: Any, ids: list[int]) -> torch.Tensor:
    at = model.model.embed_tokens.weight.device
    return model(torch.tensor([ids], device=at), use_cache=False, logits_to_keep=1).logits[0, -1].float()


@torch.no_grad()
def _in_pieces(model: Any, ids: list[int], piece: int) -> torch.Tensor:
    at, cache, name = model.model.embed_tokens.weight.device, None, cache_argument(model)
    for start in range(0, len(ids), piece):
        now = torch.tensor([ids[start : start + piece]], device=at)
        more: dict[str, Any] = {} if cache is None else {name: cache}
        output = model(now, use_cache=True, logits_to_keep=1, **more)
        cache = getattr(output, name)
    return output.logits[0, -1].float()


class _OutOfTime(Exception):
    pass


def _our_path(model: Any, indexer: Any, config: LSAConfig, seconds: float, on_row: report.OnRow) -> _Prefill:
    name = OURS[config.prefill_kernels]
    return _Prefill(name, lambda ids: _ours(model, indexer, config, ids, seconds), on_row)


def _ours(model: Any, indexer: Any, config: LSAConfig, ids: list[int], seconds: float) -> torch.Tensor:
    """Prefill and the level 1 that follows it, so that the session is ready to decode."""
    end = time.monotonic() + seconds

    def on_progress(done: int, total: int) -> None:
        if time.monotonic() > end and done < total:
            raise _OutOfTime(f"{done:,} of {total:,} tokens after {seconds:.0f} s")

    engine = Engine(model, indexer=indexer, config=config)
    try:
        session = engine.session()
        session.append(ids, on_progress=on_progress)
        assert session.next_logits is not None
        return session.next_logits.clone()
    finally:
        engine.close()


class _Peak:
    """Bytes above those at its making: of the device, or of the process on a CPU (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the process's peak
            self._before = _status_bytes("VmRSS")

    def above(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kilobytes) << 10


__all__ = ["OURS", "PIECES", "TOLERANCE", "WHOLE", "Limits", "run"]
