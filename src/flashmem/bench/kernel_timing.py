"""How calls are timed on a CUDA device, and where their rows go.

`warm_us`: median over replays of a graph of many calls on rotating inputs. `cold_us`: median of single calls after
256 MB of other memory were written. `us` and `ours_us`: single calls from Python, host gaps included. `ratio`: a
peer's time over ours, both taken the same way in the same run: replayed where a graph holds both, else as called.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import kernel_resources, report

COLD_BYTES, COPY_BYTES = 256 << 20, 2 << 30


class Run:
    """Where rows go, how much time is left, and what the ceilings are."""

    def __init__(self, directory: Path | None, seconds: float, device: torch.device, *, sweep: bool = True) -> None:
        """With `sweep`, scores and attention are timed in all their tiles, else in those they choose themselves."""
        self.directory, self.device, self.sweep = directory, device, sweep
        self.end = time.monotonic() + seconds
        self.failures: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.copy_bytes_per_second = 0.0
        self.flops_per_second: dict[str, float] = {}
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "rows.jsonl").write_text("")

    def out_of_time(self) -> bool:
        return time.monotonic() > self.end

    def add(self, kind: str, **row: Any) -> None:
        row = {"bench": kind, **row}
        self.rows.append(row)
        if self.directory is not None:
            with (self.directory / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        report.log(" ".join(f"{name}={short(value)}" for name, value in row.items()))

    def check(self, name: str, error: float, tolerance: float, **more: Any) -> bool:
        passed = error <= tolerance  # not for a NaN
        self.add("check", name=name, error=error, tolerance=tolerance, passed=passed, **more)
        if not passed:
            self.failures.append(name)
        return passed

    def time(
        self, kind: str, calls: Sequence[Callable[[], object]], *, bytes: int, flops: int, rate: str,
        ours: float | None = None, **more: Any,
    ) -> float:  # fmt: skip
        """Add a row; returns the seconds of a call. With `ours`, the seconds of our own call, it is a peer's row."""
        warm, cold = warm_seconds(calls), cold_seconds(calls[0])
        floor = max(bytes / self.copy_bytes_per_second, flops / self.flops_per_second[rate])
        self.add(
            kind,
            **more,
            warm_us=_us(warm),
            cold_us=_us(cold),
            floor_us=_us(floor),
            bytes=bytes,
            flops=flops,
            gb_per_s=round(bytes / warm / 1e9, 1),
            tflop_per_s=round(flops / warm / 1e12, 2),
            share_of_copy_bandwidth=round(bytes / warm / self.copy_bytes_per_second, 3),
            **({} if ours is None else {"ours_warm_us": _us(ours), "ratio": round(warm / ours, 3)}),
        )
        return warm


def graph_of(calls: Sequence[Callable[[], object]], repeats: int = 1) -> torch.cuda.CUDAGraph:
    for call in calls:  # compiles, and warms up what is created once
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def warm_seconds(calls: Sequence[Callable[[], object]], replays: int = 15, least: int = 24) -> float:
    """Seconds of one call, within a graph of at least so many."""
    repeats = -(-least // len(calls))
    graph = graph_of(calls, repeats)
    return statistics.median(elapsed(graph.replay) for _ in range(replays)) / (repeats * len(calls))


def cold_seconds(call: Callable[[], object], replays: int = 15) -> float:
    graph, other = graph_of([call]), torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda")

    def once() -> float:
        other.zero_()
        return elapsed(graph.replay)

    return statistics.median(once() for _ in range(replays))


def elapsed(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def eager_seconds(call: Callable[[], object], runs: int = 7) -> float:
    """For peers that a graph cannot hold: with the host's gaps between launches."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    return statistics.median(elapsed(call) for _ in range(runs))


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written by a copy on the device."""
    source, target = (torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPY_BYTES / statistics.median(elapsed(partial(target.copy_, source)) for _ in range(15))


def time_peer(
    run: Run, kind: str, name: str, call: Callable[[], object], ours: Callable[[], object], **shape: Any
) -> None:
    """A peer and ours as they are called from Python, one after the other, and replayed where a graph holds both.

    A peer that fails leaves a row saying so.
    """
    if run.out_of_time():
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        seconds = eager_seconds(call)
    except RuntimeError as error:
        run.add(kind, peer=name, **shape, failed=report.without_paths(str(error))[:300])
        return
    peak = torch.cuda.max_memory_allocated() - before
    ours_seconds = eager_seconds(ours)
    row: dict[str, Any] = {"us": _us(seconds), "ours_us": _us(ours_seconds)}
    try:
        replayed, ours_replayed = (warm_seconds([one], replays=5, least=_repeats(seconds)) for one in (call, ours))
    except RuntimeError as error:  # as where the host waits for a value
        row |= {"ratio": round(seconds / ours_seconds, 3), "not_captured": report.without_paths(str(error))[:120]}
    else:
        row |= {"warm_us": _us(replayed), "ours_warm_us": _us(ours_replayed)}
        row |= {"ratio": round(replayed / ours_replayed, 3), "ratio_as_called": round(seconds / ours_seconds, 3)}
    run.add(kind, peer=name, **shape, **row, peak_bytes=peak)
    torch.cuda.empty_cache()  # memory of a graph that is gone is not given to whoever asks next


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 2)


def _repeats(seconds: float) -> int:
    """Calls in a graph: many of short ones, whose launch would count else, and few of long ones."""
    return max(1, min(24, int(5e-3 / seconds)))


def tiles_name(tiles: Any) -> str:
    return "default" if tiles is None else kernel_resources.label(tiles)


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1 else str(value)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """In the norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
