"""One document, its questions, every policy: read once, ask from snapshots, decode in batches.

A question is read once, over the whole history as prefill always does; every policy goes on from a snapshot taken
there. In a conversation each policy has a session of its own, which lives through all turns and goes on from its own
answers.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..engine import Engine, Session
from ..memory import MANIFEST as MEMORY_MANIFEST
from ..memory import SavedMemory
from ..types import PageView, Scorer, Selection
from .decoding import Answer, decode
from .items import Content, Document, Item
from .policies import Contender, Reference, build

Group = tuple[Item, ...]
"""Items of one document that are asked together: of one task, or the turns of one conversation."""
Answers = dict[str, list[Answer]]
"""By contender key, in the order of the group."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A document that was read: what every question goes on from."""

    snapshot: SavedMemory
    stale: torch.Tensor
    """Chunk logits [N] of level 1 at its end."""
    starts: Sequence[int] | None
    """First character of every token, where the document is text."""
    chat: tuple[str, str] = ("", "")
    """What the chat template puts before a user's words and after them."""

    def tokens_of(self, spans: Sequence[tuple[int, int]]) -> set[int]:
        """Tokens of spans of the document; spans of text are characters."""
        if self.starts is None:
            return {token for first, last in spans for token in range(first, last)}
        before = len(self.chat[0])
        found: set[int] = set()
        for first, last in spans:
            low = bisect_right(self.starts, first + before) - 1
            found |= set(range(max(0, low), bisect_right(self.starts, last - 1 + before)))
        return found


@contextmanager
def read_document(
    engine: Engine, document: Document, memories: Path, *, keep: bool, chat: bool, tell: Callable[[int, int], None]
) -> Iterator[Reading]:
    """Read a document, or open it where it was kept."""
    around = chat_frame(engine) if chat else ("", "")
    ids, starts = _document_ids(engine, document.content, around[0])
    path = memories / f"{_memory_name(engine, ids)}.mem"
    if not (path / MEMORY_MANIFEST).is_file():
        with engine.session() as session:
            session.append(ids, on_progress=tell)
            session.save(path)
    listener = _Listener()
    with engine.open(path) as opened:
        snapshot = opened.snapshot()
    with engine.resume(snapshot, policy=listener) as session:
        reading = Reading(session.snapshot(), listener.logits_N, starts, around)
    yield reading
    if not keep:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def answer_group(
    engine: Engine, reading: Reading, group: Group, contenders: Sequence[Contender]
) -> tuple[Answers, list[Reference]]:
    """Answers of all policies to questions that are asked apart from each other."""
    snapshots = [_asked(engine, reading, item) for item in group]
    references = [Reference(stale=reading.stale) for _ in group]

    def open_session(stack: ExitStack, contender: Contender, index: int) -> Session:
        first_cycle = int(snapshots[index].session["cycle"]["stats"]["cycles"])
        policy = build(contender, engine.config, engine.geometry.csa_ratio, references[index], first_cycle)
        return stack.enter_context(engine.resume(snapshots[index], policy=policy, rescue=contender.rescue))

    return _answer(engine, group, contenders, references, open_session), references


def answer_conversation(
    engine: Engine, reading: Reading, turns: Group, contenders: Sequence[Contender]
) -> tuple[Answers, list[Reference]]:
    """Answers of all policies to questions that are asked one after another."""
    answers: Answers = {contender.key: [] for contender in contenders}
    references = [Reference(stale=reading.stale) for _ in turns]
    with ExitStack() as stack:
        sessions = {
            contender.key: stack.enter_context(engine.resume(reading.snapshot, policy=_Nothing()))
            for contender in contenders
        }
        for item, reference in zip(turns, references, strict=True):
            question = question_ids(engine, reading, item)

            def go_on(
                _: ExitStack, contender: Contender, __: int,
                reference: Reference = reference, question: Sequence[int] = question,
            ) -> Session:  # fmt: skip
                session = sessions[contender.key]
                first_cycle = session.cycle.stats.cycles
                policy = build(contender, engine.config, engine.geometry.csa_ratio, reference, first_cycle)
                session.select_by(policy, rescue=contender.rescue)
                session.append(question)
                return session

            for key, made in _answer(engine, (item,), contenders, [reference], go_on).items():
                answers[key] += made
    return answers, references


