"""Decode steps and capacity of a skeleton: full residency and LSA side by side, same engine, same bytes for KV.

Histories are synthetic. A step inside a window is a plain decode step; the first step of a window also scores, selects
and swaps. What a user gets is the mean over whole windows: `tokens_per_second` comes from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..engine import Engine, Session
from . import report, synthetic
from .skeleton import MODES, Mode, SessionMemory, Skeleton

TOKEN = 7


def run_decode(
    skeleton: Skeleton,
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    windows: int,
    device_budget_bytes: int,
    host_budget_bytes: int,
    on_row: report.OnRow = report.unheard,
) -> list[dict[str, Any]]:
    """Step times per context, mode and batch size; a batch that the budgets do not hold is a row that says so."""
    model, rows = skeleton.model(), []
    for context in contexts:
        for mode in MODES:
            steps = len(batches) * _steps(skeleton, windows)
            memory = skeleton.session_memory(mode, context, steps)
            fit = memory.sessions(device_budget_bytes, host_budget_bytes)
            wanted, too_many = split_batches(mode, context, batches, fit)
            rows += [*_measured(skeleton, model, mode, context, memory, wanted, windows, on_row), *too_many]
    _compare(rows)
    return rows


def split_batches(mode: Mode, context: int, batches: Sequence[int], fit: int) -> tuple[list[int], list[dict[str, Any]]]:
    """Batches that fit, smallest first, and rows that say so of the others."""
    ordered = sorted(batches)
    failed = f"{fit} sessions fit"
    too_many = [{"context": context, "mode": mode, "batch": n, "failed": failed} for n in ordered if n > fit]
    return [n for n in ordered if n <= fit], too_many


def run_on_engine(
    skeleton: Skeleton,
    model: Any,
    mode: Mode,
    context: int,
    sessions: int,
    memory: SessionMemory,
    run: Callable[[Engine], None],
) -> None:
    """Run on an engine that holds so many sessions; when nobody refers to it any more, what it took is given back."""
    engine = Engine(model, config=skeleton.config(mode, context, sessions, memory))
    try:
        run(engine)
    finally:
        engine.close()
        del engine
        report.release(skeleton.device)


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add to LSA's rows their time over that of full residency, at the same context and batch."""
    full = {(row["context"], row["batch"]): row for row in rows if row["mode"] == "full" and "failed" not in row}
    for row in rows:
        other = full.get((row["context"], row["batch"]))
        if row["mode"] == "lsa" and "failed" not in row and other is not None:
            row["mean_step_time_ratio"] = round(row["mean_step_ms"] / other["mean_step_ms"], 4)


def run_capacity(
    skeleton: Skeleton,
    *,
    contexts: Sequence[int],
    windows: int,
    max_sessions: int,
    device_budget_bytes: int,
    host_budget_bytes: int,
    on_row: report.OnRow = report.unheard,
) -> list[dict[str, Any]]:
    """Per context: the sessions of each mode that fit, all of them decoding, and LSA over full residency."""
    model, rows = skeleton.model(), []
    for context in contexts:
        found: dict[Mode, dict[str, Any]] = {}
        for mode in MODES:
            memory = skeleton.session_memory(mode, context, _steps(skeleton, windows))
            fit = memory.sessions(device_budget_bytes, host_budget_bytes)
            opened = min(fit, max_sessions)
            row: dict[str, Any] = {"context": context, "mode": mode, "batch": 0, "failed": "no session fits"}
            if opened:
                (row,) = _measured(skeleton, model, mode, context, memory, [opened], windows, on_row)
            found[mode] = row | {
                "sessions_fit": fit,
                "all_opened": opened == fit,
                "device_bytes_per_session": memory.device_bytes,
            }
        full, lsa = found["full"], found["lsa"]
        if full["sessions_fit"]:
            lsa["sessions_ratio"] = round(lsa["sessions_fit"] / full["sessions_fit"], 3)
        if "failed" not in full and "failed" not in lsa:
            ratio = round(lsa["tokens_per_second"] / full["tokens_per_second"], 3)
            # with fewer sessions than fit it is no throughput of the device
            whole = lsa["all_opened"] and full["all_opened"]
            lsa["throughput_ratio" if whole else "throughput_of_opened_ratio"] = ratio
        rows += [full, lsa]
    return rows


