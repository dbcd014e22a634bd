"""What the demo prints: questions with the answers of all settings, a table of costs, the terminal picture; or JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..sizes import format_bytes
from .compare import Comparison, Reply, Setting
from .document import Document
from .picture import LEGEND, WIDTH, pages_of, terminal_lines

_SHOWN_CHARACTERS = 150
_TIERS = {"device": ("device",), "host": ("host", "saved"), "disk": ("disk",)}
"""Tiers as shown, and their names in `Session.stats`: the snapshots that sessions go on from are in memory."""
_SCORER = {"bundled": "its Memory Indexer", "native": "the model's own Lightning Indexer as Memory Indexer"}


def print_report(document: Document, comparison: Comparison, *, indexer: str) -> None:
    """Everything but the PNG, in 80 columns."""
    console = Console(highlight=False, width=WIDTH)
    mirror = comparison.read_stats["tiers"]["host"]
    count = len(document.questions)
    console.print(
        f"{len(document.ids):,} tokens read in {comparison.read_seconds:.0f} s, {count} questions asked under "
        f"{len(comparison.settings)} settings in {comparison.ask_seconds:.0f} s. {mirror['pages']} pages of "
        f"{comparison.page_tokens} tokens, were mirrored in host memory ({format_bytes(mirror['bytes'])}); every "
        f"answer goes on from there. LSA scores pages with {_SCORER[indexer]}."
    )
    for number, asked in enumerate(document.questions):
        console.print(Text(f"\n{number + 1}. {asked.kind}: {_cut(comparison.questions[number])}", style="bold"))
        console.print(_answers(comparison, number))
    console.print()
    console.print(_costs(document, comparison))
    for setting in comparison.settings[1:]:
        console.print(Text(f"\n{setting.name}: pages on the device, cycle by cycle", style="bold"))
        for line in terminal_lines(document, setting, comparison.page_tokens):
            console.print(line, no_wrap=True)
    console.print(Text(LEGEND, style="dim"))
    exact = comparison.exactness
    console.print(
        f"\nevery page on the device: {exact.equal_to_transformers} of {exact.tokens} tokens equal to transformers; "
        f"saved, opened, continued: {exact.equal_when_opened} of {exact.continued_tokens} equal"
    )


def as_json(
    document: Document, comparison: Comparison, *, seed: int, indexer: str, picture: Path | None
) -> dict[str, Any]:
    """The object that --json prints."""
    config = comparison.config
    return {
        "context_tokens": len(document.ids),
        "seed": seed,
        "indexer": indexer,
        "keep": config.keep,
        "page_chunks": config.page_chunks,
        "tau": config.tau,
        "read_seconds": comparison.read_seconds,
        "ask_seconds": comparison.ask_seconds,
        "read_stats": comparison.read_stats,
        "questions": [
            {
                "kind": asked.kind,
                "question": comparison.questions[number],
                "expected": comparison.expected[number],
                "evidence_pages": pages_of(asked.evidence, comparison.page_tokens),
                "answers": {setting.name: asdict(setting.replies[number]) for setting in comparison.settings},
            }
            for number, asked in enumerate(document.questions)
        ],
        "right": {setting.name: setting.num_right for setting in comparison.settings},
        "exactness": asdict(comparison.exactness),
        "picture": None if picture is None else str(picture),
    }


def _answers(comparison: Comparison, number: int) -> Table:
    expected = comparison.expected[number]
    table = Table.grid(padding=(0, 1))
    table.add_column(width=3)
    table.add_column(width=14)
    table.add_column(max_width=WIDTH - 20)
    table.add_row("", "expected", _cut(expected))
    for setting in comparison.settings:
        reply = setting.replies[number]
        mark, style = ("✔", "green") if reply.right else ("✘", "red")
        table.add_row(Text(f"  {mark}", style), setting.name, Text(_against(expected, reply), style))
    return table


def _against(expected: str, reply: Reply) -> str:
    """An answer in few words: a long one from where it differs from the expected one."""
    if reply.right and len(expected) > _SHOWN_CHARACTERS:
        return "as expected"
    same = next((i for i, (a, b) in enumerate(zip(reply.text, expected, strict=False)) if a != b), 0)
    start = max(0, same - 20) if len(reply.text) > _SHOWN_CHARACTERS else 0
    return ("…" if start else "") + _cut(reply.text[start:]) if reply.text else "(nothing)"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _costs(document: Document, comparison: Comparison) -> Table:
    """One column per setting; pages and bytes are the most of all questions, cycles and moves their sums."""
    table = Table(title="the most of any question; cycles and pages moved are sums", title_justify="left", min_width=60)
    table.add_column("")
    for setting in comparison.settings:
        table.add_column(setting.name, justify="right")

    def add(name: str, cell: Callable[[Setting], str]) -> None:
        table.add_row(name, *(cell(setting) for setting in comparison.settings))

    add("right answers", lambda setting: f"{setting.num_right} of {len(document.questions)}")
    add("resident pages", lambda setting: f"{_most(setting, 'resident_pages')} of {_most(setting, 'pages')}")
    add("cycles", lambda setting: str(sum(len(reply.cycles) for reply in setting.replies)))
    add("pages moved", lambda setting: f"{sum(reply.stats['pages_moved'] for reply in setting.replies):,}")
    table.add_section()
    add("paper accounting, resident", lambda setting: _of_full(setting, "resident_bytes_paper", "full_bytes_paper"))
    add("all-in accounting, device", lambda setting: _of_full(setting, "device_bytes_all_in", "full_bytes_all_in"))
    table.add_section()
    for tier in _TIERS:
        add(f"{tier} tier", lambda setting, tier=tier: _tier(setting, tier))  # type: ignore[misc]
    return table


def _most(setting: Setting, name: str) -> int:
    return max(reply.stats[name] for reply in setting.replies)


def _of_full(setting: Setting, name: str, full: str) -> str:
    held, whole = max((reply.stats[name], reply.stats[full]) for reply in setting.replies)
    return f"{format_bytes(held)}, {held / whole:.1%}"


def _tier(setting: Setting, tier: str) -> str:
    held = [[reply.stats["tiers"][name] for name in _TIERS[tier]] for reply in setting.replies]
    pages, size = max((sum(part["pages"] for part in parts), sum(part["bytes"] for part in parts)) for parts in held)
    return f"{pages} pages, {format_bytes(size)}"


__all__ = ["as_json", "print_report"]
