"""Write the tables of docs/models/demo.md and the learning curves beside it, from result files and the training log.

python -m benchmarks.demo_report

Only the parts of the page between their markers are replaced. Intervals of one-question documents are Wilson's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from benchmarks.common import ROOT
from flashmem.evaluation.table import tokens
from flashmem.training.backbone.gates import wilson

RESULTS, PAGE = ROOT / "results/backbone", ROOT / "docs/models/demo.md"
CURVES, LOG = ROOT / "docs/models/demo-training.svg", ROOT / "src/flashmem/models/demo/training_log.jsonl"
LONG = ("gates-long-h100.json", "gates-1m-h200.json")
PARTS = ("results", "lsa", "kept", "paper")
"""Parts of the page between markers that name them."""
MINI_TABLE = ROOT / "results/mini-table1"
OF_PAPER = ("recency-tail", "random-10%")
POLICIES = ("full", "lsa", "native@match", "carry-over@match", "recency@match", "random@match")
KINDS = ("single", "multikey", "multivalue", "multiquery", "vt", "ahead", "mixed")


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return result


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(pair: dict[str, Any]) -> str:
    """A comparison's difference and interval."""
    low, high = (f"{100 * value:+.1f}" for value in pair["interval"])
    return f"{100 * pair['difference']:+.1f} ({low} to {high})"


def cell_text(cell: dict[str, Any]) -> str:
    """Exact answers in percent, how many of how many, and the interval."""
    count, documents = cell["questions"], cell["documents"]
    right = round(cell["exact"] * count)
    low, high = wilson(right, count) if count == documents else cell["exact_interval"]
    return f"{percent(cell['exact'])} ({right}/{count}; {percent(low)}-{percent(high)})"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def by_length(gates: dict[str, Any]) -> str:
    """Rows: kinds; columns: lengths, all entries attended."""
    cells = {(c["kind"], c["length"]): c for c in gates["cells"] if c["condition"] == "full"}
    lengths = sorted({length for _, length in cells})
    rows = [[kind, *(cell_text(cells[kind, n]) if (kind, n) in cells else "-" for n in lengths)] for kind in KINDS]
    return table(["task", *map(tokens, lengths)], rows)


def conditions(gates: dict[str, Any], length: int, names: Iterable[str]) -> str:
    """Rows: how mixed documents are read; columns: families."""
    cells = {c["condition"]: c for c in gates["cells"] if c["kind"] == "mixed" and c["length"] == length}
    families = sorted(cells["full"]["families"])
    rows = [[name, *mixed_row(cells[name], families)] for name in names if name in cells]
    return table(["entries", "all questions", *families], rows)


def beyond(cells: list[dict[str, Any]]) -> str:
    """Mixed documents of the longest lengths, all entries and top-k."""
    families = sorted(cells[0]["families"])
    rows = [[tokens(c["length"]), c["condition"], *mixed_row(c, families)] for c in cells]
    return table(["length", "entries", "all questions", *families], rows)


def mixed_row(cell: dict[str, Any], families: Iterable[str]) -> list[str]:
    return [cell_text(cell), *(percent(cell["families"][family]["exact"]) for family in families)]


def crowded(result: dict[str, Any]) -> str:
    """Documents with 48 questions in RULER's words, by family."""
    rows = []
    for cell in result["cells"]:
        for family, part in cell["families"].items():
            interval = f"{percent(part['exact_interval'][0])}-{percent(part['exact_interval'][1])}"
            count = f"{part['questions']} in {part['documents']}"
            exact = f"{percent(part['exact'])} ({interval})"
            rows.append([tokens(cell["length"]), family, count, exact, percent(part["values"])])
    return table(["length", "family", "questions in documents", "exact (interval)", "values"], rows)


def topk_change(gates: dict[str, Any]) -> str:
    rows = []
    full = {(c["kind"], c["length"]): c for c in gates["cells"] if c["condition"] == "full"}
    for c in gates["cells"]:
        if c["condition"].startswith("top"):
            change = 100 * (c["exact"] - full[c["kind"], c["length"]]["exact"])
            before = percent(full[c["kind"], c["length"]]["exact"])
            count = str(c["questions"])
            rows.append([c["kind"], tokens(c["length"]), count, before, percent(c["exact"]), f"{change:+.1f}"])
    return table(["task", "length", "questions", "all entries", "top 64", "points"], rows)


