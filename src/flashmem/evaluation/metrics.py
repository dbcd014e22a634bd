"""From samples to numbers: cells, paired comparisons, averages; a plain mapping that `metrics.json` holds.

A cell is one policy on one task at one length. A row is a task at a length. A row is *greyed* where full attention
itself fails: below 85 % of its own score at the task's shortest length (RULER's convention), or below the floor. Greyed
rows are reported and left out of every average and comparison over rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from . import stats
from .judge import apply_verdicts
from .runner import ENVIRONMENT_FILE, RUN_FILE
from .samples import BYTES, is_answer, read_samples

FORMAT, FORMAT_VERSION = "flashmem-eval-metrics", 1
RELATIVE_FLOOR = 0.85
FLOORS = {"longbench-v2": 0.25, "longmemeval-s": 0.0, "longmemeval-m": 0.0, "mrcr": 0.0}
"""Full attention must reach this for its row to count: chance, where answers are choices, and nothing where nobody
knows what a perfect reader would get."""
DEFAULT_FLOOR = 0.5
_GIB = 2**30

Sample = dict[str, Any]
Row = tuple[str, int]
"""(task, length)."""


def load_samples(out: str | Path) -> list[Sample]:
    """Rows of all shards of a run, each answer once. Raises ValueError where there are none."""
    files = sorted(Path(out).glob("samples*.jsonl"))
    rows: dict[tuple[str, str, int], Sample] = {}
    for path in files:
        for row in read_samples(path):
            rows.setdefault((row["id"], row["policy"], row["seed"]), row)
    if not rows:
        raise ValueError(f"{out} holds no samples: run `flashmem eval run` first")
    return list(rows.values())


def compute(out: str | Path, *, margin: float = stats.MARGIN, floor: float | None = None) -> dict[str, Any]:
    """All numbers of a run directory."""
    out = Path(out)
    samples = load_samples(out)
    judge = apply_verdicts(out, samples)
    run = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
    environments = json.loads((out / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    floor = FLOORS.get(run["suite"], DEFAULT_FLOOR) if floor is None else floor
    labels = list(dict.fromkeys(policy["label"] for policy in run["policies"]))
    answers = _Answers([sample for sample in samples if is_answer(sample)], labels)
    greyed = answers.greyed(floor)
    rows = [row for row in answers.rows if row not in greyed]
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "run": run,
        "environments": environments,
        "judge": judge,
        "samples": len(samples),
        "complete": len(samples) == run["samples"],
        "margin": margin,
        "floor": floor,
        "policies": [label for label in labels if any(sample["policy"] == label for sample in samples)],
        "rows": [{"task": row[0], "length": row[1], "greyed": row in greyed} for row in answers.rows],
        "cells": [answers.cell(label, row) for row in answers.rows for label in answers.labels],
        "averages": _averages(answers, rows),
        "comparisons": _comparisons(answers, rows, margin),
        "perplexity": perplexity([sample for sample in samples if not is_answer(sample)], labels),
    }


class _Answers:
    """Samples by policy and row."""

    def __init__(self, samples: Iterable[Sample], labels: Sequence[str]) -> None:
        self.by_cell: dict[tuple[str, Row], list[Sample]] = {}
        for sample in samples:
            self.by_cell.setdefault((sample["policy"], (sample["task"], sample["length"])), []).append(sample)
        found = {label for label, _ in self.by_cell}
        self.labels = [label for label in dict.fromkeys(labels) if label in found]
        first_seen = dict.fromkeys(row for _, row in self.by_cell)
        tasks = list(dict.fromkeys(task for task, _ in first_seen))
        self.rows = sorted(first_seen, key=lambda row: (row[1], tasks.index(row[0])))

    def of(self, label: str, rows: Iterable[Row]) -> list[Sample]:
        return [sample for row in rows for sample in self.by_cell.get((label, row), ())]

    def greyed(self, floor: float) -> set[Row]:
        """Rows in which full attention fails."""
        if "full" not in self.labels:
            return set()
        score = {row: fmean(sample["score"] for sample in self.of("full", [row])) for row in self.rows}
        shortest = {task: min(length for name, length in self.rows if name == task) for task, _ in self.rows}
        return {
            row for row in self.rows
            if score[row] < max(floor, RELATIVE_FLOOR * score[row[0], shortest[row[0]]])
        }  # fmt: skip

    def cell(self, label: str, row: Row) -> dict[str, Any]:
        return {"policy": label, "task": row[0], "length": row[1], **summarise(self.of(label, [row]))}

    def paired(
        self, new: str, old: str, rows: Sequence[Row], *, margin: float, alpha: float = stats.ALPHA
    ) -> stats.Paired | None:
        return paired(self.of(new, rows), self.of(old, rows), margin=margin, alpha=alpha)


def paired(
    new: Iterable[Sample], old: Iterable[Sample], *, margin: float = stats.MARGIN, alpha: float = stats.ALPHA
) -> stats.Paired | None:
    """Items that both answered; of a policy with seeds the mean score, and the seed that the new one fares worst with.

    None where they share no item.
    """
    ours, theirs = _by_item(new), _by_item(old)
    shared = [item for item in ours if item in theirs]
    if not shared:
        return None
    return stats.compare_paired(
        [fmean(s["score"] for s in ours[item].values()) for item in shared],
        [fmean(s["score"] for s in theirs[item].values()) for item in shared],
        [next(iter(ours[item].values()))["document"] for item in shared],
        discordant=_discordant(ours, theirs, shared), margin=margin, alpha=alpha,
    )  # fmt: skip


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """Score with its interval, bytes in both accountings and what was recalled, of one cell."""
    if not samples:
        return {"n": 0}
    scores = [sample["score"] for sample in samples]
    right = sum(sample["correct"] for sample in samples)
    seeds = len({sample["seed"] for sample in samples})
    documents = [sample["document"] for sample in samples]
    interval: tuple[float, float] | None = None
    kind = "none: one document"
    if seeds == 1 and all(score in (0, 1) for score in scores):
        interval, kind = stats.wilson(right, len(samples)), "Wilson"
    elif len(set(documents)) > 1:
        interval = stats.percentile_interval(stats.bootstrap_means(scores, documents))
        kind = "bootstrap over documents"
    return {
        "n": len({sample["id"] for sample in samples}),
        "seeds": seeds,
        "answers": len(samples),
        "documents": len(set(documents)),
        "score": fmean(scores),
        "interval": interval,
        "interval_kind": kind,
        "right": right,
        "right_interval": stats.wilson(right, len(samples)),
        **bytes_of(samples),
        "evidence_recall": _mean_known(samples, "evidence_recall"),
        "mass_recall": _mean_known(samples, "mass_recall"),
        "cycles": fmean(len(sample["cycles"]) for sample in samples),
        "moved_bytes": fmean(sample["moved_bytes"] for sample in samples),
        "widened": sum(sample["widened"] for sample in samples),
        "early": sum(sample["early"] for sample in samples),
    }


def perplexity(samples: Sequence[Sample], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Nats per token by position (tokens before) and by quarter of the continuation, with the difference to full."""
    made: list[dict[str, Any]] = []
    for length in sorted({sample["length"] for sample in samples}):
        by_label = {
            label: _by_item(s for s in samples if (s["policy"], s["length"]) == (label, length)) for label in labels
        }
        for label in (label for label in labels if by_label[label]):
            items = by_label[label]
            tokens = max(sample["new_tokens"] for seeds in items.values() for sample in seeds.values())
            for first in range(0, tokens, -(-tokens // 4)):
                span = slice(first, first + -(-tokens // 4))
                nats = {item: _loss(seeds.values(), span) for item, seeds in items.items()}
                entry = {
                    "policy": label, "length": length, "first": first, "last": min(tokens, span.stop), "n": len(nats),
                    "nats": fmean(nats.values()), "perplexity": math.exp(fmean(nats.values())),
                    **bytes_of([sample for seeds in items.values() for sample in seeds.values()]),
                }  # fmt: skip
                full = by_label.get("full") or {}
                if label != "full" and (shared := [item for item in nats if item in full]):
                    gaps = [nats[item] - _loss(full[item].values(), span) for item in shared]
                    entry["above_full"] = fmean(gaps)
                    documents = [next(iter(items[item].values()))["document"] for item in shared]
                    several = len(set(documents)) > 1
                    samples_of_mean = stats.bootstrap_means(gaps, documents)
                    entry["above_full_interval"] = stats.percentile_interval(samples_of_mean) if several else None
                made.append(entry)
    return made


def bytes_of(samples: Sequence[Sample]) -> dict[str, Any]:
    """Mean bytes, and both averages of their ratio to a full cache, in both accountings."""
    held = {name: [sample["bytes"][name] for sample in samples] for name in BYTES}
    made: dict[str, Any] = {"bytes": {name: fmean(values) for name, values in held.items()}}
    for name in ("paper", "all_in"):
        made[f"{name}_ratio_of_means"] = stats.ratio_of_means(held[name], held[f"full_{name}"])
        made[f"{name}_mean_of_ratios"] = stats.mean_of_ratios(held[name], held[f"full_{name}"])
    return made


def gib(value: float) -> str:
    """Bytes in GiB with three digits."""
    return f"{value / _GIB:.3g}"


def _averages(answers: _Answers, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over rows, per length and over all; every row counts alike, as in the paper's table."""
    made = []
    lengths: list[int | None] = [*dict.fromkeys(row[1] for row in rows)]
    for length in [*lengths, None]:
        mine = [row for row in rows if length in (None, row[1])]
        for label in answers.labels:
            cells = [answers.cell(label, row) for row in mine]
            cells = [cell for cell in cells if cell["n"]]
            if not cells:
                continue
            means = {name: [cell["bytes"][name] for cell in cells] for name in BYTES}
            entry: dict[str, Any] = {
                "length": length,
                "policy": label,
                "rows": len(cells),
                "score": fmean(cell["score"] for cell in cells),
                "bytes": {name: fmean(values) for name, values in means.items()},
            }
            for name in ("paper", "all_in"):
                entry[f"{name}_ratio_of_means"] = stats.ratio_of_means(means[name], means[f"full_{name}"])
                entry[f"{name}_mean_of_ratios"] = stats.mean_of_ratios(means[name], means[f"full_{name}"])
            made.append(entry)
    return made


def _comparisons(answers: _Answers, rows: Sequence[Row], margin: float) -> list[dict[str, Any]]:
    """LSA against every other policy: row by row, Holm over the rows; pooled per length and over all."""
    made: list[dict[str, Any]] = []
    for new in (label for label in answers.labels if label in ("lsa", "lsa+rescue") or label.startswith("lsa@")):
        for old in (label for label in answers.labels if label != new):
            made += _by_rows(answers, new, old, rows, margin)
            lengths: list[int | None] = [*dict.fromkeys(row[1] for row in rows)]
            for length in [*lengths, None] if len(rows) > 1 else []:
                mine = [row for row in rows if length in (None, row[1])]
                if paired := answers.paired(new, old, mine, margin=margin):
                    made.append(_entry(new, old, None, length, paired, rows=len(mine)))
    return made


def _by_rows(answers: _Answers, new: str, old: str, rows: Sequence[Row], margin: float) -> list[dict[str, Any]]:
    found = [(row, answers.paired(new, old, [row], margin=margin)) for row in rows]
    first = [(row, paired) for row, paired in found if paired is not None]
    p_values = [paired.mcnemar_p for _, paired in first]
    alphas, adjusted = stats.holm_alphas(p_values), stats.holm(p_values)
    adjusted_noninferior = stats.holm([paired.noninferior_p for _, paired in first])
    made = []
    for (row, _), alpha, p, p_noninferior in zip(first, alphas, adjusted, adjusted_noninferior, strict=True):
        paired = answers.paired(new, old, [row], margin=margin, alpha=alpha)
        assert paired is not None
        entry = _entry(new, old, row[0], row[1], paired, rows=1)
        made.append(entry | {"holm_p": p, "holm_noninferior_p": p_noninferior})
    return made


def _entry(
    new: str, old: str, task: str | None, length: int | None, paired: stats.Paired, *, rows: int
) -> dict[str, Any]:  # fmt: skip
    """A comparison; task None is all tasks of the length, length None all lengths."""
    values = asdict(paired) | {"noninferior": paired.noninferior}
    return {"policy": new, "against": old, "task": task, "length": length, "rows": rows, **values}


def _by_item(samples: Iterable[Sample]) -> dict[str, dict[int, Sample]]:
    made: dict[str, dict[int, Sample]] = {}
    for sample in samples:
        made.setdefault(sample["id"], {})[sample["seed"]] = sample
    return made


def _discordant(
    ours: Mapping[str, Mapping[int, Sample]], theirs: Mapping[str, Mapping[int, Sample]], shared: Sequence[str]
) -> tuple[int, int]:
    """Items right only in one of the two; of several seeds, those of the pair that favours the new one least."""
    splits = []
    for mine in {seed for item in shared for seed in ours[item]}:
        for other in {seed for item in shared for seed in theirs[item]}:
            pairs = [
                (ours[item][mine]["correct"], theirs[item][other]["correct"])
                for item in shared
                if mine in ours[item] and other in theirs[item]
            ]
            splits.append((pairs.count((True, False)), pairs.count((False, True))))
    return min(splits, key=lambda split: split[0] - split[1])


def _loss(samples: Iterable[Sample], span: slice) -> float:
    """Mean nats of a span of the continuation, over seeds."""
    return fmean(fmean(sample["losses"][span]) for sample in samples)


def _mean_known(samples: Iterable[Sample], name: str) -> float | None:
    known = [sample[name] for sample in samples if sample[name] is not None]
    return fmean(known) if known else None


__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Sample",
    "bytes_of",
    "compute",
    "gib",
    "load_samples",
    "paired",
    "perplexity",
    "summarise",
]
