"""The picture of a comparison: which pages were on the device in each cycle, and where the evidence was.

Rows are cycles, columns are pages. In the terminal, neighbouring pages share a column so that 80 are enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.text import Text

from .compare import Comparison, Setting
from .document import Document

WIDTH = 80
_LABEL_WIDTH = 12
_SHADES = "·░▒▓█"
_FOUND, _MISSED = "◆", "◇"
LEGEND = f"{_SHADES[0]} no page of a column resident … {_SHADES[-1]} all; evidence: {_FOUND} resident, {_MISSED} not"
_PIXELS_PER_INCH = 100
_MARKERS = ((True, "tab:green", "o", "evidence resident"), (False, "tab:red", "x", "evidence not resident"))


@dataclass(frozen=True, slots=True)
class CycleRow:
    """One row of the picture."""

    question: int
    cycle: int
    resident: frozenset[int]
    evidence: frozenset[int]
    right: bool


def rows(document: Document, setting: Setting, page_tokens: int) -> Iterator[CycleRow]:
    """The cycles of all questions, one after another."""
    for number, (asked, reply) in enumerate(zip(document.questions, setting.replies, strict=True), start=1):
        evidence = frozenset(pages_of(asked.evidence, page_tokens))
        for cycle, resident in enumerate(reply.cycles, start=1):
            yield CycleRow(number, cycle, frozenset(resident), evidence, reply.right)


def pages_of(spans: Sequence[tuple[int, int]], page_tokens: int) -> list[int]:
    """Pages that hold tokens of these spans, ascending."""
    pages = (range(first // page_tokens, (last - 1) // page_tokens + 1) for first, last in spans)
    return sorted(set(chain.from_iterable(pages)))


def terminal_lines(document: Document, setting: Setting, page_tokens: int) -> Iterator[Text]:
    """Lines of at most `WIDTH` characters."""
    lines = list(rows(document, setting, page_tokens))
    num_pages = 1 + max(max(row.resident) for row in lines)
    for row in lines:
        label = f"{row.question}. cycle {row.cycle}" if row.cycle == 1 else f"   cycle {row.cycle}"
        yield Text(f"{label:<{_LABEL_WIDTH}}").append_text(_cells(row, num_pages, WIDTH - _LABEL_WIDTH))


def _cells(row: CycleRow, num_pages: int, width: int) -> Text:
    """One character per column of neighbouring pages."""
    columns = min(num_pages, width)
    line = Text()
    for column in range(columns):
        pages = range(column * num_pages // columns, (column + 1) * num_pages // columns)
        if evidence := row.evidence.intersection(pages):
            found = evidence <= row.resident
            line.append(_FOUND if found else _MISSED, style="bold green" if found else "bold red")
        else:
            share = len(row.resident.intersection(pages)) / len(pages)
            line.append(_SHADES[math.ceil(share * (len(_SHADES) - 1))], style="" if share else "dim")
    return line


def write_png(path: Path, document: Document, comparison: Comparison) -> None:
    """Draw LSA above recency, one row per cycle, one column per page. Needs matplotlib."""
    from matplotlib.figure import Figure  # optional, and slow to import

    shown = comparison.settings[1:]
    tables = [list(rows(document, setting, comparison.page_tokens)) for setting in shown]
    num_pages = 1 + max(max(row.resident) for table in tables for row in table)
    figure = Figure(figsize=(10, 1.6 + 0.17 * sum(map(len, tables))), dpi=_PIXELS_PER_INCH, layout="constrained")
    axes = figure.subplots(
        len(shown), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [len(table) for table in tables]}
    )
    for axis, setting, table in zip(axes[:, 0], shown, tables, strict=True):
        right = f"{setting.num_right} of {len(document.questions)} answers right"
        _draw(axis, f"{setting.name}: {right}", table, num_pages, document)
    axes[-1, 0].set_xlabel(f"page of {comparison.page_tokens} tokens")
    figure.savefig(path, format="png", metadata={"Software": "flashmem demo"})


def _draw(axis: Any, title: str, table: Sequence[CycleRow], num_pages: int, document: Document) -> None:
    image = [[float(page in row.resident) for page in range(num_pages)] for row in table]
    axis.imshow(image, aspect="auto", cmap="Blues", vmin=0, vmax=1.6, interpolation="nearest")
    places = [(page, y, page in row.resident) for y, row in enumerate(table) for page in sorted(row.evidence)]
    for there, colour, marker, label in _MARKERS:
        pages, ys = ([place[part] for place in places if place[2] is there] for part in (0, 1))
        axis.scatter(pages, ys, s=16, c=colour, marker=marker, label=label)
    firsts = {y: row for y, row in enumerate(table) if row.cycle == 1}
    names = [f"{document.questions[row.question - 1].kind} {'✓' if row.right else '×'}" for row in firsts.values()]
    axis.set_yticks(list(firsts), names)
    for y in list(firsts)[1:]:
        axis.axhline(y - 0.5, color="0.6", linewidth=0.6)
    axis.set_title(title, loc="left", fontsize=10)
    axis.tick_params(labelsize=8)
    axis.legend(loc="lower left", bbox_to_anchor=(0.6, 1.0), ncols=2, fontsize=8, frameon=False, borderaxespad=0.2)


__all__ = ["LEGEND", "WIDTH", "CycleRow", "pages_of", "rows", "terminal_lines", "write_png"]
