"""`flashmem chat`: turns over one session."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import flashmem

from . import text
from .ask import open_session, residency
from .options import EngineOptions, GenerateOptions, Raw, with_options
from .output import log, stderr

_HELP = "/stats shows what is on the device, /save PATH writes a memory, /quit or end of input ends"


def add_command(app: typer.Typer) -> None:
    app.command("chat")(with_options(run))


def run(
    engine: EngineOptions,
    generate: GenerateOptions,
    memory: Annotated[Path | None, typer.Argument(help="A memory to start from.")] = None,
    raw: Raw = False,
) -> None:
    """Talk in turns, line by line, over a memory or from nothing; every turn stays in the session.

    Where the model has a form of asking, each line is put in that form.

    Example: `flashmem chat book.mem`
    """
    with engine.engine().session() if memory is None else open_session(memory, engine) as session:
        log(_HELP)
        while (line := _next_line()) is not None and line != "/quit":
            prompt = line if raw else engine.defaults().ask(line)
            try:
                _turn(session, line, prompt, generate.sampling(engine.seed))
            except (ValueError, OSError, flashmem.FlashmemError) as error:  # the conversation so far is worth keeping
                log(f"flashmem: {error}")


def _turn(session: flashmem.Session, line: str, prompt: str, sampling: dict[str, Any]) -> None:
    if line == "/stats":
        log(residency(session.stats()))
    elif line.startswith("/save "):
        _save(session, line.removeprefix("/save ").strip())
    elif line.startswith("/"):
        log(_HELP)
    elif line:
        for piece in text.spoken(text.stream(session, prompt, **sampling)):
            typer.echo(piece, nl=False)
        typer.echo()


def _next_line() -> str | None:
    """The next line of stdin without surrounding space, None at its end."""
    if sys.stdin.isatty():
        stderr.print("> ", end="")
    line = sys.stdin.readline()
    return line.strip() if line else None


def _save(session: flashmem.Session, path: str) -> None:
    if Path(path).exists():
        log(f"{path} exists; choose another name")
        return
    session.save(path)
    log(f"saved {path}")


__all__ = ["add_command"]
