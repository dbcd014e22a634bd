"""`multi-turn`: several questions about one document in one session, the last one asked a second time.

What an earlier answer did not need has left the device by then; whoever loses it cannot answer the later turns. The
last turn is the first question again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...training.backbone import tasks
from ...training.backbone.corpus import Corpus
from ..items import Document, Item, ItemSet
from .mini import make_document

SUITE = "multi-turn"
TURNS = ("single", "multivalue", "talk")
"""Tasks that the turns before the last one take by turns."""
PER_DOCUMENT = 6


def generate(
    lexicon: tasks.Lexicon,
    corpus: Corpus,
    lengths: Sequence[int],
    *,
    n: int = 50,
    seed: int = 0,
    turns: int = 4,
    per_document: int = PER_DOCUMENT,
    made: Mapping[str, Any] | None = None,
) -> ItemSet:
    """`n` conversations per length. Raises ValueError for fewer than two turns."""
    if turns < 2:
        raise ValueError(f"a conversation has at least two turns, got {turns}")
    documents: list[Document] = []
    items: list[Item] = []
    for length in lengths:
        for first in range(0, n, per_document):
            count = min(per_document, n - first)
            name = f"{length}-{len(documents)}"
            rng = random.Random(f"{SUITE}/{seed}/{length}/{len(documents)}")
            questions = count * (turns - 1)
            asked = {task: -(-questions // len(TURNS)) for task in TURNS}
            document, drawn = make_document(rng, lexicon, corpus, length, asked, name)
            pools = {task: [item for item in drawn if item.task == task] for task in TURNS}
            documents.append(document)
            for conversation in range(count):
                order = [TURNS[(conversation + turn) % len(TURNS)] for turn in range(turns - 1)]
                picked = [pools[task].pop() if pools[task] else _any(pools) for task in order]
                items += _conversation(f"{name}/{conversation}", picked)
    arguments = {"lengths": list(lengths), "n": n, "seed": seed, "turns": turns, "per_document": per_document}
    return ItemSet(suite=SUITE, documents=tuple(documents), items=tuple(items), made=arguments | dict(made or {}))


def _conversation(name: str, questions: Sequence[Item]) -> list[Item]:
    """The questions as turns, then the first one again."""
    turns = [*questions, questions[0]]
    return [
        replace(
            item, id=f"{name}-{turn}", task=f"turn {turn}" if turn < len(turns) else f"turn {turn}, as turn 1",
            conversation=name, extra={"task": item.task},
        )
        for turn, item in enumerate(turns, 1)
    ]  # fmt: skip


def _any(pools: Mapping[str, list[Item]]) -> Item:
    return next(pool for pool in pools.values() if pool).pop()


__all__ = ["SUITE", "generate"]