def _steps(skeleton: Skeleton, windows: int) -> int:
    """Steps of one measurement: those for warmth, then the windows."""
    return warm_steps(skeleton.tau) + windows * skeleton.tau


def _measured(
    skeleton: Skeleton,
    model: Any,
    mode: Mode,
    context: int,
    memory: SessionMemory,
    batches: Sequence[int],
    windows: int,
    on_row: report.OnRow,
) -> list[dict[str, Any]]:
    """Rows of growing batches in one engine; running out of device memory is a row, and ends the batches."""
    if not batches:
        return []
    rows: list[dict[str, Any]] = []

    def run(engine: Engine) -> None:
        for batch in batches:
            row: dict[str, Any] = {"context": context, "mode": mode, "batch": batch}
            rows.append(row)
            try:
                fill_sessions(engine, mode, batch, context)
                row |= measure(engine, engine.sessions, windows)
            except torch.OutOfMemoryError:
                row["failed"] = "out of device memory in a step"
                break
            on_row(row)
            report.log(f"{mode}: batch {batch}, {row['tokens_per_second']:.1f} tokens/s")

    run_on_engine(skeleton, model, mode, context, batches[-1], memory, run)
    return rows


def fill_sessions(engine: Engine, mode: Mode, batch: int, context: int) -> None:
    """Open sessions until there are `batch`, each with a history of its own."""
    while (number := len(engine.sessions) + 1) <= batch:
        fill = partial(synthetic.fill, engine, engine.session(), context, seed=number)
        seconds = report.timed(fill, report.synchronizer(engine.backbone.input_device))
        report.log(f"{mode}: session {number} of {batch}, {context:,} tokens, filled in {seconds:.1f} s")


def warm_steps(tau: int) -> int:
    """Steps before a measurement: two windows and the first step of a third.

    The first boundary of a batch compiles level 1 for its size, and a context of 1M tokens has its next HCA entry, with
    which graphs are captured anew, after 128 steps: once in the life of a server, not once a window.
    """
    return 2 * tau + 1


def measure(engine: Engine, sessions: Sequence[Session], windows: int) -> dict[str, Any]:
    """Decode all sessions through `windows` whole windows, after the warm steps, their clocks set alike."""
    device, tau = engine.backbone.input_device, engine.config.tau
    warm = warm_steps(tau)
    for session in sessions:
        session.cycle.settle()
    inside: list[float] = []
    boundary: list[float] = []
    moved = pages = 0
    for step in range(warm + windows * tau):
        if step == warm:
            moved, pages = (sum(getattr(s.pages.traffic, name) for s in sessions) for name in _TRAFFIC)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        first = sessions[0].cycle.steps >= tau
        took = report.timed(lambda: engine.decode(sessions, [TOKEN] * len(sessions)), report.synchronizer(device))
        if step >= warm:
            (boundary if first else inside).append(took)
    assert len(boundary) == windows, f"{len(boundary)} boundaries in {windows} windows"
    bytes_moved, pages_moved = (sum(getattr(s.pages.traffic, name) for s in sessions) for name in _TRAFFIC)
    mean = (sum(inside) + sum(boundary)) / (windows * tau)
    return {
        "windows": windows,
        "resident_pages": sum(len(session.pages.resident) for session in sessions),
        "pages": sum(session.pages.num_pages for session in sessions),
        "step_ms": report.spread(inside),
        "first_step_of_window_ms": report.spread(boundary),
        "mean_step_ms": round(1e3 * mean, 4),
        "windows_over_plain_steps_ratio": round(mean / statistics.mean(inside), 4),
        "tokens_per_second": round(len(sessions) / mean, 3),
        "pages_moved_per_window": round((pages_moved - pages) / windows, 1),
        "bytes_moved_per_window": round((bytes_moved - moved) / windows),
        "page_copies": engine.store.pool.copies.name,
        "pool_bytes": engine.store.pool.allocated_bytes,
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


_TRAFFIC = ("bytes_to_device", "pages_to_device")


__all__ = ["fill_sessions", "measure", "run_capacity", "run_decode", "run_on_engine", "split_batches", "warm_steps"]
