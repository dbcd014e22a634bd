"""`flashmem generate`: a prompt without a memory."""

from __future__ import annotations

from typing import Annotated

import typer

from . import text
from .ask import residency
from .options import EngineOptions, GenerateOptions, Json, read_text, with_options
from .output import answer, answer_json, log


def add_command(app: typer.Typer) -> None:
    app.command("generate")(with_options(run))


def run(
    prompt: Annotated[str, typer.Argument(help="The prompt, or - for stdin.")],
    engine: EngineOptions,
    generate: GenerateOptions,
    json: Json = False,
) -> None:
    """Continue a prompt.

    Example: `flashmem generate "Once upon a time" --max-new-tokens 40`
    """
    prompt = read_text("-") if prompt == "-" else prompt
    with engine.engine().session() as session:
        reply = "".join(text.stream(session, prompt, **generate.sampling(engine.seed)))
        stats = session.stats()
    if json:
        answer_json({"text": reply, "stats": stats})
    else:
        answer(reply)
        log(residency(stats))


__all__ = ["add_command"]
