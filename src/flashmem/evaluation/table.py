"""The numbers as tables that people read: `table.md`, and the same tables in HTML.

The first two are in the paper's layout, `accuracy (GiB)`, one per accounting.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .metrics import gib

Metrics = Mapping[str, Any]
_ACCOUNTINGS = {
    "paper": "Resident CSA entries with their index keys, and HCA entries: what the paper's column counts.",
    "all_in": "Everything that a session holds on the device. Full: what a system without paging holds.",
}
_GREYED = "† Full attention itself fails here; in no average and no comparison."


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table with a paragraph that says how to read it."""

    title: str
    text: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    greyed: frozenset[int] = frozenset()
    """Rows to be shown as not counting."""

    def markdown(self) -> str:
        rows = [
            [f"*{row[0]}* †", *(f"*{cell}*" for cell in row[1:])] if index in self.greyed else row
            for index, row in enumerate(self.rows)
        ]
        lines = ["| " + " | ".join(self.head) + " |", "|" + "---|" * len(self.head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        return f"## {self.title}\n\n{self.text}\n\n" + "\n".join(lines) + (f"\n\n{_GREYED}" if self.greyed else "")

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        body = ""
        for index, row in enumerate(self.rows):
            kind = ' class="greyed"' if index in self.greyed else ""
            first = html.escape(row[0]) + (" †" if index in self.greyed else "")
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            body += f"<tr{kind}><th>{first}</th>{cells}</tr>\n"
        note = f"<p>{_GREYED}</p>" if self.greyed else ""
        return (
            f"<h2>{html.escape(self.title)}</h2>\n<p>{html.escape(self.text)}</p>\n"
            f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>\n{note}"
        )


def markdown(metrics: Metrics) -> str:
    """The whole report as text."""
    parts = [f"# {title(metrics)}", *introduction(metrics), *(table.markdown() for table in tables(metrics))]
    return "\n\n".join(parts) + "\n"


def title(metrics: Metrics) -> str:
    return str(metrics["run"]["suite"])


def introduction(metrics: Metrics) -> list[str]:
    """Paragraphs that say what was run."""
    run, lsa = metrics["run"], metrics["run"]["lsa"]
    rule = f"{percent(lsa['keep'])} % of pages" if lsa["keep"] is not None else f"threshold {lsa['threshold']}"
    filler = run["made"].get("filler")
    made_by = metrics["environments"][0]
    hardware = ", ".join(made_by["gpus"]) or made_by["cpu"]
    lines = [
        f"{metrics['samples']:,} of {run['samples']:,} answers. LSA: {rule}, pages of {lsa['page_chunks']} chunks, tau "
        f"{lsa['tau']}, {lsa['sink_pages']} sink and {lsa['recency_pages']} recency pages. Model {run['model_name']} "
        f"{run['model']}, indexer {run['indexer']}, {run['dtype']} on {hardware}, items {run['items_sha256'][:16]}"
        + (f" (filler: {filler})." if filler else "."),
        "Policies at @match hold, item by item and cycle by cycle, as many pages as LSA. Accuracies are mean scores in "
        "percent; policies with several seeds are means over them. The first token of an answer follows from the "
        "question's prefill, which reads the whole history under every policy.",
    ]
    if metrics["judge"] is not None:
        lines.append(f"Scores are verdicts of {metrics['judge']}.")
    return lines if metrics["complete"] else ["The run is incomplete: these numbers are preliminary.", *lines]


def tables(metrics: Metrics) -> list[Table]:
    """All tables of a report."""
    made: list[Table] = []
    if metrics["rows"]:
        made += [_layout(metrics, accounting, meaning) for accounting, meaning in _ACCOUNTINGS.items()]
        made += [_ratios(metrics), _recall(metrics), _intervals(metrics)]
    if metrics["comparisons"]:
        made.append(_comparisons(metrics))
    return made + ([_perplexity(metrics)] if metrics["perplexity"] else [])


def _layout(metrics: Metrics, accounting: str, meaning: str) -> Table:
    """Rows: tasks by length; columns: policies; cells: `accuracy (GiB)`."""
    cells = {(c["task"], c["length"], c["policy"]): c for c in metrics["cells"]}
    rows = [
        [
            _row_name(row),
            *(_score_gib(cells[row["task"], row["length"], policy], accounting) for policy in metrics["policies"]),
        ]
        for row in metrics["rows"]
    ]
    greyed = frozenset(index for index, row in enumerate(metrics["rows"]) if row["greyed"])
    averages = {(a["length"], a["policy"]): a for a in _distinct(metrics, metrics["averages"])}
    for length in dict.fromkeys(length for length, _ in averages):
        name = "average" if length is None else f"average {tokens(length)}"
        rows.append([name, *(_score_gib(averages.get((length, p)), accounting) for p in metrics["policies"])])
    name = f"Accuracy (GiB), {_name(accounting)} accounting"
    return Table(name, meaning, ["", *metrics["policies"]], rows, greyed)


def _ratios(metrics: Metrics) -> Table:
    kinds = ("mean_of_ratios", "ratio_of_means")
    rows = [
        [
            _length(average["length"]), average["policy"],
            *(percent(average[f"{name}_{kind}"]) for name in _ACCOUNTINGS for kind in kinds),
        ]
        for average in _distinct(metrics, metrics["averages"])
    ]  # fmt: skip
    head = [f"{_name(name)}: {kind.replace('_', ' ')}" for name in _ACCOUNTINGS for kind in kinds]
    text = (
        "Percent. The mean of ratios lets every row count alike (the paper's 13.5 % is one), the ratio of means every "
        "byte."
    )
    return Table("KV held, of a full cache", text, ["length", "policy", *head], rows)


def _recall(metrics: Metrics) -> Table:
    rows = [
        [
            _row_name(c), c["policy"], _known(c["evidence_recall"]), _known(c["mass_recall"]),
            f"{c['cycles']:.2f}", f"{c['moved_bytes'] / 2**20:.3g}", f"{c['widened']} / {c['early']}",
        ]
        for c in metrics["cells"]
        if c["n"]
    ]  # fmt: skip
    text = (
        "Evidence: pages that the answer needs and that were on the device when it began. Attention: share of the full "
        "run's attention to pages outside the always-kept ones that fell on resident pages. MiB moved: to the device, "
        "after the first selection. Widened, early: rescues in all answers."
    )
    head = ["", "policy", "evidence", "attention", "cycles", "MiB moved", "widened / early"]
    return Table("What was kept", text, head, rows)


def _intervals(metrics: Metrics) -> Table:
    rows = [
        [
            _row_name(c), c["policy"], str(c["n"]), str(c["documents"]), percent(c["score"]),
            _interval(c["interval"]), c["interval_kind"], f"{c['right']} of {c['answers']}",
            _interval(c["right_interval"]),
        ]
        for c in metrics["cells"]
        if c["n"]
    ]  # fmt: skip
    text = (
        "95 %. Wilson where scores are 0 or 1 and there is one seed, else a bootstrap over documents (10,000 "
        "resamples), which is too narrow where documents are few, and none where there is one. Right: answers with "
        "the full score, with Wilson's interval, which takes them for independent."
    )
    head = ["", "policy", "items", "documents", "accuracy", "interval", "kind", "right", "interval of right"]
    return Table("Intervals", text, head, rows)


def _comparisons(metrics: Metrics) -> Table:
    rows = []
    for c in _distinct(metrics, metrics["comparisons"]):
        pooled = c["task"] is None
        gap = c["interval"]
        rows.append(
            [
                f"{c['policy']} − {c['against']}",
                f"{'all tasks,' if pooled else c['task']} {_length(c['length'])}",
                f"{c['pairs']} / {c['clusters']}",
                f"{100 * c['difference']:+.1f}",
                "-" if gap is None else f"{100 * gap[0]:+.1f} to {100 * gap[1]:+.1f}",
                f"{c['gained']} / {c['lost']}",
                p_value(c["mcnemar_p"]) if pooled else f"{p_value(c['mcnemar_p'])} ({p_value(c['holm_p'])})",
                p_value(c["noninferior_p"]),
                "yes" if c["noninferior"] else "no",
            ]
        )
    text = (
        "Points: mean score of the first minus the second, on the same items. Interval: paired bootstrap over "
        "documents, at the level at which Holm's procedure over the rows tests the row (95 % for pooled rows). Gained, "
        "lost: right only with the first, only with the second; of policies with seeds, the seed that the first fares "
        f"worst against. McNemar: exact. Non-inferior: not {100 * metrics['margin']:g} points or more below, one-sided "
        "at 5 %; p is the larger of Tango's score test on right answers and the bootstrap's on scores."
    )
    head = ["policies", "rows", "pairs / documents", "points", "interval", "gained / lost", "McNemar p (Holm)",
            "non-inferior p", "non-inferior"]  # fmt: skip
    return Table("Paired comparisons", text, head, rows)


def _perplexity(metrics: Metrics) -> Table:
    rows = []
    for entry in metrics["perplexity"]:
        gap, ends = entry.get("above_full"), entry.get("above_full_interval")
        rows.append(
            [
                f"{tokens(entry['length'])}, tokens {entry['first'] + 1}-{entry['last']}",
                entry["policy"],
                str(entry["n"]),
                f"{entry['nats']:.4f}",
                f"{entry['perplexity']:.3f}",
                "-" if gap is None else f"{gap:+.4f}",
                "-" if ends is None else f"{ends[0]:+.4f} to {ends[1]:+.4f}",
                percent(entry["paper_ratio_of_means"]),
            ]
        )
    text = (
        "Rows: tokens before the continuation, and which of its tokens. Above full: nats per token more than with full "
        "attention on the same passages, with a bootstrap interval over them. KV: percent of a full cache, paper "
        "accounting."
    )
    head = ["", "policy", "passages", "nats", "perplexity", "above full", "95 %", "KV"]
    return Table("Perplexity", text, head, rows)


def tokens(count: int) -> str:
    """65536 is 64K; 0, a length that is not fixed, is nothing."""
    if not count:
        return ""
    for unit, size in (("M", 1024**2), ("K", 1024)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def _distinct(metrics: Metrics, entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without what is said of all lengths where there is one."""
    one = len({row["length"] for row in metrics["rows"] if not row["greyed"]}) == 1
    return [entry for entry in entries if entry["length"] is not None or not one]


def _row_name(row: Mapping[str, Any]) -> str:
    return f"{row['task']} {tokens(row['length'])}".rstrip()


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _length(length: int | None) -> str:
    return "all lengths" if length is None else tokens(length)


def _interval(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"{percent(ends[0])}-{percent(ends[1])}"


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def _score_gib(values: Mapping[str, Any] | None, accounting: str) -> str:
    if values is None or not values.get("n", 1):
        return "-"
    return f"{percent(values['score'])} ({gib(values['bytes'][accounting])})"


def _name(accounting: str) -> str:
    return accounting.replace("_", "-")


def _known(share: float | None) -> str:
    return "-" if share is None else percent(share)


__all__ = ["Table", "introduction", "markdown", "p_value", "percent", "tables", "title", "tokens"]
