"""`mini-table1`: the paper's table in miniature, for the small model that flashmem ships (docs/models/demo.md).

One document holds facts for many questions of eight tasks; each question is asked alone. Keys, values, names and books
are those of the test split.

    single, multivalue, multiquery, vt   RULER's needles and chains
    talk                                 what somebody said about themselves, after updates
    hop                                  two statements that must be put together
    ahead                                sixteen keys asked at once: the answer runs over more than one cycle
    song                                 eighty words recited, likewise
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...training.backbone import tasks
from ...training.backbone.corpus import Corpus, encode_prose
from ...training.backbone.tokenizer import EOS_ID
from ..items import Document, Item, ItemSet

SUITE = "mini-table1"
SLACK_TOKENS = 8
"""Tokens that an answer may be longer than the reference."""
SONG_WORDS = 80
PROSE_TOKENS = 400_000
"""Longer documents go round: their text repeats, their facts do not."""


@dataclass(frozen=True, slots=True)
class Task:
    """How a task's facts enter a document, and how many questions each document has."""

    draw: Callable[[tasks.Draw], None]
    questions: int


def _single(draw: tasks.Draw) -> None:
    tasks.number(draw, 1, style="ruler")


def _multivalue(draw: tasks.Draw) -> None:
    tasks.number(draw, 4)


def _vt(draw: tasks.Draw) -> None:
    tasks.vt(draw, 4, style="ruler")


def _song(draw: tasks.Draw) -> None:
    tasks.song(draw, SONG_WORDS)


def _several(family: str, count: int) -> Callable[[tasks.Draw], None]:
    """Ask for several facts of one family; more are put into the document where it has too few."""

    def ask(draw: tasks.Draw) -> None:
        others = [fact for fact in draw.listable if fact[0] != family]
        draw.listable = [fact for fact in draw.listable if fact[0] == family]
        while len(draw.listable) < count:
            (tasks.kv if family == "kv" else _single)(draw)
            draw.questions.pop()
        tasks.several(draw, count)
        draw.listable += others

    return ask


TASKS: dict[str, Task] = {
    "single": Task(_single, 12),
    "multivalue": Task(_multivalue, 12),
    "multiquery": Task(_several("number", 4), 12),
    "vt": Task(_vt, 12),
    "talk": Task(tasks.talk, 12),
    "hop": Task(tasks.hop, 12),
    "ahead": Task(_several("kv", 16), 6),
    "song": Task(_song, 6),
}


def generate(
    lexicon: tasks.Lexicon,
    corpus: Corpus,
    lengths: Sequence[int],
    *,
    n: int = 100,
    seed: int = 0,
    names: Sequence[str] = tuple(TASKS),
    per_document: int | None = None,
    made: Mapping[str, Any] | None = None,
) -> ItemSet:
    """`n` items per task and length, in as few documents as that takes.

    `per_document` replaces the tasks' own number of questions per document; `made` says where the text is from.
    Raises ValueError for unknown tasks or documents too short for their facts.
    """
    if unknown := sorted(set(names) - TASKS.keys()):
        raise ValueError(f"unknown tasks {', '.join(unknown)}; known are {', '.join(TASKS)}")
    counts = {name: per_document or TASKS[name].questions for name in names}
    documents: list[Document] = []
    items: list[Item] = []
    for length in lengths:
        left = dict.fromkeys(names, n)
        while any(left.values()):
            asked = {name: min(counts[name], left[name]) for name in names if left[name]}
            index = len(documents)
            rng = random.Random(f"{SUITE}/{seed}/{length}/{index}")
            document, questions = make_document(rng, lexicon, corpus, length, asked, f"{length}-{index}")
            documents.append(document)
            items += questions
            left = {name: left[name] - asked.get(name, 0) for name in names}
    arguments = {"lengths": list(lengths), "n": n, "seed": seed, "tasks": list(names), "per_document": per_document}
    return ItemSet(suite=SUITE, documents=tuple(documents), items=tuple(items), made=arguments | dict(made or {}))


def make_document(
    rng: random.Random, lexicon: tasks.Lexicon, corpus: Corpus, length: int, asked: dict[str, int], name: str
) -> tuple[Document, list[Item]]:
    """A document of exactly `length` tokens, and the questions about it."""
    draw = tasks.Draw(rng, lexicon, "test")
    questions: list[tuple[str, tasks.Question]] = []
    for task, count in asked.items():
        for _ in range(count):
            TASKS[task].draw(draw)
            questions.append((task, draw.questions.pop()))
    wanted = [question for _, question in questions]
    row = tasks.compose(draw, corpus, length + sum(question.size for question in wanted), wanted)
    assert row.answers[0].prompt_start == length
    ids: list[int] = row.ids.tolist()
    items = [
        Item(
            id=f"{name}/{task}-{index}",
            task=task,
            length=length,
            document=name,
            question=tuple(ids[answer.prompt_start : answer.start]),
            answers=references(task, lexicon.tokenizer.decode(_without_end(ids[answer.start : answer.stop]))),
            scorer="all",
            max_new_tokens=len(answer.weights) + SLACK_TOKENS,
            evidence=tuple(sorted(answer.evidence)),
        )
        for index, ((task, _), answer) in enumerate(zip(questions, row.answers, strict=True))
    ]
    return Document(id=name, content=tuple(ids[:length])), items


def references(task: str, answer: str) -> tuple[str, ...]:
    """The values of an answer as it is written in training rows."""
    if task in ("multiquery", "ahead"):  # keys are answered too; numbers are the values
        return tuple(re.findall(r"\d+", answer))
    if task in ("multivalue", "vt"):
        return tuple(value.strip() for value in answer.split(","))
    return (answer.strip(),)


def filler(
    folder: str | Path | None, lexicon: tasks.Lexicon, *, prose_tokens: int = PROSE_TOKENS
) -> tuple[Corpus, dict[str, Any]]:
    """What facts are scattered in, and what to say of it: held-out books of a corpus folder, or text of our own."""
    if folder is not None:
        return Corpus.load(Path(folder) / "test.npz"), {"filler": "books"}
    return encode_prose(prose_tokens, lexicon.tokenizer), {"filler": "prose"}


def _without_end(ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token != EOS_ID]


__all__ = ["SUITE", "TASKS", "filler", "generate", "make_document", "references"]
