"""Pictures of a run, each one SVG text without anything that loads from elsewhere.

Needs matplotlib (`pip install flashmem[eval]`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt

from .table import tokens

Metrics = Mapping[str, Any]
Sample = Mapping[str, Any]
_DEPTHS = 10


def plots(metrics: Metrics, samples: Sequence[Sample]) -> dict[str, str]:
    """Pictures by name; those that the run has no data for are left out."""
    made = {
        "accuracy-budget": _accuracy_budget(metrics),
        "accuracy-length": _accuracy_length(metrics),
        "recall-budget": _recall_budget(metrics),
        "depth-length": _depth_length(metrics, samples),
        "residency": _residency(metrics, samples),
    }
    return {name: picture for name, picture in made.items() if picture is not None}


CAPTIONS = {
    "accuracy-budget": "Accuracy against the share of a full cache that was held (paper accounting), by length.",
    "accuracy-length": "Accuracy against length: means over the tasks in which full attention does not fail.",
    "recall-budget": "Evidence (filled) and the full run's attention (open) that was on the device, against its share.",
    "depth-length": "Accuracy of questions with one piece of evidence, by where it stands and by length.",
    "residency": "Pages on the device at the start of each cycle, as a share of a full cache (paper accounting).",
}


def _colours(metrics: Metrics) -> dict[str, Any]:
    palette = plt.get_cmap("tab10")
    return {policy: palette(index % 10) for index, policy in enumerate(metrics["policies"])}


def _accuracy_budget(metrics: Metrics) -> str | None:
    averages = [average for average in metrics["averages"] if average["length"] is not None]
    if not averages:
        return None
    lengths = sorted({average["length"] for average in averages})
    figure, axes = plt.subplots(1, len(lengths), figsize=(1.5 + 3.4 * len(lengths), 3.4), sharey=True, squeeze=False)
    colours = _colours(metrics)
    for axis, length in zip(axes[0], lengths, strict=True):
        for average in (a for a in averages if a["length"] == length):
            share = 100 * average["paper_ratio_of_means"]
            policy = average["policy"]
            axis.plot(share, 100 * average["score"], "o", alpha=0.7, color=colours[policy], label=policy)
        axis.set(title=tokens(length), ylim=(-3, 103))
        _share_axis(axis)
    axes[0][0].set_ylabel("accuracy, percent")
    return _svg(figure, legend_of=axes[0][0])


def _accuracy_length(metrics: Metrics) -> str | None:
    averages = [average for average in metrics["averages"] if average["length"] is not None]
    if len({average["length"] for average in averages}) < 2:
        return None
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    colours = _colours(metrics)
    for policy in metrics["policies"]:
        mine = sorted((a for a in averages if a["policy"] == policy), key=lambda a: a["length"])
        axis.plot(
            [a["length"] for a in mine], [100 * a["score"] for a in mine], "o-", color=colours[policy], label=policy
        )
    _length_axis(axis, sorted({average["length"] for average in averages}))
    axis.set(ylabel="accuracy, percent", ylim=(-3, 103))
    return _svg(figure, legend_of=axis)


def _recall_budget(metrics: Metrics) -> str | None:
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    colours, drawn = _colours(metrics), False
    for policy in metrics["policies"]:
        cells = [cell for cell in metrics["cells"] if cell["n"] and cell["policy"] == policy]
        for name, filled in (("evidence_recall", True), ("mass_recall", False)):
            known = [cell for cell in cells if cell[name] is not None]
            if known:
                share = [100 * cell["paper_ratio_of_means"] for cell in known]
                recall = [100 * cell[name] for cell in known]
                face = colours[policy] if filled else "none"
                label = policy if filled else None
                axis.plot(share, recall, "o", color=colours[policy], markerfacecolor=face, markersize=4, label=label)
                drawn = True
    if not drawn:
        plt.close(figure)
        return None
    axis.set(ylabel="on the device, percent", ylim=(-3, 103))
    _share_axis(axis)
    return _svg(figure, legend_of=axis)


def _depth_length(metrics: Metrics, samples: Sequence[Sample]) -> str | None:
    known = [sample for sample in samples if sample["depth"] is not None]
    if not known:
        return None
    lengths = sorted({sample["length"] for sample in known})
    policies = [policy for policy in metrics["policies"] if any(sample["policy"] == policy for sample in known)]
    figure, axes = plt.subplots(1, len(policies), figsize=(1.2 + 1.5 * len(policies), 3.4), sharey=True, squeeze=False)
    image: Any = None
    for axis, policy in zip(axes[0], policies, strict=True):
        grid = np.full((_DEPTHS, len(lengths)), np.nan)
        for column, length in enumerate(lengths):
            for depth in range(_DEPTHS):
                scores = [
                    sample["score"] for sample in known
                    if (sample["policy"], sample["length"]) == (policy, length)
                    and min(_DEPTHS - 1, int(sample["depth"] * _DEPTHS)) == depth
                ]  # fmt: skip
                if scores:
                    grid[depth, column] = 100 * fmean(scores)
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        axis.set_title(policy, fontsize=8)
        axis.set_xticks(range(len(lengths)), [tokens(length) for length in lengths], fontsize=7, rotation=60)
        axis.set_yticks(range(_DEPTHS), [f"{10 * depth}-{10 * depth + 10}" for depth in range(_DEPTHS)], fontsize=7)
    axes[0][0].set_ylabel("depth, percent")
    figure.colorbar(image, ax=axes[0].tolist(), label="accuracy, percent")
    return _svg(figure, tight=False)


def _residency(metrics: Metrics, samples: Sequence[Sample]) -> str | None:
    if not any(len(sample["cycles"]) > 1 for sample in samples):
        return None
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    colours = _colours(metrics)
    longest = 0
    for policy in metrics["policies"]:
        by_cycle: dict[int, list[float]] = {}
        for sample in (sample for sample in samples if sample["policy"] == policy):
            for index, cycle in enumerate(sample["cycles"]):
                by_cycle.setdefault(index, []).append(cycle["paper"] / cycle["full_paper"])
        cycles = sorted(by_cycle)
        longest = max(longest, len(cycles))
        means = [100 * fmean(by_cycle[cycle]) for cycle in cycles]
        axis.plot(cycles, means, "o-", color=colours[policy], markersize=4, label=policy)
    axis.set(xlabel="cycle of the answer", ylabel="KV held, percent of full", yscale="log", xticks=range(longest))
    return _svg(figure, legend_of=axis)


def _share_axis(axis: Any) -> None:
    axis.set_xscale("log")
    shares = [share for share in (1, 2, 5, 10, 20, 50, 100) if share >= 0.5 * min(axis.dataLim.x0, 100)]
    axis.set_xticks(shares, [str(share) for share in shares])
    axis.minorticks_off()
    axis.set_xlabel("KV held, percent of full")


def _length_axis(axis: Any, lengths: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [tokens(length) for length in lengths])
    axis.set_xlabel("tokens of the document")


def _svg(figure: Any, *, legend_of: Any = None, tight: bool = True) -> str:
    """The figure as one <svg> element; two drawings of the same data are the same text."""
    if legend_of is not None:
        handles, labels = legend_of.get_legend_handles_labels()
        figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    if tight:
        figure.tight_layout()
    text = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "flashmem", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    element = text.getvalue()
    element = re.sub(r"<metadata>.*?</metadata>", "", element[element.index("<svg") :], flags=re.DOTALL)
    return re.sub(r"[ \t]+$", "", element, flags=re.MULTILINE)


__all__ = ["CAPTIONS", "plots"]
