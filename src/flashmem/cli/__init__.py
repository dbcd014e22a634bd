"""The command `flashmem`: one module per command.

Stdout is the answer, stderr is log and progress. Bad input ends with status 2 and one line that says what was wrong.
"""

from __future__ import annotations

import sys

import typer

from . import ask, bench, calibrate, capture, chat, demo, eval, generate, inspect, kv, read, train
from .errors import ReportingGroup

app = typer.Typer(
    cls=ReportingGroup,
    name="flashmem",
    help="DeepSeek-V4 on ultra-long context with a fraction of the KV cache on the device.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for module in (demo, read, ask, chat, generate, kv, inspect, capture, train, calibrate, eval, bench):
    module.add_command(app)


def main() -> None:
    """Entry point of the console script."""
    app(args=sys.argv[1:] or ["--help"])


__all__ = ["app", "main"]
