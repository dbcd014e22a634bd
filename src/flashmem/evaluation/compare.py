"""Several runs on the same items against the first of them: the table of an ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from . import stats
from .metrics import Sample, bytes_of, compute, load_samples, paired
from .samples import is_answer
from .table import Table, p_value, percent

_IGNORED = ("max_sessions", "prefill_chunk", "device_budget_bytes")
"""Settings that change no answer beyond rounding."""


def compare(
    directories: Sequence[str | Path], *, policy: str = "lsa", also: Sequence[str] = (), margin: float = stats.MARGIN
) -> dict[str, Any]:
    """Every run's `policy` against the first run's, on items that all of them answered and full attention did not fail.

    `also` names other policies of the first run, which are compared with it too. Each row says how many answers of its
    run were left out since another run lacks them. Raises ValueError for runs on other items, for runs without the
    policy, and where no item is common to all.
    """
    if len(directories) + len(also) < 2:
        raise ValueError("at least two runs are needed to compare, or a run and another of its policies")
    metrics = [compute(directory, margin=margin) for directory in directories]
    names = _names(directories)
    for name, other in zip(names, metrics, strict=True):
        if other["run"]["items_sha256"] != metrics[0]["run"]["items_sha256"]:
            raise ValueError(f"{name} was run on other items than {names[0]}: they cannot be paired")
        for wanted in (policy, *(also if other is metrics[0] else ())):
            if wanted not in other["policies"]:
                raise ValueError(f"{name} has no policy {wanted!r}; it has {', '.join(other['policies'])}")
    greyed = {(row["task"], row["length"]) for values in metrics for row in values["rows"] if row["greyed"]}
    compared = [(name, index, policy) for index, name in enumerate(names)]
    compared[1:1] = [(other, 0, other) for other in also]
    answered = [_of(directories[index], label, greyed) for _, index, label in compared]
    common = set.intersection(*({sample["id"] for sample in samples} for samples in answered))
    if not common:
        raise ValueError(f"no item was answered in all of {', '.join(name for name, *_ in compared)}")
    first: list[Sample] = []
    rows: list[dict[str, Any]] = []
    for (name, index, label), all_samples in zip(compared, answered, strict=True):
        samples = [sample for sample in all_samples if sample["id"] in common]
        first = first or samples
        row: dict[str, Any] = {
            "name": name,
            "policy": label,
            "settings": _settings(metrics[index]["run"], metrics[0]["run"]),
            "items": len(common),
            "left_out": len({sample["id"] for sample in all_samples}) - len(common),
            "score": fmean(sample["score"] for sample in samples),
            **bytes_of(samples),
        }
        if rows:
            row["paired"] = paired(samples, first, margin=margin)
        rows.append(row)
    adjusted = stats.holm([row["paired"].mcnemar_p for row in rows[1:]])
    for row, p in zip(rows[1:], adjusted, strict=True):
        row["holm_p"] = p
    environments = [environment for values in metrics for environment in values["environments"]]
    return {
        "policy": policy,
        "margin": margin,
        "items_sha256": metrics[0]["run"]["items_sha256"],
        "environments": [one for at, one in enumerate(environments) if one not in environments[:at]],
        "runs": rows,
    }


def plain(compared: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison as JSON values."""
    runs = [
        {name: asdict(value) if isinstance(value, stats.Paired) else value for name, value in run.items()}
        for run in compared["runs"]
    ]
    return {**compared, "runs": runs}


def table_of(compared: Mapping[str, Any]) -> Table:
    """The comparison as a table."""
    rows = []
    for run in compared["runs"]:
        made, gap = run.get("paired"), None
        if made is not None:
            gap = made.interval
        rows.append(
            [
                run["name"],
                ", ".join(f"{name} {value}" for name, value in run["settings"].items()) or "-",
                str(run["items"]),
                percent(run["score"]),
                percent(run["paper_ratio_of_means"]),
                percent(run["all_in_ratio_of_means"]),
                "-" if made is None else f"{100 * made.difference:+.1f}",
                "-" if gap is None else f"{100 * gap[0]:+.1f} to {100 * gap[1]:+.1f}",
                "-" if made is None else f"{made.gained} / {made.lost}",
                "-" if made is None else f"{p_value(made.mcnemar_p)} ({p_value(run['holm_p'])})",
                "-" if made is None else ("yes" if made.noninferior else "no"),
            ]
        )
    first = compared["runs"][0]["name"]
    text = (
        f"Policy {compared['policy']}, but where a row is named after another policy of {first}; settings are those "
        f"that differ from {first}'s. All rows are about the items that every run answered"
        f"{_left_out(compared['runs'])}. Accuracy, and percent of a full cache in both accountings. Points: against "
        f"{first}; interval: paired bootstrap over documents, 95 %; McNemar: exact, Holm's over the "
        f"runs in brackets; non-inferior: not {100 * compared['margin']:g} points or more below."
    )
    head = ["run", "settings", "items", "accuracy", "KV paper", "KV all-in", "points", "interval", "gained / lost",
            "McNemar p (Holm)", "non-inferior"]  # fmt: skip
    return Table("Runs compared", text, head, rows)


def _left_out(runs: Sequence[Mapping[str, Any]]) -> str:
    """What was answered and is not compared, in words."""
    lost = [f"{run['left_out']} of {run['name']}" for run in runs if run["left_out"]]
    return f" (others left out: {', '.join(lost)})" if lost else ""


def _of(directory: str | Path, policy: str, greyed: set[tuple[str, int]]) -> list[Sample]:
    found = [
        sample for sample in load_samples(directory)
        if sample["policy"] == policy and is_answer(sample) and (sample["task"], sample["length"]) not in greyed
    ]  # fmt: skip
    if not found:
        raise ValueError(f"{directory}: no answer of {policy!r} counts")
    return found


def _settings(run: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """What differs in the engine's settings, the model or its indexer."""
    made = {
        name: value for name, value in run["lsa"].items() if value != first["lsa"].get(name) and name not in _IGNORED
    }
    return made | {name: run[name] for name in ("model", "indexer", "dtype") if run[name] != first[name]}


def _names(directories: Sequence[str | Path]) -> list[str]:
    """The last parts of the paths; where they are not distinct, one more part of each."""
    paths = [Path(directory).resolve() for directory in directories]
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [f"{path.parent.name}/{path.name}" for path in paths]


__all__ = ["compare", "plain", "table_of"]
