"""Everything that a run leaves for people and programs, written beside its samples.

metrics.json   all numbers, with what they were measured on
table.md       tables
report.html    tables and pictures in one file that loads nothing
plots/*.svg    the pictures
kvpress/       the results in the directories that kvpress's evaluation writes
"""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from . import stats, table
from .metrics import compute, load_samples
from .samples import is_answer

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { border: 1px solid #ccc; padding: .2rem .5rem; text-align: right; white-space: nowrap }
thead th { background: #f0f0f0 }
th:first-child { text-align: left }
tr.greyed td, tr.greyed th { color: #999; background: #f7f7f7 }
figure { margin: 1.5rem 0 } figure svg { max-width: 100%; height: auto }
"""


def write_report(
    out: str | Path, *, margin: float = stats.MARGIN, floor: float | None = None, pictures: bool = True
) -> dict[str, Any]:
    """Write all of the above; returns the metrics. Pictures need matplotlib."""
    out = Path(out)
    metrics, samples = compute(out, margin=margin, floor=floor), load_samples(out)
    drawn: dict[str, str] = {}
    if pictures:
        from .plots import plots  # matplotlib is optional and takes a second

        drawn = plots(metrics, [sample for sample in samples if is_answer(sample)])
        (out / "plots").mkdir(exist_ok=True)
        for name, picture in drawn.items():
            (out / "plots" / f"{name}.svg").write_text(picture, encoding="utf-8")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table.markdown(metrics), encoding="utf-8")
    (out / "report.html").write_text(page(metrics, drawn), encoding="utf-8")
    write_kvpress(out / "kvpress", metrics, [sample for sample in samples if is_answer(sample)])
    return metrics


def page(metrics: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    """One HTML page with everything in it."""
    name = html.escape(table.title(metrics))
    parts = [f"<h1>{name}</h1>", *(f"<p>{html.escape(text)}</p>" for text in table.introduction(metrics))]
    made = table.tables(metrics)
    parts += [part.html() for part in made[:1]]
    if drawn:
        from .plots import CAPTIONS

        parts += [
            f"<figure>{_own_ids(picture, name)}<figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>"
            for name, picture in drawn.items()
        ]
    parts += [part.html() for part in made[1:]]
    facts = {"run": metrics["run"], "environments": metrics["environments"]}
    parts.append(f"<h2>Run</h2>\n<pre>{html.escape(json.dumps(facts, indent=1))}</pre>")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def write_kvpress(directory: Path, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """A directory `suite__length__model__policy__ratio` per policy and length; the ratio is the share removed."""
    model = f"flashmem--{metrics['run']['model_name']}"
    for length in sorted({sample["length"] for sample in samples}):
        for policy in metrics["policies"]:
            rows = [sample for sample in samples if (sample["policy"], sample["length"]) == (policy, length)]
            if not rows:
                continue
            removed = 1 - stats.ratio_of_means(*([s["bytes"][name] for s in rows] for name in ("paper", "full_paper")))
            name = "__".join((table.title(metrics), str(length), model, policy, f"{removed:.2f}"))
            _write_kvpress_run(directory / name, metrics, policy, length, removed, rows)


def _write_kvpress_run(
    directory: Path, metrics: Mapping[str, Any], policy: str, length: int, removed: float, rows: Sequence[Any]
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "task", "answer", "predicted_answer", "compression_ratio", "seed"])
        for row in rows:
            ratio = 1 - row["bytes"]["paper"] / row["bytes"]["full_paper"]
            writer.writerow([row["id"], row["task"], row["answers"], row["prediction"], f"{ratio:.4f}", row["seed"]])
    tasks = dict.fromkeys(row["task"] for row in rows)
    scores = {
        task: {"string_match": round(100 * fmean(row["score"] for row in rows if row["task"] == task), 2)}
        for task in tasks
    }
    (directory / "metrics.json").write_text(json.dumps(scores, indent=4) + "\n", encoding="utf-8")
    config = {
        "dataset": table.title(metrics), "data_dir": str(length), "model": metrics["run"]["model_name"],
        "press_name": policy, "compression_ratio": round(removed, 4), "threshold": metrics["run"]["lsa"]["threshold"],
        "fraction": 1.0, "query_aware": True, "seed": metrics["run"]["lsa"]["seed"],
    }  # fmt: skip
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in config.items()]  # JSON scalars are YAML
    (directory / "config.yaml").write_text("".join(lines), encoding="utf-8")


def _own_ids(picture: str, name: str) -> str:
    """Several pictures in one page must not share ids."""
    picture = re.sub(r'\bid="', f'id="{name}-', picture)
    picture = re.sub(r'href="#', f'href="#{name}-', picture)
    return re.sub(r"url\(#", f"url(#{name}-", picture)


__all__ = ["page", "write_kvpress", "write_report"]
