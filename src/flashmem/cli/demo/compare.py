"""Reading a document once and asking about it under several policies.

The document is read once, every question once; both end in a snapshot, from which each policy goes on. So the answers
differ only by the pages on the device.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

import flashmem

from ...config import LSAConfig
from ...memory import SavedMemory
from ...policy import AllPages, RecencyPolicy
from ...types import Policy
from .document import Asked, Document

Tell = Callable[[str, int, int], None]
"""What is being done, and how far: done, total."""
FULL, LSA, RECENCY = "full attention", "LSA", "recency"
_CHECKED_CONTEXT, _CHECKED_TOKENS = 512, 16
_SPARE_TOKENS = 8
"""How far a wrong answer may run on beyond the length of the right one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What one policy answered to one question."""

    text: str
    right: bool
    cycles: list[list[int]]
    """Pages on the device at the start of each cycle."""
    stats: dict[str, Any]
    """`Session.stats` at the end of the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One policy and its replies, in the order of the questions."""

    name: str
    replies: list[Reply]

    @property
    def num_right(self) -> int:
        return sum(reply.right for reply in self.replies)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exactness:
    """Tokens that were equal, of how many."""

    tokens: int
    equal_to_transformers: int
    continued_tokens: int
    equal_when_opened: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Everything the demo shows."""

    config: LSAConfig
    page_tokens: int
    settings: list[Setting]
    expected: list[str]
    questions: list[str]
    read_stats: dict[str, Any]
    read_seconds: float
    ask_seconds: float
    exactness: Exactness


def compare(document: Document, config: LSAConfig | None, tell: Tell) -> Comparison:
    """Read with the shipped model, then ask everything under full attention, LSA and recency."""
    tell("loading the model", 0, 1)
    torch.set_num_threads(1)  # so small a model gains little from more, and waits long where others want the cores
    engine = flashmem.Engine.demo(config=config)
    settings = {name: Setting(name=name, replies=[]) for name in (FULL, LSA, RECENCY)}
    with _closing(engine):
        started = time.monotonic()
        with engine.session() as session:
            session.append(document.ids, on_progress=lambda done, total: tell("reading", done, total))
            read_stats, memory = session.stats(), session.snapshot()
        read_seconds, started = time.monotonic() - started, time.monotonic()
        for index, asked in enumerate(document.questions):
            tell("asking", index, len(document.questions))
            for name, reply in _ask(engine, memory, asked).items():
                settings[name].replies.append(reply)
        ask_seconds = time.monotonic() - started
        tell("saved, opened, continued?", 0, 1)
        going_on, opened = _saved_and_opened(engine, memory, document.questions[-1])
    tell("the same tokens as transformers?", 0, 1)
    ours, theirs = _ours_and_theirs(engine.backbone.model, engine.config, document)
    decode = engine.tokenizer.decode
    return Comparison(
        config=engine.config,
        page_tokens=engine.config.page_chunks * engine.geometry.csa_ratio,
        settings=list(settings.values()),
        expected=[decode(asked.answer).strip() for asked in document.questions],
        questions=[_question(decode(asked.prompt)) for asked in document.questions],
        read_stats=read_stats,
        read_seconds=round(read_seconds, 1),
        ask_seconds=round(ask_seconds, 1),
        exactness=Exactness(
            tokens=len(theirs),
            equal_to_transformers=_equal(ours, theirs),
            continued_tokens=len(going_on),
            equal_when_opened=_equal(going_on, opened),
        ),
    )


def _ask(engine: flashmem.Engine, memory: SavedMemory, asked: Asked) -> dict[str, Reply]:
    """The replies of all settings; recency gets as many pages as LSA had at most at the start of a cycle."""
    with engine.resume(memory) as session:
        session.append(asked.prompt)
        snapshot = session.snapshot()
    full = _reply(engine, snapshot, asked, AllPages())
    lsa = _reply(engine, snapshot, asked, None)
    recency = _reply(engine, snapshot, asked, RecencyPolicy(pages=max(map(len, lsa.cycles))))
    return {FULL: full, LSA: lsa, RECENCY: recency}


def _reply(engine: flashmem.Engine, snapshot: SavedMemory, asked: Asked, policy: Policy | None) -> Reply:
    """An answer under a policy, the engine's own where none is given; what follows its end is not asked for."""
    with engine.resume(snapshot, policy=policy) as session:
        cycles, seen, ids = [list(session.pages.resident)], session.cycle.stats.cycles, []
        for token in session.stream(max_new_tokens=len(asked.answer) + _SPARE_TOKENS):
            ids.append(token)
            if session.cycle.stats.cycles > seen:
                cycles.append(list(session.pages.resident))
                seen = session.cycle.stats.cycles
        text = engine.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Reply(text=text, right=_is_right(text, asked, engine.tokenizer), cycles=cycles, stats=session.stats())


def _is_right(text: str, asked: Asked, tokenizer: Any) -> bool:
    """Whether the answer is the expected one, to the letter; where the order is free, its values are."""
    expected = tokenizer.decode(asked.answer).strip()
    if not asked.any_order:
        return bool(text == expected)
    return sorted(map(str.strip, text.split(","))) == sorted(map(str.strip, expected.split(",")))


def _question(prompt: str) -> str:
    """A prompt as it is shown: the question itself, not how its answer is to begin."""
    line = prompt.strip().split("\n")[0].removeprefix("Question: ")
    return line[: line.index("?") + 1] if "?" in line else line


def _saved_and_opened(engine: flashmem.Engine, memory: SavedMemory, asked: Asked) -> tuple[list[int], list[int]]:
    """Tokens of a session that goes on in the middle of an answer, and those of the same session saved and opened."""
    with tempfile.TemporaryDirectory() as directory:
        with engine.resume(memory) as session:
            session.append(asked.prompt)
            list(session.stream(max_new_tokens=4))
            session.save(directory)
            going_on = list(session.stream(max_new_tokens=_CHECKED_TOKENS))
        with engine.open(directory) as session:
            return going_on, list(session.stream(max_new_tokens=_CHECKED_TOKENS))


def _ours_and_theirs(model: Any, config: LSAConfig, document: Document) -> tuple[list[int], list[int]]:
    """The document's beginning continued by flashmem with every page on the device, and by unmodified transformers."""
    ids = document.ids[:_CHECKED_CONTEXT]
    engine = flashmem.Engine(model, config=replace(config, policy="all"))
    with _closing(engine), engine.session() as session:
        session.append(ids)
        ours = list(session.stream(max_new_tokens=_CHECKED_TOKENS))
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=_CHECKED_TOKENS, do_sample=False)[0, len(ids) :]
    return ours, theirs.tolist()


def _equal(first: list[int], second: list[int]) -> int:
    return sum(a == b for a, b in zip(first, second, strict=False))


@contextmanager
def _closing(engine: flashmem.Engine) -> Iterator[flashmem.Engine]:
    try:
        yield engine
    finally:
        engine.close()  # gives the model back as it was


__all__ = ["Comparison", "Exactness", "Reply", "Setting", "compare"]
