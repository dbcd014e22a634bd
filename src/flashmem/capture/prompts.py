"""Prompts for capture: JSON lines in, token ids and evidence out.

A line is an object with `id`, one of `prompt` (text) and `tokens` (ids), and optionally
- `response` or `response_tokens`: the answer, teacher-forced; without one the model answers greedily;
- `tail`: the last so many prompt tokens are watched too, so that there are queries inside the prompt;
- `evidence`: spans that hold what the answer needs, [start, end) in tokens, or in characters where the prompt is text.
  An item is [start, end], needed by the whole answer, or {"span": [start, end], "answer": [start, end]}, needed by
  that part of the answer only. Offsets count through the prompt and on through the response;
- `turns`: spans [start, end) of the answers within what is watched, where several questions follow one another. Level 1
  runs at the beginning of each and every tau tokens in it, so queries stand there, and no label looks past a turn's
  end. Without turns everything that is watched is one;
- `meta`: any object, kept with the document (task, length, ...).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .format import file_name

_KEYS = frozenset({"id", "prompt", "tokens", "response", "response_tokens", "tail", "turns", "evidence", "meta"})
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Tokens [start, end) that hold what the answer needs."""

    span: Span
    answer: Span | None = None
    """Tokens of the answer that need it; None means all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One document to capture, in tokens."""

    rid: str
    tokens: tuple[int, ...]
    response: tuple[int, ...] | None = None
    """Teacher-forced answer; None means greedy generation."""
    tail: int | None = None
    """Last tokens of the prompt that are watched; None means the run's setting."""
    turns: tuple[Span, ...] | None = None
    """Tokens of each answer within what is watched; None means that all of it is one answer."""
    evidence: tuple[Evidence, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        file_name(self.rid)
        if not self.tokens:
            raise ValueError(f"document {self.rid!r}: the prompt is empty")
        if self.response is not None and not self.response:
            raise ValueError(f"document {self.rid!r}: the response is empty; leave it out for a greedy answer")
        if self.tail is not None and not 0 <= self.tail < len(self.tokens):
            raise ValueError(f"document {self.rid!r}: tail must lie in 0..{len(self.tokens) - 1}, got {self.tail}")
        total = len(self.tokens) + len(self.response or ())
        spans = [("evidence", span) for item in self.evidence or () for span in (item.span, item.answer or item.span)]
        for what, (start, end) in [*spans, *(("turn", span) for span in self.turns or ())]:
            if not 0 <= start < end <= total:
                raise ValueError(f"document {self.rid!r}: {what} [{start}, {end}] is not within {total} tokens")
        if any(second[0] < first[1] for first, second in pairwise(self.turns or ())):
            raise ValueError(f"document {self.rid!r}: turns must ascend and not overlap, got {self.turns}")

    def source(self) -> str:
        """Hash of what decides the document."""
        values = {name: value for name, value in asdict(self).items() if name not in ("rid", "meta")}
        if self.turns is None:
            del values["turns"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class PromptFile:
    """A JSONL file, checked whole on opening (but for what needs the tokenizer), then read line by line."""

    def __init__(self, path: str | Path) -> None:
        """Raises OSError, or ValueError naming the line, for what cannot be captured."""
        self.path = Path(path)
        self.rids: list[str] = []
        seen: set[str] = set()
        for number, record in self._records():
            rid = str(record["id"])
            if rid in seen:
                raise ValueError(f"{self.path}:{number}: the id {rid!r} appears twice")
            seen.add(rid)
            self.rids.append(rid)
        if not self.rids:
            raise ValueError(f"{self.path} holds no prompts")

    def __len__(self) -> int:
        return len(self.rids)

    def read(self, tokenizer: Any) -> Iterator[Prompt]:
        """Tokenised prompts. Raises ValueError naming the line."""
        for number, record in self._records():
            try:
                yield encode(record, tokenizer)
            except ValueError as error:
                raise ValueError(f"{self.path}:{number}: {error}") from error

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with self.path.open(encoding="utf-8") as file:
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, _record(line, f"{self.path}:{number}")
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.path} is not UTF-8 text: {error.reason}") from error


def encode(record: Mapping[str, Any], tokenizer: Any) -> Prompt:
    """Tokenise a record. Raises ValueError for text without a tokenizer and for spans that hold no token."""
    spans = _Spans()
    tokens = spans.add(record.get("prompt", record.get("tokens")), tokenizer, add_special_tokens=True)
    given = record.get("response", record.get("response_tokens"))
    response = None if given is None else spans.add(given, tokenizer, add_special_tokens=False)
    evidence = record.get("evidence")
    return Prompt(
        rid=str(record["id"]),
        tokens=tokens,
        response=response,
        tail=record.get("tail"),
        turns=None if "turns" not in record else tuple(spans.tokens(span) for span in record["turns"]),
        evidence=None if evidence is None else tuple(_evidence(item, spans) for item in evidence),
        meta=record.get("meta", {}),
    )


class _Spans:
    """From the offsets of a record, characters or tokens, to token offsets."""

    def __init__(self) -> None:
        self.offsets: list[Span] | None = None  # of every token in characters; None while offsets are tokens
        self.characters = 0

    def add(self, content: Any, tokenizer: Any, *, add_special_tokens: bool) -> tuple[int, ...]:
        if not isinstance(content, str):
            return tuple(content)
        if tokenizer is None:
            raise ValueError("this model has no tokenizer: give tokens")
        if not tokenizer.is_fast:
            raise ValueError("character spans need a fast tokenizer, which this model has not: give tokens")
        encoded = tokenizer(content, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        offsets = [(start + self.characters, end + self.characters) for start, end in encoded["offset_mapping"]]
        self.offsets = (self.offsets or []) + offsets
        self.characters += len(content)
        return tuple(encoded["input_ids"])

    def tokens(self, span: Sequence[int]) -> Span:
        start, end = span
        if self.offsets is None:
            return start, end
        inside = [i for i, (lo, hi) in enumerate(self.offsets) if lo < min(end, hi) and max(start, lo) < hi]
        if not inside or not 0 <= start < end <= self.characters:
            raise ValueError(f"the span [{start}, {end}] holds no token of {self.characters} characters")
        return inside[0], inside[-1] + 1


def _evidence(item: Any, spans: _Spans) -> Evidence:
    if isinstance(item, Mapping):
        return Evidence(spans.tokens(item["span"]), None if "answer" not in item else spans.tokens(item["answer"]))
    return Evidence(spans.tokens(item))


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a line must be an object")
    if unknown := sorted(record.keys() - _KEYS):
        raise ValueError(f"{where}: unknown entries {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
    if not isinstance(record.get("id"), str | int):
        raise ValueError(f"{where}: it needs an id, a string or an integer")
    try:
        file_name(str(record["id"]))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if ("prompt" in record) == ("tokens" in record):
        raise ValueError(f"{where}: it needs one of prompt and tokens")
    if "response" in record and "response_tokens" in record:
        raise ValueError(f"{where}: it has both response and response_tokens")
    as_text = "prompt" in record
    if ("response_tokens" if as_text else "response") in record:
        raise ValueError(f"{where}: prompt and response must both be text or both tokens")
    _check_types(record, where)
    return record


def _check_types(record: Mapping[str, Any], where: str) -> None:
    checks: dict[str, Callable[[Any], bool]] = {
        "prompt": lambda value: isinstance(value, str),
        "response": lambda value: isinstance(value, str),
        "tokens": _are_integers,
        "response_tokens": _are_integers,
        "tail": lambda value: type(value) is int,
        "meta": lambda value: isinstance(value, dict),
        "turns": lambda value: isinstance(value, list) and bool(value) and all(map(_is_span, value)),
        "evidence": lambda value: isinstance(value, list) and all(map(_is_evidence, value)),
    }
    for name, right in checks.items():
        if name in record and not right(record[name]):
            raise ValueError(f"{where}: {name} is malformed: {json.dumps(record[name])[:60]}")


def _are_integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _is_evidence(value: Any) -> bool:
    if isinstance(value, dict):
        return "span" in value and value.keys() <= {"span", "answer"} and all(map(_is_span, value.values()))
    return _is_span(value)


def _is_span(value: Any) -> bool:
    return _are_integers(value) and len(value) == 2


__all__ = ["Evidence", "Prompt", "PromptFile", "encode"]
