"""`flashmem kv`: what a context costs, from formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from ..accounting import FlopsReport, KVReport, StepFlops, flops_report, kv_report, resolve_geometry
from ..config import KVFormat, LSAConfig, ModelGeometry
from .output import answer_json
from .sizes import format_bytes, parse_tokens

_DEFAULTS = LSAConfig()
_LABELS = {
    "csa_kv": "CSA entries",
    "index_keys": "index keys",
    "hca": "HCA entries",
    "window": "sliding windows",
    "compressor": "compressor rings",
    "pages": "pages",
    "index_rows": "index rows of target layers",
    "hidden": "observed hidden states",
    "page_table": "page table",
    "slack": "allocated, unused",
}


def add_command(app: typer.Typer) -> None:
    app.command("kv")(run)


def run(
    model: Annotated[
        str, typer.Option(help="deepseek-v4-flash, deepseek-v4-pro, flashmem-demo, a model directory or a config.json.")
    ] = "deepseek-v4-flash",
    context: Annotated[str, typer.Option(help="Tokens, with K = 1024: 46K, 1M, 131072.")] = "1M",
    keep: Annotated[float, typer.Option(help="Share of pages on the device.")] = 0.1,
    kv_format: Annotated[KVFormat, typer.Option("--format", help="Format of the records.")] = "fp8",
    state_format: Annotated[
        Literal["bf16", "fp32"], typer.Option(help="The model's dtype: windows and rings are held in it.")
    ] = "bf16",
    page_chunks: Annotated[int, typer.Option(help="Chunks of 4 tokens per page.")] = _DEFAULTS.page_chunks,
    targets: Annotated[
        int | None, typer.Option(help="Target layers; by default what the Memory Indexer reads.")
    ] = None,
    tau: Annotated[int, typer.Option(help="Decode steps per cycle.")] = _DEFAULTS.tau,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Report the KV bytes of a context per tier and component, and the FLOPs of a decoded token. No weights needed.

    Two accountings: `paper` counts resident CSA entries, their index keys and HCA entries, as published; `all-in`
    counts everything a session holds.

    Example: `flashmem kv --model deepseek-v4-flash --context 1M --keep 0.1`
    """
    geometry = resolve_geometry(model)
    lsa = LSAConfig(keep=keep, page_chunks=page_chunks, tau=tau, kv_format=kv_format)
    kv, flops = report(geometry, parse_tokens(context), lsa, state_format=state_format, num_targets=targets)
    if json:
        answer_json(as_json(model, kv, flops))
    else:
        _print(model, geometry, kv, flops)


def report(
    geometry: ModelGeometry, context_tokens: int, lsa: LSAConfig, *, state_format: KVFormat, num_targets: int | None
) -> tuple[KVReport, FlopsReport]:
    """Bytes and FLOPs of one context under a config whose `keep` and `kv_format` are set."""
    assert lsa.kv_format != "auto"
    kv = kv_report(
        geometry,
        context_tokens,
        keep=lsa.keep,
        kv_format=lsa.kv_format,
        state_format=state_format,
        page_chunks=lsa.page_chunks,
        num_targets=num_targets,
        observation_window=lsa.observation_window or 1,  # 1 as published
        sink_pages=lsa.sink_pages,
        recency_pages=lsa.recency_pages,
    )
    flops = flops_report(
        geometry,
        context_tokens,
        resident_chunks=kv.resident_chunks,
        tau=lsa.tau,
        num_targets=num_targets,
        observation_window=lsa.observation_window or 1,  # 1 as published
    )
    return kv, flops


def as_json(model: str, kv: KVReport, flops: FlopsReport) -> dict[str, Any]:
    """The object that --json prints; bytes and FLOPs are integers."""
    return {
        "model": model,
        "context_tokens": kv.context_tokens,
        "kv_format": kv.kv_format,
        "page_chunks": kv.page_chunks,
        "num_pages": kv.num_pages,
        "resident_pages": kv.resident_pages,
        "resident_chunks": kv.resident_chunks,
        "record_bytes": kv.record_bytes,
        "paper": {
            "full_bytes": kv.paper.full_bytes,
            "resident_bytes": kv.paper.resident_bytes,
            "ratio": kv.paper.ratio,
            "full_components": dict(kv.paper.full_components),
            "resident_components": dict(kv.paper.resident_components),
        },
        "all_in": {
            "full_bytes": kv.all_in.full_bytes,
            "device_bytes": kv.all_in.device_bytes,
            "host_bytes": kv.all_in.host_bytes,
            "disk_bytes": kv.all_in.disk_bytes,
            "ratio": kv.all_in.ratio,
            "full_components": dict(kv.all_in.full_components),
            "device_components": dict(kv.all_in.device),
            "host_components": dict(kv.all_in.host),
            "disk_components": dict(kv.all_in.disk),
        },
        "flops_per_token": {
            "full": flops.full.total,
            "lsa": flops.lsa.total,
            "ratio": flops.ratio,
            "full_components": asdict(flops.full),
            "lsa_components": asdict(flops.lsa),
        },
    }


def _print(model: str, geometry: ModelGeometry, kv: KVReport, flops: FlopsReport) -> None:
    console = Console(highlight=False)
    page_tokens = kv.page_chunks * geometry.csa_ratio
    console.print(f"{model}: {kv.context_tokens:,} tokens, records in {kv.kv_format}", soft_wrap=True)
    console.print(
        f"{kv.resident_pages:,} of {kv.num_pages:,} pages of {page_tokens} tokens on the device, "
        f"{kv.record_bytes:,} bytes each\n",
        soft_wrap=True,
    )
    paper, all_in = kv.paper, kv.all_in
    console.print(
        _bytes_table("paper accounting", {"full": paper.full_components, "resident": paper.resident_components})
    )
    console.print(f"resident / full: {paper.ratio:.1%}\n")
    tiers = {"full": all_in.full_components, "device": all_in.device, "host": all_in.host, "disk": all_in.disk}
    console.print(_bytes_table("all-in accounting", tiers))
    console.print(f"device / full: {all_in.ratio:.1%}\n")
    console.print(_flops_table(flops.full, flops.lsa))
    console.print(f"lsa / full, whole model: {flops.ratio:.1%}")


def _bytes_table(title: str, columns: Mapping[str, Mapping[str, int]]) -> Table:
    table = _table(title, columns)
    names = dict.fromkeys(name for column in columns.values() for name in column)
    for name in names:
        cells = (format_bytes(column[name]) if name in column else "" for column in columns.values())
        table.add_row(_LABELS[name], *cells)
    table.add_section()
    table.add_row("total", *(format_bytes(sum(column.values())) for column in columns.values()))
    return table


def _flops_table(full: StepFlops, lsa: StepFlops) -> Table:
    table = _table("GFLOP per decoded token", ("full", "lsa"))
    for name, value in asdict(full).items():
        table.add_row(name.replace("_", " "), f"{value / 1e9:.2f}", f"{getattr(lsa, name) / 1e9:.2f}")
    table.add_section()
    table.add_row("total", f"{full.total / 1e9:.2f}", f"{lsa.total / 1e9:.2f}")
    return table


def _table(title: str, columns: Mapping[str, Any] | tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", min_width=60)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    return table


__all__ = ["add_command", "as_json", "report"]
