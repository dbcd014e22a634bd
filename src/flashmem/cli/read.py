"""`flashmem read`: a text becomes a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import text
from .options import EngineOptions, Json, read_text, with_options
from .output import answer, answer_json
from .sizes import format_bytes


def add_command(app: typer.Typer) -> None:
    app.command("read")(with_options(run))


def run(
    file: Annotated[str, typer.Argument(help="A UTF-8 text, or - for stdin.")],
    engine: EngineOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="The memory to write, e.g. book.mem.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing memory.")] = False,
    json: Json = False,
) -> None:
    """Read a text once and save what the model keeps of it as a memory.

    Example: `flashmem read book.txt -o book.mem --keep 0.1`
    """
    if output.exists() and not force:
        raise ValueError(f"{output} exists; --force replaces it")
    content = read_text(file)
    if not content.strip():
        raise ValueError(f"{file} is empty: there is nothing to read")
    with engine.engine().session() as session:
        text.append(session, content, f"reading {file}")
        session.save(output)
        stats = session.stats()
    if json:
        answer_json({"memory": str(output), "stats": stats})
    else:
        size = format_bytes(sum(path.stat().st_size for path in output.iterdir()))
        answer(f"{output}: {stats['tokens']:,} tokens in {stats['pages']:,} pages, {size}")


__all__ = ["add_command"]
