"""Where things are printed: answers to stdout, everything else to stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console

stderr = Console(stderr=True, highlight=False)


def answer(text: str) -> None:
    """One answer on stdout."""
    typer.echo(text)


def answer_json(values: Mapping[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    typer.echo(json.dumps(values))


def log(message: str) -> None:
    """One line of log on stderr."""
    stderr.print(message, markup=False, soft_wrap=True)


__all__ = ["answer", "answer_json", "log", "stderr"]
