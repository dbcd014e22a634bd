"""`flashmem capture`: prompts, or published dumps, become training shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..accounting.models import DEMO, shipped_model
from ..config import ModelGeometry
from .options import Json
from .output import answer, answer_json, log, stderr
from .sizes import format_bytes

_WHY = {
    "damaged": "the document's file was damaged or missing; capturing it again",
    "empty": "the answer was a stop token at once; nothing to learn from, not written",
}


def add_command(app: typer.Typer) -> None:
    app.command("capture")(run)


def run(
    model: Annotated[str, typer.Argument(help="Model directory, hub name or flashmem-demo.")],
    prompts: Annotated[Path, typer.Argument(help="JSON lines, or a directory of published doc_*.pkl dumps.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the shards; goes on with those there.")],
    layers: Annotated[str | None, typer.Option(help="CSA indices to keep, e.g. 10,12,20.", show_default="all")] = None,
    tau: Annotated[int, typer.Option(help="Tokens after a query that its labels sum over.")] = 64,
    observe: Annotated[int, typer.Option(help="Hidden states kept per query.")] = 1,
    queries_per_doc: Annotated[int, typer.Option(help="Queries per document, at most.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer that a prompt does not give.")] = 256,
    tail: Annotated[int, typer.Option(help="Last prompt tokens to watch too.")] = 0,
    vote_layers: Annotated[int, typer.Option(help="Layers that must agree for the published vote.")] = 3,
    batch: Annotated[int, typer.Option(help="Documents decoded together, where the model answers.")] = 1,
    prefill_chunk: Annotated[int, typer.Option(help="Tokens per prefill forward.")] = 512,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="cuda if there is one")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="'auto' spreads the layers over all GPUs.", show_default="one device")
    ] = None,
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], typer.Option(help="Type of the weights.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the sampled queries.")] = 0,
    json: Json = False,
) -> None:
    """Run a model over prompts and write what a Memory Indexer is trained from.

    Documents that are in the shards already are verified and skipped. A directory of published dumps is converted; of
    the model, only its config.json is then needed.

    Example: `flashmem capture my-model prompts.jsonl -o shards --tau 64 --observe 16`
    """
    directory = str(shipped_model()) if model == DEMO else model
    chosen = None if layers is None else parse_layers(layers)
    common: dict[str, Any] = {
        "layers": chosen, "tau": tau, "observe": observe, "queries": queries_per_doc, "vote_layers": vote_layers,
        "seed": seed,
    }  # fmt: skip
    if prompts.is_dir():
        from ..capture.dumps import ConvertConfig, convert  # torch behind it takes seconds

        config = ConvertConfig(**common)
        geometry = ModelGeometry.from_json(directory)
        with _progress("converting", len(list(prompts.glob("doc_*.pkl")))) as tell:
            written, there = convert(prompts, output, geometry, config, tell)
        _report({"written": written, "there": there}, output, json)
        return
    from ..capture.prompts import PromptFile
    from ..capture.runner import CaptureConfig, capture, open_engine, open_shards

    settings = CaptureConfig(
        **common, max_new_tokens=max_new_tokens, tail=tail, batch=batch, prefill_chunk=prefill_chunk
    )  # fmt: skip
    file = PromptFile(prompts)
    log(f"loading {model}")
    engine = open_engine(directory, settings, device=device, dtype=dtype, device_map=device_map)
    with open_shards(output, engine, settings) as writer, _progress("capturing", len(file)) as tell:
        summary = capture(engine, file.read(engine.tokenizer), writer, settings, tell)
    _report(asdict(summary), output, json)


def parse_layers(text: str) -> tuple[int, ...]:
    """'10,12,20' is (10, 12, 20). Raises ValueError."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"{text!r} names no CSA indices; write 10,12,20")
    return tuple(int(part) for part in text.split(","))


def _report(summary: dict[str, Any], output: Path, as_json: bool) -> None:
    from ..capture.format import ShardReader

    entries = ShardReader(output).entries
    totals = {
        "documents": len(entries),
        "queries": sum(entry.queries for entry in entries),
        "bytes": sum(entry.bytes for entry in entries),
    }
    if as_json:
        answer_json({"shards": str(output), "run": summary, "total": totals})
    else:
        size = format_bytes(totals["bytes"])
        answer(
            f"{output}: {totals['documents']} documents, {totals['queries']:,} queries, {size}; "
            f"{summary['written']} written now, {summary['there']} there before"
        )


@contextmanager
def _progress(label: str, total: int) -> Iterator[Any]:
    """A bar on stderr, moved by (rid, what became of it)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("documents"))
    with Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True) as progress:
        task = progress.add_task(label, total=total)

        def tell(rid: str, what: str) -> None:
            if what in _WHY:
                log(f"{rid}: {_WHY[what]}")
            if what != "damaged":
                progress.advance(task)

        yield tell


__all__ = ["add_command", "parse_layers"]
