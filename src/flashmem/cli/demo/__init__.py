"""`flashmem demo`: a long text read once, and asked under full attention, LSA and recency."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ...accounting.models import shipped_model
from ...config import ModelDefaults
from ..options import Json
from ..output import answer_json, log, stderr
from ..sizes import parse_tokens

DEFAULT_PICTURE = Path("flashmem-demo.png")


def add_command(app: typer.Typer) -> None:
    app.command("demo")(run)


def run(
    context: Annotated[str, typer.Option(help="Tokens to read, from 2K.")] = "16K",
    keep: Annotated[
        float | None, typer.Option(help="Share of pages on the device.", show_default="the model's own")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the text, its facts and the questions.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="The PNG to write.", show_default=str(DEFAULT_PICTURE))] = None,
    json: Json = False,
) -> None:
    """Read a long text with the small model that comes along, on the CPU, and ask seven questions about it.

    Facts are scattered over a text of our own; the questions are drawn before anything is read, and each is asked once
    under full attention, under LSA and under a sliding window of as many pages. Shown are the answers, the bytes in
    every tier, and which pages were on the device in each cycle, here and as a PNG.

    Example: `flashmem demo --context 16K --seed 1`
    """
    context_tokens, path = parse_tokens(context), _checked(picture)
    model = shipped_model()
    config = None if keep is None else ModelDefaults.of(model).config(keep=keep)
    from .compare import compare  # torch behind it takes seconds: after the arguments are known to be right
    from .document import make_document
    from .picture import write_png
    from .report import as_json, print_report

    document = make_document(model, context_tokens, seed)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task("")

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        comparison = compare(document, config, tell)
    if path is not None:
        write_png(path, document, comparison)
    indexer = "bundled" if (model / "indexer").is_dir() else "native"
    if json:
        answer_json(as_json(document, comparison, seed=seed, indexer=indexer, picture=path))
    else:
        print_report(document, comparison, indexer=indexer)
        if path is not None:
            log(f"the same as a picture: {path}")


def _checked(picture: Path | None) -> Path | None:
    """Where the PNG goes, known before anything is read; None where nobody asked for it and matplotlib is missing."""
    path = picture or DEFAULT_PICTURE
    if not path.absolute().parent.is_dir():
        raise ValueError(f"no directory {path.parent} for the picture")
    if find_spec("matplotlib") is None:
        if picture is not None:
            raise ValueError("the picture needs matplotlib: pip install matplotlib")
        log("matplotlib is not installed: the picture is drawn in the terminal only")
        return None
    return path


__all__ = ["add_command"]
