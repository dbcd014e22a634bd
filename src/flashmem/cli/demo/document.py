"""The demo's document: our own chronicle with facts scattered in it, and one question of each kind about some of them.

Questions are drawn by the seed, before anything is read. Keys, values and names are of the test split.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from ...training.backbone import tasks
from ...training.backbone.corpus import encode_prose
from ...training.backbone.tokenizer import EOS_ID

LEAST_TOKENS = 2048
_TOKENS_PER_OTHER_FACT = 2048
"""For so many tokens, one more fact of each family is there that nobody asks for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A question about a document."""

    kind: str
    prompt: list[int]
    answer: list[int]
    """Token ids of the expected answer, the end token not among them."""
    any_order: bool
    """Whether the answer's values may come in any order."""
    evidence: tuple[tuple[int, int], ...]
    """Token spans [first, last) of the facts that the answer needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """What is read, and what is asked."""

    ids: list[int]
    questions: tuple[Asked, ...]


def make_document(model: Path, context_tokens: int, seed: int) -> Document:
    """Draw a document of exactly so many tokens, and its questions; `model` has `tokenizer.json` and `words.txt`.

    Raises ValueError for fewer tokens than the facts need.
    """
    if context_tokens < LEAST_TOKENS:
        raise ValueError(f"the context must have at least {LEAST_TOKENS} tokens, got {context_tokens}")
    lexicon = tasks.Lexicon.load(model)
    draw = tasks.Draw(random.Random(f"demo {seed}"), lexicon, split="test")
    asked = _facts(draw)
    for _ in range(context_tokens // _TOKENS_PER_OTHER_FACT):
        for state in tasks.FAMILIES.values():
            state(draw)
    length = context_tokens + sum(question.size for question in asked.values())
    text = encode_prose(length, lexicon.tokenizer, seed)
    row = tasks.compose(draw, text, length, list(asked.values()))
    questions = tuple(
        Asked(
            kind=kind,
            prompt=question.prompt,
            answer=[token for token in question.answer if token != EOS_ID],
            any_order=bool(question.also),
            evidence=tuple(answer.evidence),
        )
        for (kind, question), answer in zip(asked.items(), row.answers, strict=True)
    )
    return Document(ids=row.ids[:context_tokens].tolist(), questions=questions)


def _facts(draw: tasks.Draw) -> dict[str, tasks.Question]:
    """The facts that are asked for, and their questions by kind; two answers run over more than one window of 64."""
    asked: dict[str, tasks.Question] = {}

    def ask(kind: str) -> None:
        asked[kind] = draw.questions[-1]

    tasks.number(draw, 1, style="short")
    ask("one number")
    tasks.number(draw, 4)
    ask("four values")
    for _ in range(20):
        tasks.kv(draw, ": ")
    tasks.several(draw, 16, "kv")
    ask("sixteen keys")
    tasks.vt(draw, 4, style="short")
    ask("variables")
    tasks.talk(draw, changes=1)
    ask("an update")
    tasks.hop(draw)
    ask("two hops")
    tasks.song(draw, 72)
    ask("a song")
    return asked


__all__ = ["LEAST_TOKENS", "Asked", "Document", "make_document"]
