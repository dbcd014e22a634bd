"""Policies compared on the same items, on the same prefill, at the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine import Engine
from .compare import compare
from .items import Document, Item, ItemSet, read_items, write_items
from .policies import STANDARD, parse_policies
from .report import write_report
from .runner import Progress, RunConfig, run_items
from .samples import read_samples


def run(
    engine: Engine,
    items: ItemSet | str | Path,
    out: str | Path,
    *,
    policies: Sequence[str] = STANDARD,
    seeds: int = 3,
    config: RunConfig | None = None,
    progress: Progress | None = None,
    pictures: bool = True,
) -> dict[str, Any]:
    """Answer all items under all policies, write samples and report to `out`, and return the metrics.

    `items` is a set or the directory of a frozen one; the engine's own settings are LSA's. What `out` holds of the
    same run already is not run again. Pictures need matplotlib.
    """
    asked = items if isinstance(items, ItemSet) else read_items(items)
    run_items(engine, asked, parse_policies(policies, seeds=seeds), out, config, progress=progress)
    return write_report(out, pictures=pictures)


__all__ = [
    "STANDARD",
    "Document",
    "Item",
    "ItemSet",
    "Progress",
    "RunConfig",
    "compare",
    "parse_policies",
    "read_items",
    "read_samples",
    "run",
    "run_items",
    "write_items",
    "write_report",
]
