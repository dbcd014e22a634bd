"""Reading a document once and asking about it under several policies, each over the same saved memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flashmem

from ...config import LSAConfig
from ...policy import RecencyPolicy
from .document import Asked, Document

Tell = Callable[[str, int, int], None]
"""What is being done, and how far: done, total."""
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
    """Read with the shipped model, then ask everything under full attention, LSA and recency.

    Recency gets as many pages as LSA ever had at the start of a cycle.
    """
    tell("loading the model", 0, 1)
    reader = flashmem.Engine.demo(config=config)
    model, tokenizer, indexer, config = reader.backbone.model, reader.tokenizer, reader.indexer, reader.config
    page_tokens = config.page_chunks * reader.geometry.csa_ratio

    def engine(**changes: Any) -> flashmem.Engine:
        return flashmem.Engine(model, tokenizer, indexer=indexer, config=replace(config, **changes))

    with tempfile.TemporaryDirectory() as directory:
        memory = Path(directory) / "demo.mem"
        started = time.monotonic()
        with _closing(reader), reader.session() as session:
            session.append(document.ids, on_progress=lambda done, total: tell("reading", done, total))
            session.save(memory)
            read_stats = session.stats()
        read_seconds, started = time.monotonic() - started, time.monotonic()
        full = _ask_all("full attention", engine(policy="all"), memory, document, tell)
        lsa = _ask_all("LSA", engine(), memory, document, tell)
        most = max(len(pages) for reply in lsa.replies for pages in reply.cycles)
        recency = _ask_all("recency", engine(policy=RecencyPolicy(pages=most)), memory, document, tell)
        ask_seconds = time.monotonic() - started
        exactness = _exactness(engine, memory, document, tell)
    return Comparison(
        config=config,
        page_tokens=page_tokens,
        settings=[full, lsa, recency],
        expected=[tokenizer.decode(asked.answer).strip() for asked in document.questions],
        questions=[_question(tokenizer.decode(asked.prompt)) for asked in document.questions],
        read_stats=read_stats,
        read_seconds=round(read_seconds, 1),
        ask_seconds=round(ask_seconds, 1),
        exactness=exactness,
    )


def _ask_all(name: str, engine: flashmem.Engine, memory: Path, document: Document, tell: Tell) -> Setting:
    replies = []
    with _closing(engine):
        for index, asked in enumerate(document.questions):
            tell(f"asking, {name}", index, len(document.questions))
            replies.append(_ask(engine, memory, asked))
    return Setting(name=name, replies=replies)


def _ask(engine: flashmem.Engine, memory: Path, asked: Asked) -> Reply:
    """One question to a freshly opened memory; what follows the end token of an answer is not asked for."""
    with engine.open(memory) as session:
        session.append(asked.prompt)
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


def _exactness(engine: Callable[..., flashmem.Engine], memory: Path, document: Document, tell: Tell) -> Exactness:
    """The document's beginning read and continued by transformers and by flashmem; the memory opened, saved, opened."""
    import torch  # takes seconds: long loaded by now, and nobody should pay for it before the arguments are checked

    ids, new_tokens = document.ids[:512], 16
    tell("the same tokens as transformers?", 0, 2)
    with _closing(engine(policy="all")) as exact:
        with exact.session() as session:
            session.append(ids)
            ours = list(session.stream(max_new_tokens=new_tokens))
        model = exact.backbone.model
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False)[0, len(ids) :].tolist()
    tell("the same tokens after opening?", 1, 2)
    with _closing(engine()) as few, tempfile.TemporaryDirectory() as directory:
        with few.open(memory) as session:
            session.append(document.questions[-1].prompt)
            list(session.stream(max_new_tokens=4))
            session.save(directory)
            going_on = list(session.stream(max_new_tokens=new_tokens))
        with few.open(directory) as session:
            opened = list(session.stream(max_new_tokens=new_tokens))
    return Exactness(
        tokens=len(wanted),
        equal_to_transformers=_equal(ours, wanted),
        continued_tokens=len(going_on),
        equal_when_opened=_equal(going_on, opened),
    )


def _equal(first: list[int], second: list[int]) -> int:
    return sum(a == b for a, b in zip(first, second, strict=False))


@contextmanager
def _closing(engine: flashmem.Engine) -> Iterator[flashmem.Engine]:
    try:
        yield engine
    finally:
        engine.close()  # gives the model back as it was


__all__ = ["Comparison", "Exactness", "Reply", "Setting", "compare"]
