"""`flashmem calibrate`: choose the cut of a Memory Indexer on documents it was not trained on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Json
from .output import answer, answer_json


def add_command(app: typer.Typer) -> None:
    app.command("calibrate")(run)


def run(
    indexer: Annotated[Path, typer.Argument(help="Memory Indexer: a directory, .safetensors or .pt.")],
    shards: Annotated[list[Path], typer.Argument(help="Shards of held-out documents, like those it will serve.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the calibrated indexer.")],
    miss: Annotated[
        float | None, typer.Option(help="Share of the need that may be left out in expectation, e.g. 0.05.")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="Or: mean share of pages to keep, e.g. 0.12.")] = None,
    recall: Annotated[
        Literal["need", "evidence"], typer.Option(help="What a miss counts: attention mass or evidence chunks.")
    ] = "need",
    buckets: Annotated[
        str | None, typer.Option(help="Upper bounds of length buckets in chunks, e.g. 4096,32768.", show_default="one")
    ] = None,
    page_chunks: Annotated[int, typer.Option(help="Chunks per page, as served.")] = 64,
    sink_pages: Annotated[int, typer.Option(help="First pages, always kept.")] = 1,
    recency_pages: Annotated[int, typer.Option(help="Last pages, always kept.")] = 2,
    layer_weights: Annotated[
        str | None, typer.Option(help="Weights of layers in the need, e.g. 1=0.25,2=0.75.", show_default="alike")
    ] = None,
    json: Json = False,
) -> None:
    """Put a Memory Indexer's cut at probability 0.5.

    --miss gives a guarantee for documents drawn like these (conformal risk control), --keep a mean budget.

    Example: `flashmem calibrate run/indexer held-out -o indexer --miss 0.05 --page-chunks 16`
    """
    from ..capture.format import ShardReader  # seconds of torch: after the arguments are parsed
    from ..indexer import MemoryIndexer
    from ..training.calibration import calibrate, curves_of
    from ..training.compare import parse_weights
    from ..training.data import PageRules

    rules = PageRules(page_chunks=page_chunks, sink_pages=sink_pages, recency_pages=recency_pages)
    loaded = MemoryIndexer.from_pretrained(indexer)
    weights = parse_weights(layer_weights.split(",")) if layer_weights else None
    curves = curves_of(ShardReader(*shards), loaded, rules, recall=recall, layer_weights=weights)
    bounds = [int(text) for text in buckets.split(",")] if buckets else []
    made, chosen = calibrate(loaded, curves, alpha=miss, share=keep, buckets=bounds)
    made.save_pretrained(output)
    if json:
        answer_json({"indexer": str(output), "buckets": [asdict(bucket) for bucket in chosen]})
        return
    answer(str(output))
    for bucket in chosen:
        answer(
            f"up to {bucket.chunks:,} chunks: cut {bucket.cut:.3f} keeps {bucket.recall:.1%} of the {recall} "
            f"on {bucket.share:.1%} of the pages ({bucket.documents} documents)"
        )


__all__ = ["add_command"]
