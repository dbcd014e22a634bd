"""Compare Memory Indexers and baselines on the same documents: recall of what windows need, by budget.

    python -m flashmem.training.compare shards-test --indexer ours=run-0/indexer --indexer ours=run-1/indexer \\
        --indexer published=pub-0/indexer --best ours --out results/indexer/table.json

Indexers of one name are seeds of one recipe: a document's value is the mean over them. Writes JSON and, beside it, a
Markdown table. Intervals are 95 %, a bootstrap over documents; differences are paired by document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..capture.format import Document, ShardReader
from ..indexer import MemoryIndexer
from . import metrics
from .data import PageRules, Queries, queries_of

LOOKAHEAD = ("several", "multivalue", "song", "vt", "hop")
"""Families whose answers need several things, or more than one window."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Setup:
    """What is compared, and by which rules."""

    rules: PageRules
    tau: int
    target: Mapping[str, float] = field(default_factory=lambda: {"mass": 1.0})
    layer_weights: Mapping[int, float] = field(default_factory=dict)
    budgets: tuple[float, ...] = metrics.BUDGETS


@dataclass(slots=True)
class Part:
    """One document as the comparison reads it."""

    queries: Queries
    groups: dict[str, np.ndarray]
    """Name of a group of queries -> bool [Q]."""


def read_part(document: Document, shards: ShardReader, setup: Setup) -> Part:
    """The document's queries at which level 1 runs, and their groups: all, first and later windows, families."""
    queries = metrics.served(
        queries_of(
            document, shards.meta, setup.rules, target=dict(setup.target), layer_weights=setup.layer_weights
        ),
        setup.tau,
    )  # fmt: skip
    starts = queries.turns[:, 0]
    first = (queries.positions[:, -1] == starts - 1).numpy()
    groups = {"all": np.ones(len(queries), bool), "first windows": first, "later windows": ~first}
    if families := document.meta.get("families"):
        turns = sorted(set(document.turns[:, 0].tolist()))
        if len(turns) == len(families):
            family = [families[turns.index(start)] for start in starts.tolist()]
            ahead = np.array([name in LOOKAHEAD for name in family])
            groups |= {"lookahead": ahead, "one thing": ~ahead}
            groups |= {name: np.array([other == name for other in family]) for name in sorted(set(family))}
    return Part(queries, groups)


def scorers(shards: ShardReader, indexers: Mapping[str, Sequence[MemoryIndexer]], tau: int) -> dict[str, list[Any]]:
    """Name -> page scorers (its seeds): the indexers, and the baselines that need no training."""
    made: dict[str, list[Any]] = {name: [metrics.by_indexer(x) for x in seeds] for name, seeds in indexers.items()}
    native = MemoryIndexer.from_pretrained(shards.directory / "native")
    for m in sorted({1, shards.meta.observe}):
        made[f"native m={m}"] = [metrics.by_indexer(native.derive(observation_window=m))]
    return made | {
        "carry-over": [metrics.carry_over(tau)],
        "recency": [metrics.recency],
        "random": [metrics.random_pages(seed) for seed in SEEDS],
        "oracle": [metrics.oracle],
    }


def compare(
    shards: ShardReader, indexers: Mapping[str, Sequence[MemoryIndexer]], setup: Setup, *, best: str | None = None
) -> dict[str, Any]:
    """The table as JSON values: per scorer, group and length the recalls by budget; differences of `best` to others."""
    parts = [read_part(document, shards, setup) for document in shards]
    lengths = [entry.tokens for entry in shards.entries]
    buckets = {"all lengths": np.ones(len(parts), bool)}
    buckets |= {f"{n}": np.array([length == n for length in lengths]) for n in sorted(set(lengths))}
    groups = list(dict.fromkeys(name for part in parts for name in part.groups))
    # scorer -> kind -> group -> [documents, budgets], mean over seeds
    values: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    errors: dict[str, float | None] = {}
    for name, seeds in scorers(shards, indexers, setup.tau).items():
        found = [
            [metrics.recalls(score(part.queries), part.queries, setup.budgets) for part in parts] for score in seeds
        ]
        values[name] = {
            kind: {group: _over_seeds(found, parts, kind, group) for group in groups} for kind in ("need", "evidence")
        }
        errors[name] = _calibration(indexers[name], parts) if name in indexers else None
    rows = []
    for name, kinds in values.items():
        for kind, by_group in kinds.items():
            for group, table_DG in by_group.items():
                for bucket, chosen in buckets.items():
                    if bucket == "all lengths" or group in ("all", "lookahead"):
                        rows.append({"scorer": name, "recall": kind, "group": group, "length": bucket,
                                     **_summary(table_DG[chosen], setup.budgets)})  # fmt: skip
    result: dict[str, Any] = {
        "bench": "indexer",
        "documents": len(parts),
        "queries": sum(len(part.queries) for part in parts),
        "lengths": {str(n): lengths.count(n) for n in sorted(set(lengths))},
        "page_chunks": setup.rules.page_chunks,
        "always_kept": {"sink_pages": setup.rules.sink_pages, "recency_pages": setup.rules.recency_pages},
        "tau": setup.tau,
        "target": dict(setup.target),
        "layer_weights": {str(csa): weight for csa, weight in setup.layer_weights.items()},
        "budgets": list(setup.budgets),
        "seeds": {name: len(seeds) for name, seeds in indexers.items()},
        "calibration_error": errors,
        "rows": rows,
    }
    if best is not None:
        result["best"] = best
        result["differences"] = [
            {"to": name, "recall": kind, "group": group, **_summary(values[best][kind][group] - table, setup.budgets)}
            for name, kinds in values.items() if name != best
            for kind, by_group in kinds.items()
            for group, table in by_group.items()
        ]  # fmt: skip
    return result