def stock() -> str:
    result = load("stock.json")
    rows = [
        [r["kind"], tokens(r["tokens"]), f"{round(r['exact'] * r['documents'])}/{r['documents']}"]
        for r in result["answers"]
    ]
    loss = result["book_loss"]
    text = (
        f"\nHeld-out books: {loss['nats_per_token']} nats per token (standard error {loss['standard_error']}, "
        f"{loss['passages']} passages of {loss['tokens_each']} tokens), "
        f"{loss['bits_per_character']} bits per character.\n"
    )
    return table(["task", "length", "right, greedy"], rows) + text


def training(rows: list[dict[str, Any]]) -> str:
    stages = [row for row in rows if row.get("event") == "stage"]
    end = next(row for row in reversed(rows) if row.get("event") == "end")
    made = []
    for stage in stages:
        mine = [row for row in rows if row.get("stage") == stage["stage"] and "loss" in row]
        rate = sorted(row["tokens_per_s"] for row in mine)[len(mine) // 2]
        tokens = f"{stage['length']:,}"
        made.append([tokens, str(mine[0]["step"]), str(mine[-1]["step"]), f"{stage['setup_s']:.1f}", f"{rate:,}"])
    head = ["row length", "first logged step", "last step", "set-up s", "median tokens/s"]
    note = f"\n{end['step']:,} steps, {end['tokens'] / 1e6:.0f} M tokens, {end['seconds']:.0f} s in all.\n"
    return table(head, made) + note


def plot(rows: list[dict[str, Any]]) -> None:
    """First value tokens right, by family, over steps; hidden rows are among them."""
    logged = [row for row in rows if "first" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    for family in ("number", "multivalue", "several", "kv", "vt", "talk", "hop", "song"):
        picked = [row for row in logged if family in row["first"]]
        left.plot([r["step"] for r in picked], [r["first"][family] for r in picked], label=family, linewidth=0.9)
    left.set(xlabel="step", ylabel="first token of a value right", ylim=(0, 1))
    left.legend(fontsize=7, ncols=2)
    picked = [row for row in logged if "lm" in row["losses"]]
    right.plot([r["step"] for r in picked], [r["losses"]["lm"] for r in picked], label="novels, nats per token")
    right.set(xlabel="step", ylabel="loss")
    twin = right.twinx()
    twin.plot([r["step"] for r in logged], [r["kl"] for r in logged], color="tab:orange", label="indexer KL")
    twin.set(ylabel="KL", ylim=(0, 0.12))
    for axis in (left, right):
        for row in (row for row in rows if row.get("event") == "stage"):
            first = next((r["step"] for r in logged if r["stage"] == row["stage"]), 0)
            axis.axvline(first, color="grey", linewidth=0.6, linestyle=":")
    right.legend(loc="upper right", fontsize=7)
    twin.legend(loc="center right", fontsize=7)
    figure.tight_layout()
    figure.savefig(CURVES, metadata={"Date": None})
    CURVES.write_text("\n".join(line.rstrip() for line in CURVES.read_text().splitlines()) + "\n")


def mini_runs(kind: str = "") -> list[dict[str, Any]]:
    """Metrics of the evaluation's runs, shortest first. Folders of runs at half the pages end with "-half", those with
    the published baselines with "-paper"."""
    paths = [path for path in MINI_TABLE.glob("*/metrics.json") if path.parent.name.partition("-")[2] == kind]
    runs: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
    return sorted(runs, key=lambda metrics: int(metrics["run"]["made"]["lengths"][0]))


def lsa() -> str:
    """Rows: task and length; columns: policies at LSA's bytes, and LSA's difference to full attention."""
    rows = []
    for metrics in mini_runs():
        cells = {(cell["task"], cell["policy"]): cell for cell in metrics["cells"]}
        for pair in metrics["comparisons"]:
            if (pair["policy"], pair["against"]) != ("lsa", "full") or pair["length"] is None:
                continue
            task, length = pair["task"], tokens(pair["length"])
            scores = [percent(cells[task, policy]["score"]) if task else "" for policy in POLICIES]
            rows.append([length, task or "all", f"{pair['pairs']} / {pair['clusters']}", *scores, points(pair)])
    head = ["length", "task", "questions / documents", *(name.removesuffix("@match") for name in POLICIES)]
    return table([*head, "LSA - full, points"], rows)


def kept() -> str:
    """Rows: runs; columns: what LSA holds of a full cache, and all tasks together against full attention."""
    rows = []
    for metrics in [*mini_runs(), *mini_runs("half")]:
        pair = next(
            pair for pair in metrics["comparisons"]
            if (pair["policy"], pair["against"], pair["task"]) == ("lsa", "full", None) and pair["length"] is not None
        )  # fmt: skip
        held = next(row for row in metrics["averages"] if row["policy"] == "lsa" and row["length"] == pair["length"])
        rows.append([
            tokens(pair["length"]), percent(metrics["run"]["lsa"]["keep"]),
            percent(held["paper_ratio_of_means"]), percent(held["all_in_ratio_of_means"]),
            f"{pair['pairs']} / {pair['clusters']}", points(pair),
            "yes" if pair["noninferior"] else "no",
        ])  # fmt: skip
    head = ["length", "pages, %", "paper bytes, %", "all-in bytes, %", "questions / documents", "LSA - full, points"]
    return table([*head, "non-inferior at 2 points"], rows)


def paper() -> str:
    """Rows: lengths; columns: the published baselines' scores, of what bytes, and how far LSA is above them."""
    rows = []
    for metrics in mini_runs("paper"):
        (length,) = metrics["run"]["made"]["lengths"]
        averages = {row["policy"]: row for row in metrics["averages"] if row["length"] == length}
        pairs = {
            pair["against"]: pair for pair in metrics["comparisons"]
            if (pair["policy"], pair["task"], pair["length"]) == ("lsa", None, length)
        }  # fmt: skip
        row = [tokens(length), f"{metrics['samples']:,} of {metrics['run']['samples']:,}"]
        for policy in ("full", "lsa", *OF_PAPER):
            held = averages[policy]
            row.append(f"{percent(held['score'])} ({percent(held['paper_ratio_of_means'])} %)")
        rows.append([*row, *(points(pairs[policy]) for policy in OF_PAPER)])
    head = ["length", "answers", "full", "lsa", *OF_PAPER, *(f"LSA - {name}" for name in OF_PAPER)]
    return table(head, rows)


def results(rows: list[dict[str, Any]]) -> str:
    gates = load("gates-h200.json")
    order = ("full", "top64", "none", "only0", "only1", "only2", "without0", "without1", "without2")
    parts = [
        "### Recall by length\n", by_length(gates),
        "\n### Crowded documents\n", crowded(load("many-16k-cpu.json")),
        "\n### Layers, mixed documents at 16K\n", conditions(gates, 16_384, order),
        "\n### Beyond 128K, mixed documents\n", beyond([cell for name in LONG for cell in load(name)["cells"]]),
        "\n### Top-k\n", topk_change(gates),
        "\n### Stock transformers\n", stock(),
        "\n### The run\n", training(rows),
    ]  # fmt: skip
    return "\n".join(parts)


def page(rows: list[dict[str, Any]]) -> str:
    """The page with its tables made anew; `rows` are the training log's."""
    text = PAGE.read_text()
    for name, made in zip(PARTS, (results(rows), lsa(), kept(), paper()), strict=True):
        begin, end = f"<!-- begin {name}: written by benchmarks/demo_report.py -->", f"<!-- end {name} -->"
        before, after = text[: text.index(begin)], text[text.index(end) :]
        text = f"{before}{begin}\n\n{made}\n{after}"
    return text


def training_log() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LOG.read_text().splitlines()]


def main() -> None:
    rows = training_log()
    PAGE.write_text(page(rows))
    plot(rows)


if __name__ == "__main__":
    main()
