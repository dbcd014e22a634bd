"""`flashmem ask`: a question to a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import flashmem

from . import text
from .options import EngineOptions, GenerateOptions, Json, Raw, with_options
from .output import answer, answer_json, log
from .sizes import format_bytes


def add_command(app: typer.Typer) -> None:
    app.command("ask")(with_options(run))


def run(
    memory: Annotated[Path, typer.Argument(help="A memory made by `flashmem read`.")],
    question: Annotated[str, typer.Argument(help="The text that follows what was read.")],
    engine: EngineOptions,
    generate: GenerateOptions,
    raw: Raw = False,
    json: Json = False,
) -> None:
    """Continue a memory with a question and print the answer; the memory stays as it is.

    Page size and formats are the memory's own. Where the model has a form of asking (`flashmem inspect MODEL` shows
    it), the question is put in that form.

    Example: `flashmem ask book.mem "Who wrote the letter?"`
    """
    with open_session(memory, engine) as session:
        pieces = text.stream(
            session, question if raw else engine.defaults().ask(question), **generate.sampling(engine.seed)
        )
        reply = "".join(text.spoken(pieces))
        stats = session.stats()
    if json:
        answer_json({"answer": reply, "stats": stats})
    else:
        answer(reply)
        log(residency(stats))


def open_session(memory: Path, engine: EngineOptions) -> flashmem.Session:
    """Load the model with the settings that the memory needs, and open it."""
    from ..memory import read_manifest  # torch behind it takes seconds: after the arguments are known to be right

    return engine.engine(read_manifest(memory)["session"]).open(memory)


def residency(stats: dict[str, int]) -> str:
    """One line of log: what was on the device."""
    return (
        f"{stats['tokens']:,} tokens, {stats['resident_pages']:,} of {stats['pages']:,} pages on the device; "
        f"paper {format_bytes(stats['resident_bytes_paper'])} of {format_bytes(stats['full_bytes_paper'])}, "
        f"all-in {format_bytes(stats['device_bytes_all_in'])}; {stats['cycles']} cycles"
    )


__all__ = ["add_command", "open_session", "residency"]