def _answer(
    engine: Engine,
    group: Group,
    contenders: Sequence[Contender],
    references: Sequence[Reference],
    open_session: Callable[[ExitStack, Contender, int], Session],
) -> Answers:
    """Full first, then what nobody waits for, then the matched; each phase is one batch."""
    answers: Answers = {}
    for phase in (
        [c for c in contenders if c.kind == "full"],
        [c for c in contenders if c.kind != "full" and not c.matched and c.kind != "oracle"],
        [c for c in contenders if c.matched or c.kind == "oracle"],
    ):
        jobs = [(contender, index) for contender in phase for index in range(len(group))]
        if not jobs:
            continue
        watch = phase[0].kind == "full"
        with ExitStack() as stack:
            made = decode(
                engine,
                [open_session(stack, contender, index) for contender, index in jobs],
                [group[index].max_new_tokens for _, index in jobs],
                targets=[_target_ids(engine, group[index]) for _, index in jobs],
                masses=[references[index].masses for _, index in jobs] if watch else None,
            )
        for (contender, index), answer in zip(jobs, made, strict=True):
            answers.setdefault(contender.key, []).append(answer)
            if contender.label == "lsa":
                references[index].budgets = [cycle["selected"] for cycle in answer.cycles]
    return answers


def text_ids(engine: Engine, content: Content) -> tuple[int, ...]:
    """Token ids of what follows other text."""
    if not isinstance(content, str):
        return content
    return tuple(_tokenizer(engine)(content, add_special_tokens=False)["input_ids"])


def chat_frame(engine: Engine) -> tuple[str, str]:
    """What the tokenizer's chat template puts around a user's words. Raises ValueError where it has none."""
    tokenizer, mark = _tokenizer(engine), "\N{OBJECT REPLACEMENT CHARACTER}"
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template")
    message = [{"role": "user", "content": mark}]
    text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    before, _, after = text.partition(mark)
    return before, after


def _document_ids(engine: Engine, content: Content, before: str) -> tuple[tuple[int, ...], list[int] | None]:
    """Token ids of a document, and the first character of every token where it is text."""
    if not isinstance(content, str):
        if before:
            raise ValueError("a chat template goes around text, these documents are token ids")
        return content, None
    tokenizer = _tokenizer(engine)
    if not tokenizer.is_fast:
        return tuple(tokenizer(before + content, add_special_tokens=not before)["input_ids"]), None
    made = tokenizer(before + content, add_special_tokens=not before, return_offsets_mapping=True)
    return tuple(made["input_ids"]), [first for first, _ in made["offset_mapping"]]


def _tokenizer(engine: Engine) -> Any:
    if engine.tokenizer is None:
        raise ValueError("these items are text and the model has no tokenizer")
    return engine.tokenizer


def _target_ids(engine: Engine, item: Item) -> Sequence[int] | None:
    return None if item.target is None else text_ids(engine, item.target)


def _asked(engine: Engine, reading: Reading, item: Item) -> SavedMemory:
    """A snapshot of the document with the question behind it."""
    with engine.resume(reading.snapshot, policy=_Nothing()) as session:
        session.append(question_ids(engine, reading, item))
        return session.snapshot()


def question_ids(engine: Engine, reading: Reading, item: Item) -> Sequence[int]:
    """The question, what the chat template puts behind it, and how the answer is made to begin."""
    if not isinstance(item.question, str):
        return item.question
    return text_ids(engine, item.question + reading.chat[1] + str(item.extra.get("answer_prefix", "")))


def _memory_name(engine: Engine, ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([engine.identity(), ids]).encode()).hexdigest()[:24]


class _Listener:
    """Notes level 1's scores and keeps only what must be kept."""

    name = "listener"
    scorer: Scorer = "memory"

    def __init__(self) -> None:
        self.logits_N = torch.empty(0)

    def select(self, view: PageView) -> Selection:
        assert view.logits_N is not None
        self.logits_N = view.logits_N
        return Selection(view.always)


class _Nothing:
    """Keeps only what must be kept, unseen: for sessions that read for others."""

    name = "nothing"
    scorer: Scorer = "none"

    def select(self, view: PageView) -> Selection:
        return Selection(view.always)


__all__ = [
    "Answers",
    "Group",
    "Reading",
    "answer_conversation",
    "answer_group",
    "chat_frame",
    "question_ids",
    "read_document",
    "text_ids",
]