def _over_seeds(found: Sequence[Sequence[metrics.Recalls]], parts: Sequence[Part], kind: str, group: str) -> np.ndarray:
    per_seed = []
    for recalls in found:
        tables = [getattr(item, f"{kind}_QG") for item in recalls]
        masks = [part.groups.get(group, np.zeros(len(part.queries), bool)) for part in parts]
        per_seed.append(metrics.document_means([table[mask] for table, mask in zip(tables, masks, strict=True)]))
    return np.mean(per_seed, axis=0)


def _summary(table_DG: np.ndarray, budgets: Sequence[float]) -> dict[str, Any]:
    by_budget = {f"{100 * keep:g}%": _interval(table_DG[:, i]) for i, keep in enumerate(budgets)}
    return {"documents": int((~np.isnan(table_DG[:, 0])).sum()), **by_budget,
            "area": _interval(metrics.area(table_DG, budgets))}  # fmt: skip


def _interval(values_D: np.ndarray) -> list[float | None]:
    return [None if np.isnan(x) else round(x, 4) for x in metrics.bootstrap(values_D)]


def _calibration(seeds: Sequence[MemoryIndexer], parts: Sequence[Part]) -> float:
    found = []
    for indexer in seeds:
        probability, wanted = [], []
        for part in parts:
            eligible = part.queries.eligible_pages()
            probability.append(torch.sigmoid(metrics.by_indexer(indexer)(part.queries))[eligible])
            wanted.append(metrics.wanted_pages(part.queries)[eligible])
        found.append(metrics.calibration_error(torch.cat(probability).numpy(), torch.cat(wanted).numpy()))
    return round(float(np.mean(found)), 4)


def markdown(result: Mapping[str, Any]) -> str:
    """Tables of recall in percent, by budget: all served queries, the lookahead part, first and later windows."""
    budgets = [f"{100 * keep:g}%" for keep in result["budgets"]]
    lines = [
        f"# Recall of what a window needs, {result['documents']} documents, {result['queries']} queries", "",
        f"Documents by tokens: {', '.join(f'{count} of {n}' for n, count in result['lengths'].items())}. Pages of "
        f"{result['page_chunks']} chunks; budgets count always-kept pages, recall leaves them out. Mean over documents "
        "and its 95 % interval (bootstrap over documents); seeds are averaged per document.", "",
    ]  # fmt: skip
    for kind, title in (("evidence", "Evidence recall"), ("need", "Attention-mass recall")):
        for group in ("all", "lookahead", "first windows", "later windows"):
            rows = [r for r in result["rows"] if (r["recall"], r["group"], r["length"]) == (kind, group, "all lengths")]
            if not rows:
                continue
            lines += [f"## {title}, {group}", "", "| scorer | " + " | ".join(budgets) + " | area |",
                      "|---" * (len(budgets) + 2) + "|"]  # fmt: skip
            lines += [f"| {r['scorer']} | " + " | ".join(_cell(r[c]) for c in (*budgets, "area")) + " |" for r in rows]
            lines.append("")
    if "differences" in result:
        for kind in ("evidence", "need"):
            rows = [r for r in result["differences"] if (r["recall"], r["group"]) == (kind, "lookahead")]
            lines += [f"## {result['best']} minus others, {kind}, lookahead, paired, points", "",
                      "| other | " + " | ".join(budgets) + " | area |", "|---" * (len(budgets) + 2) + "|"]  # fmt: skip
            lines += [f"| {r['to']} | " + " | ".join(_cell(r[c]) for c in (*budgets, "area")) + " |" for r in rows]
            lines.append("")
    shown = {name: error for name, error in result["calibration_error"].items() if error is not None}
    lines += ["Expected calibration error of page probabilities: "
              + ", ".join(f"{name} {error:.4f}" for name, error in shown.items()) + ".", ""]  # fmt: skip
    return "\n".join(lines)


def _cell(interval: Sequence[float | None]) -> str:
    mean, low, high = interval
    return (
        "-" if mean is None or low is None or high is None else f"{100 * mean:.1f} ({100 * low:.1f}..{100 * high:.1f})"
    )


def parse_indexers(texts: Sequence[str]) -> dict[str, list[MemoryIndexer]]:
    """'name=path' items; the same name again is another seed."""
    made: dict[str, list[MemoryIndexer]] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"an indexer is given as name=path, got {text!r}")
        made.setdefault(name, []).append(MemoryIndexer.from_pretrained(path).eval())
    return made


def parse_weights(texts: Sequence[str]) -> dict[int, float]:
    """'csa=weight' items."""
    return {int(csa): float(weight) for csa, _, weight in (text.partition("=") for text in texts)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides a comparison."""
    parser.add_argument("shards", type=Path, nargs="+")
    parser.add_argument("--indexer", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--best", help="name whose differences to all others are shown")
    parser.add_argument("--page-chunks", type=int, default=64)
    parser.add_argument("--sink-pages", type=int, default=1)
    parser.add_argument("--recency-pages", type=int, default=2)
    parser.add_argument("--layer-weights", nargs="*", default=[], metavar="CSA=WEIGHT")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The comparison that the arguments ask for. Raises ValueError for what they name wrongly."""
    shards = ShardReader(*args.shards)
    rules = PageRules(
        page_chunks=args.page_chunks, sink_pages=args.sink_pages, recency_pages=args.recency_pages
    )  # fmt: skip
    setup = Setup(rules, shards.meta.tau, layer_weights=parse_weights(args.layer_weights))
    return compare(shards, parse_indexers(args.indexer), setup, best=args.best)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    result = run(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
