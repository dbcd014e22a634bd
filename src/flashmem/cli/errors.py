"""Bad input becomes one line on stderr and exit status 2; anything else keeps its traceback."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

import flashmem

BAD_INPUT = 2
_UsageError: Any = typer.BadParameter.__base__  # typer has its own or click's, by version, and does not export it


class ReportingGroup(TyperGroup):
    """Commands whose ValueError, OSError, MemoryError or FlashmemError is the user's to mend."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, SystemExit, KeyboardInterrupt, typer.Exit, typer.Abort, _UsageError):
            raise
        except (ValueError, OSError, MemoryError) as error:
            _report_bad_input(error)
        except flashmem.FlashmemError as error:  # looked up last: torch is behind it
            _report_bad_input(error)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        try:
            status = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.Abort:
            _report("aborted")
            sys.exit(1)
        except _UsageError as error:
            command = error.ctx.command_path if error.ctx is not None else "flashmem"
            _report(f"{error.format_message()} (see {command} --help)")
            sys.exit(BAD_INPUT)
        sys.exit(status)


def _report_bad_input(error: Exception) -> NoReturn:
    _report(str(error) or type(error).__name__)
    raise typer.Exit(BAD_INPUT) from error


def _report(message: str) -> None:
    typer.echo(f"flashmem: {' '.join(message.split())}", err=True)


__all__ = ["BAD_INPUT", "ReportingGroup"]
