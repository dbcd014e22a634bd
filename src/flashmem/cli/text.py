"""Text in and out of a session. A model without a tokenizer reads and writes token ids, separated by spaces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import flashmem

from .output import stderr


def append(session: flashmem.Session, text: str, label: str) -> None:
    """Read text into a session, with a progress bar on stderr."""
    content = content_of(session.engine, text)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    with Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True) as progress:
        task = progress.add_task(label, total=None)
        session.append(content, on_progress=lambda done, total: progress.update(task, completed=done, total=total))


def content_of(engine: flashmem.Engine, text: str) -> str | list[int]:
    """What `Session.append` takes. Raises ValueError where a model without tokenizer is given words."""
    if engine.tokenizer is not None:
        return text
    try:
        return [int(word) for word in text.split()]
    except ValueError as error:
        raise ValueError("this model has no tokenizer: give token ids, separated by spaces") from error


def stream(session: flashmem.Session, prompt: str, **sampling: Any) -> Iterator[str]:
    """Pieces of the continuation as they are decided; together they are what `Session.generate` returns."""
    tokenizer = session.engine.tokenizer
    ids: list[int] = []
    shown = ""
    for token in session.stream(content_of(session.engine, prompt), **sampling):
        ids.append(token)
        if tokenizer is None:
            yield f"{token} "
            continue
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character is still incomplete
            yield text[len(shown) :]
            shown = text
    if tokenizer is not None:
        yield tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :]


def spoken(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of an answer without the white space before it, which a terminal need not show."""
    begun = False
    for piece in pieces:
        shown = piece if begun else piece.lstrip()
        begun = begun or bool(shown)
        yield shown


__all__ = ["append", "content_of", "spoken", "stream"]
