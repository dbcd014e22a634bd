"""`flashmem bench`: page swaps, decode steps and their parts, capacity and kernels, measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from ..accounting import resolve_geometry
from ..config import KVFormat
from .errors import ReportingGroup
from .options import Json
from .output import answer_json, log
from .sizes import format_bytes, parse_bytes, parse_tokens

if TYPE_CHECKING:
    import torch

    from ..bench.skeleton import Skeleton

app = typer.Typer(cls=ReportingGroup, help="Measure page swaps, decode steps, capacity and kernels.")

Model = Annotated[str, typer.Option(help="Geometry: deepseek-v4-flash, deepseek-v4-pro, a directory or a config.json.")]
Device = Annotated[str | None, typer.Option(help="Where to measure, e.g. cuda:0.", show_default="CUDA if there is one")]
Out = Annotated[Path | None, typer.Option(help="Result file, JSON.", show_default="none")]
Peers = Annotated[
    list[str] | None, typer.Option("--peer", help="Another system to run if it is installed; repeatable.")
]
Experts = Annotated[int, typer.Option(help="Experts a layer, of 256 in V4-Flash: as many as fit.")]
Contexts = Annotated[str, typer.Option(help="Tokens of history, with commas.")]
Dtype = Annotated[Literal["bfloat16", "float32"], typer.Option(help="The model's dtype.")]
Format = Annotated[KVFormat, typer.Option("--format", help="Format of the records.")]
Keep = Annotated[float, typer.Option(help="Share of pages that LSA keeps on the device.")]
Churn = Annotated[float, typer.Option(help="Share of them that every window replaces.")]
Tau = Annotated[int, typer.Option(help="Decode steps per window.")]
Lead = Annotated[int, typer.Option(help="Steps before its window that a swap begins: 0 waits, more needs more slots.")]
Kernels = Annotated[
    Literal["reference", "fused"] | None,
    typer.Option(help="What a decode step runs on.", show_default="fused on CUDA, else reference"),
]
Graphs = Annotated[
    bool | None,
    typer.Option("--graphs/--no-graphs", help="Replay captured steps.", show_default="with fused kernels on CUDA"),
]
Batches = Annotated[str, typer.Option(help="Sessions in a batch, with commas.")]
PageChunks = Annotated[int, typer.Option(help="Chunks of 4 tokens per page.")]
Windows = Annotated[int, typer.Option(help="Windows to measure, after one for warmth.", min=1)]
KVBudget = Annotated[
    str | None, typer.Option(help="Bytes of the device for KV, e.g. 40GiB.", show_default="0.7 of what weights leave")
]
HostBudget = Annotated[
    str | None, typer.Option(help="Bytes of main memory for mirrors.", show_default="0.8 of what is free")
]


def add_command(parent: typer.Typer) -> None:
    app.command("kernels")(kernels)
    app.command("swap")(swap)
    app.command("decode")(_of_a_skeleton(decode))
    app.command("profile")(_of_a_skeleton(profile))
    app.command("capacity")(_of_a_skeleton(capacity))
    app.command("prefill")(prefill)
    parent.add_typer(app, name="bench")


def kernels(
    device: Device = None,
    directory: Annotated[
        Path | None, typer.Option(help="On CUDA: where rows.jsonl goes, row by row.", show_default="none")
    ] = None,
    seconds: Annotated[float, typer.Option(help="On CUDA: start nothing new after this long.")] = 540,
    jobs: Annotated[int, typer.Option(help="On CUDA: processes that compile ahead; 0 compiles as needed.")] = 12,
    parts: Annotated[
        str | None, typer.Option(help="On CUDA: parts, with commas; '' for peers alone.", show_default="all")
    ] = None,
    sweep: Annotated[bool, typer.Option(help="On CUDA: time scores and attention in all their tiles.")] = True,
    chunks: Annotated[str, typer.Option(help="Without CUDA: sizes, with commas.")] = "4096,16384",
    rounds: Annotated[int, typer.Option(help="Without CUDA: calls that are timed.", min=1)] = 7,
    peer: Peers = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Check every kernel against float64, then time it: fused ones and their peers on CUDA, definitions elsewhere.

    On CUDA it compiles, checks and times for minutes; it writes its rows to DIRECTORY as they come, and all of them to
    OUT at the end.

    Example: `flashmem bench kernels --directory results/gpu_kernels`
    """
    where = _device(device)
    if where.type == "cuda":
        from ..bench import kernels as fused  # triton is behind it
        from ..bench.peers import check

        names = list(fused.PARTS) if parts is None else [name for name in parts.split(",") if name]
        if unknown := sorted(set(names) - fused.PARTS.keys()):
            raise ValueError(f"no part {unknown[0]!r}; parts are {', '.join(fused.PARTS)}")
        for name in peer or ():
            check(name)
        result = _run(
            "gpu_kernels", out, json,
            lambda _: fused.run(
                directory, seconds=seconds, jobs=jobs, parts=names, peers=peer or (), sweep=sweep, program="flashmem"
            ),
            fused.lines,
        )  # fmt: skip
        if result["failures"]:
            raise typer.Exit(1)
        return
    from ..bench import definitions

    sizes = [parse_tokens(size) for size in chunks.split(",")]
    if bad := [size for size in sizes if size < 64 or size % 64]:
        raise ValueError(f"chunks must be multiples of 64, got {bad[0]}")
    peers = _peers(peer)
    _run(
        "kernels", out, json,
        lambda _: {"peers": peers, "rows": definitions.run(device=where, chunks=sizes, rounds=rounds)},
        lambda result: [
            _table(
                "definitions (no fused kernels on this device)", result["rows"],
                {
                    "operation": lambda row: row["operation"],
                    "chunks": lambda row: f"{row['chunks']:,}",
                    "ms": lambda row: f"{row['milliseconds']['median']:.3f}",
                    "GB/s": lambda row: f"{row['gb_per_s']:.2f}",
                },
            )
        ],
    )  # fmt: skip


def swap(
    model: Model = "deepseek-v4-flash",
    context: Annotated[str, typer.Option(help="Tokens of the session whose pages are swapped.")] = "1M",
    keep: Keep = 0.1,
    churn: Annotated[str, typer.Option(help="Shares of the resident pages, with commas.")] = "0.05,0.1,0.25,0.5,1",
    kv_format: Format = "fp8",
    page_chunks: PageChunks = 64,
    rounds: Annotated[int, typer.Option(help="Swaps that are timed.", min=1)] = 20,
    device: Device = None,
    peer: Peers = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Swap pages between mirror and pool, beside one pinned copy of as many bytes and a gather on the CPU.

    Bytes are checked first. The mirror of 1M tokens takes 3.6 GiB of main memory.

    Example: `flashmem bench swap --context 256K --churn 0.1,1`
    """
    from ..bench import swap as bench

    where = _device(device)
    churns = [float(share) for share in churn.split(",")]
    if bad := [share for share in churns if not 0 < share <= 1]:
        raise ValueError(f"churn must lie in (0, 1], got {bad[0]}")
    case = bench.SwapCase(
        geometry=resolve_geometry(model), context_tokens=parse_tokens(context), keep=keep, kv_format=kv_format,
        page_chunks=page_chunks,
    )  # fmt: skip
    peers = _peers(peer)
    _run(
        "swap", out, json, lambda _: {"peers": peers, **bench.run(case, device=where, churns=churns, rounds=rounds)},
        lambda result: [
            _table(
                f"{result['resident_pages']:,} of {result['pages']:,} pages of {result['record_bytes']:,} bytes on the "
                f"device, {where}, copies {result['page_copies']}", result["rows"],
                {
                    "to": lambda row: "device" if row["direction"] == "in" else "host",
                    "churn": lambda row: f"{row['churn']:.0%}",
                    "pages": lambda row: f"{row['pages']:,}",
                    "swap GB/s": lambda row: f"{row['gb_per_s']['swap']:.1f}",
                    "one by one": lambda row: f"{row['gb_per_s']['one_by_one']:.1f}",
                    "gather": lambda row: f"{row['gb_per_s'].get('gather_and_copy', '')}",
                    "one copy": lambda row: f"{row['gb_per_s']['peak']:.1f}",
                    "of one copy": lambda row: f"{row['peak_ratio']:.1%}",
                },
            )
        ],
    )  # fmt: skip


def decode(
    made: Skeleton,
    budgets: dict[str, int],
    context: Contexts = "256K,512K,1M",
    batch: Batches = "1,2,4,8",
    windows: Windows = 2,
    peer: Peers = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Time decode steps of full residency and LSA on a skeleton of the model, inside windows and over whole ones.

    The skeleton has the true geometry, random weights and few experts; histories are synthetic.

    Example: `flashmem bench decode --experts 8 --context 256K --batch 1,8`
    """
    from ..bench import decode as bench

    contexts, batches = _sizes(context), _sizes(batch)

    def measured(save: Save) -> dict[str, Any]:
        about = {"peers": _peers(peer), **_about(made, contexts, budgets, (windows + 1) * made.tau * len(batches))}
        rows = bench.run_decode(
            made, contexts=contexts, batches=batches, windows=windows, **budgets, on_row=_rows(save, about)
        )
        return {**about, "rows": rows}

    _run("decode", out, json, measured, lambda result: [_steps_table(result)])


def profile(
    made: Skeleton,
    budgets: dict[str, int],
    context: Annotated[str, typer.Option(help="Tokens of history.")] = "1M",
    batch: Batches = "1,32",
    modes: Annotated[str, typer.Option(help="lsa, full or both, with commas.")] = "lsa",
    windows: Windows = 2,
    out: Out = None,
    json: Json = False,
) -> None:
    """Show where the time of a decode step goes, by component, and what the first step of a window adds.

    The skeleton is that of `flashmem bench decode`.

    Example: `flashmem bench profile --context 1M --batch 1,32 --out results/profile.json`
    """
    from ..bench import profile as bench
    from ..bench.skeleton import MODES

    tokens, batches = parse_tokens(context), _sizes(batch)
    chosen = [mode for mode in MODES if mode in modes.split(",")]
    if unknown := sorted(set(modes.split(",")) - set(MODES)):
        raise ValueError(f"modes are {' and '.join(MODES)}, got {unknown[0]!r}")

    def measured(save: Save) -> dict[str, Any]:
        about = _about(made, [tokens], budgets, bench.steps_of_all(made, batches, windows))
        rows = bench.run_profile(
            made, context=tokens, modes=chosen, batches=batches, windows=windows, **budgets, on_row=_rows(save, about)
        )
        return {**about, "rows": rows}

    _run("profile", out, json, measured, lambda result: [_profile_table(result)])


def capacity(
    made: Skeleton,
    budgets: dict[str, int],
    context: Contexts = "256K,512K,1M",
    windows: Windows = 1,
    max_sessions: Annotated[int, typer.Option(help="Open no more than this, however many fit.", min=1)] = 64,
    plan: Annotated[bool, typer.Option("--plan", help="Only the memory arithmetic: nothing is built or run.")] = False,
    peer: Peers = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Count the sessions that fit into the same bytes with full residency and with LSA, and decode all of them.

    Example: `flashmem bench capacity --kv-budget 40GiB --plan`
    """
    from ..bench import decode as bench

    contexts = _sizes(context)
    about = {"peers": _peers(peer), **_about(made, contexts, budgets, (windows + 1) * made.tau)}
    if plan:
        _run("capacity_plan", out, json, lambda _: about, lambda result: [_plan_table(result)])
        return

    def measured(save: Save) -> dict[str, Any]:
        rows = bench.run_capacity(
            made, contexts=contexts, windows=windows, max_sessions=max_sessions, **budgets, on_row=_rows(save, about)
        )
        return {**about, "rows": rows}

    _run("capacity", out, json, measured, lambda result: [_plan_table(result), _capacity_table(result)])


def prefill(
    model: Annotated[
        str | None, typer.Option(help="Directory of a small model.", show_default="the shipped one")
    ] = None,
    first: Annotated[str, typer.Option(help="Tokens at which the stock paths begin; they double.")] = "4K",
    context: Annotated[str, typer.Option(help="Tokens of our own prefills, with commas.")] = "1M",
    memory: Annotated[
        str | None,
        typer.Option(
            help="Bytes that a stock prefill may take beside the weights.", show_default="0.9 of what is free"
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Try no stock prefill that would take longer.")] = 60,
    our_seconds: Annotated[float, typer.Option(help="End a prefill of ours after this long.")] = 400,
    prefill_chunk: Annotated[int, typer.Option(help="Tokens at a time of our own prefills.")] = 2048,
    stock_chunk: Annotated[int, typer.Option(help="Tokens at a time of the stock model in pieces.")] = 2048,
    prefill_kernels: Annotated[
        Literal["reference", "fused", "both"] | None,
        typer.Option(help="What our own prefills run on.", show_default="both on CUDA, else reference"),
    ] = None,
    keep: Keep = 0.1,
    page_chunks: Annotated[
        int | None, typer.Option(help="Chunks of 4 tokens per page.", show_default="the model's own")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, typer.Option(help="The model's dtype.", show_default="the model's own")
    ] = None,
    device: Device = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Time long prefills of a small model: the stock forward as far as it goes under a memory limit, and ours.

    The stock model runs whole and in pieces with its cache; the logits of all paths are compared first.

    Example: `flashmem bench prefill --context 128K,1M --out results/prefill_stock.json`
    """
    from ..bench import prefill as bench
    from ..store.device import free_bytes

    where, lengths, (start,) = _device(device), _sizes(context), _sizes(first)
    chosen = prefill_kernels or ("both" if where.type == "cuda" else "reference")
    settings = {"keep": keep, "prefill_chunk": prefill_chunk, "page_chunks": page_chunks}
    given = {name: value for name, value in settings.items() if value is not None}
    loaded, indexer, config = _small_model(model, where, dtype, **given)
    limits = bench.Limits(
        peak_bytes=free_bytes(where) * 9 // 10 if memory is None else parse_bytes(memory),
        seconds=seconds,
        our_seconds=our_seconds,
    )
    _run(
        "prefill_stock", out, json,
        lambda save: bench.run(
            loaded, config=config, indexer=indexer, first=start, lengths=lengths, limits=limits,
            stock_chunk=stock_chunk, kernels=("reference", "fused") if chosen == "both" else (chosen,),
            on_row=_rows(save, {}),
        ),
        lambda result: [_prefill_table(result), _ratio_table(result)],
    )  # fmt: skip


# ---- settings


def _device(name: str | None) -> torch.device:
    from ..backbone.load import find_device  # torch: after the arguments are parsed

    return find_device(name)


def _sizes(text: str) -> list[int]:
    sizes = [parse_tokens(size) for size in text.split(",")]
    if bad := [size for size in sizes if size < 1]:
        raise ValueError(f"sizes must be at least 1, got {bad[0]}")
    return sizes


def _small_model(directory: str | None, device: torch.device, dtype: str | None, **settings: Any) -> Any:
    """A model with its indexer, and its settings with these in them."""
    from ..accounting import shipped_model
    from ..backbone.load import load_model
    from ..config import ModelDefaults
    from ..indexer import MemoryIndexer

    place = Path(directory) if directory is not None else shipped_model()
    if place is None:
        raise ValueError("the package lacks its model: give --model")
    defaults = ModelDefaults.of(place)
    loaded, _ = load_model(place, device=device, dtype=dtype or defaults.dtype, device_map=None)
    bundled = place / "indexer"
    return loaded, MemoryIndexer.from_pretrained(bundled) if bundled.is_dir() else None, defaults.config(**settings)


def _skeleton(
    model: Model = "deepseek-v4-flash",
    experts: Experts = 8,
    keep: Keep = 0.1,
    churn: Churn = 0.1,
    tau: Tau = 64,
    lead: Lead = 0,
    kv_format: Format = "fp8",
    page_chunks: PageChunks = 64,
    dtype: Dtype = "bfloat16",
    kernels: Kernels = None,
    cuda_graphs: Graphs = None,
    kv_budget: KVBudget = None,
    host_budget: HostBudget = None,
    device: Device = None,
) -> tuple[Skeleton, dict[str, int]]:
    """The skeleton that these options describe, and the bytes that its sessions may take."""
    import torch

    from ..bench.skeleton import Skeleton

    where = _device(device)
    kernels = kernels or ("fused" if where.type == "cuda" else "reference")
    made = Skeleton(
        geometry=resolve_geometry(model), device=where, experts=experts, dtype=getattr(torch, dtype), keep=keep,
        churn=churn, tau=tau, lead=lead, kv_format=kv_format, page_chunks=page_chunks, kernels=kernels,
        cuda_graphs=(kernels == "fused" and where.type == "cuda") if cuda_graphs is None else cuda_graphs,
    )  # fmt: skip
    return made, _budgets(made, kv_budget, host_budget)


def _of_a_skeleton(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of a skeleton instead of its first two parameters, skeleton and budgets."""
    shared, own = signature(_skeleton), list(signature(command).parameters.values())[2:]

    @wraps(command)
    def run(**values: Any) -> None:
        made, budgets = _skeleton(**{name: values.pop(name) for name in shared.parameters})
        command(made, budgets, **values)

    hints = {name: hint for each in (_skeleton, command) for name, hint in _hints(each).items()}
    chosen = [*shared.parameters.values(), *own]
    run.__annotations__ = {parameter.name: hints[parameter.name] for parameter in chosen}
    run.__signature__ = Signature(  # type: ignore[attr-defined]
        [parameter.replace(annotation=hints[parameter.name]) for parameter in chosen]
    )
    return run


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations with their help; a skeleton's own name stands for nothing here."""
    return get_type_hints(function, include_extras=True, localns={"Skeleton": Any})


def _budgets(skeleton: Skeleton, kv_budget: str | None, host_budget: str | None) -> dict[str, int]:
    from ..bench.skeleton import default_budgets

    device, host = default_budgets(skeleton)
    return {
        "device_budget_bytes": device if kv_budget is None else parse_bytes(kv_budget),
        "host_budget_bytes": host if host_budget is None else parse_bytes(host_budget),
    }


def _about(skeleton: Skeleton, contexts: Sequence[int], budgets: Mapping[str, int], steps: int) -> dict[str, Any]:
    from ..bench.skeleton import describe, plan

    return {"model": describe(skeleton), "memory": plan(skeleton, list(contexts), steps, **budgets)}


def _peers(names: Sequence[str] | None) -> dict[str, str]:
    """What became of every peer that was asked for."""
    from ..bench.peers import state

    found = {name: state(name) for name in names or ()}
    for name, what in found.items():
        log(f"{name}: {what}")
    return found


# ---- results


Save = Callable[[dict[str, Any]], None]
"""Takes what is measured so far."""


def _rows(save: Save, about: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Save each row behind those before it."""
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        save({**about, "rows": rows})

    return add


def _run(
    name: str,
    out: Path | None,
    json: bool,
    measure: Callable[[Save], dict[str, Any]],
    tables: Callable[[dict[str, Any]], Iterable[Table | str]],
) -> dict[str, Any]:
    """Measure, print and save; until it is all there, what is there is saved with every row."""
    from ..bench import report

    started = report.machine()

    def save(begun: dict[str, Any]) -> None:
        if out is not None:
            report.write_result(out, name, {"complete": False, **begun}, started, program="flashmem")

    result = {"complete": True, **measure(save)}
    if json:
        answer_json(result)
    else:
        console = Console(highlight=False)
        for table in tables(result):
            console.print(table)
    if out is not None:
        report.write_result(out, name, result, started, program="flashmem")
    return result


Columns = Mapping[str, Callable[[dict[str, Any]], str]]


def _table(title: str, rows: Sequence[dict[str, Any]], columns: Columns) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def _title(result: Mapping[str, Any]) -> str:
    model = result["model"]
    return (
        f"{model['layers']} layers with {model['experts']} of {model['experts_of_the_real_model']} experts, random "
        f"weights, synthetic history; {model['kv_format']} records, LSA keeps {model['keep']:.1%}"
    )


def _steps_table(result: dict[str, Any]) -> Table:
    def measured(show: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
        return lambda row: "" if "failed" in row else show(row)

    return _table(
        _title(result), result["rows"],
        {
            "context": lambda row: f"{row['context']:,}",
            "mode": lambda row: row["mode"],
            "batch": lambda row: str(row["batch"]),
            "step ms": measured(lambda row: f"{row['step_ms']['median']:.2f}"),
            "with swaps": measured(lambda row: f"{row['mean_step_ms']:.2f}"),
            "tokens/s": measured(lambda row: f"{row['tokens_per_second']:.1f}"),
            "pages moved": measured(lambda row: f"{row['pages_moved_per_window']:.0f}"),
            "of full": lambda row: f"{ratio:.2f}" if (ratio := row.get("mean_step_time_ratio")) is not None else "",
            "": lambda row: row.get("failed", ""),
        },
    )  # fmt: skip


def _profile_table(result: dict[str, Any]) -> Table:
    rows = [line for row in result["rows"] for line in _profile_lines(row)]
    return _table(
        _title(result), rows,
        {
            "part of a step": lambda row: row["part"],
            "context": lambda row: f"{row['context']:,}",
            "mode": lambda row: row["mode"],
            "batch": lambda row: str(row["batch"]),
            "ms": lambda row: "" if row["ms"] is None else f"{row['ms']:.3f}",
            "of the step": lambda row: "" if row["share"] is None else f"{row['share']:.1%}",
            "limit ms": lambda row: "" if row["limit_ms"] is None else f"{row['limit_ms']:.3f}",
        },
    )  # fmt: skip


def _profile_lines(row: dict[str, Any]) -> list[dict[str, Any]]:
    from ..bench.profile import parts

    return [{**row, **line} for line in parts(row)]


def _prefill_table(result: dict[str, Any]) -> Table:
    return _table(
        f"Prefill on {result['device']}, {result['dtype']}", result["rows"],
        {
            "path": lambda row: row["path"],
            "tokens": lambda row: f"{row['tokens']:,}" if "tokens" in row else "",
            "seconds": lambda row: f"{row['seconds']:.2f}" if "seconds" in row else "",
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}" if "seconds" in row else "",
            "peak": lambda row: format_bytes(row["peak_bytes"]) if "peak_bytes" in row else "",
            "": lambda row: row.get("failed", ""),
        },
    )  # fmt: skip


def _ratio_table(result: dict[str, Any]) -> Table:
    return _table(
        "The stock model at its longest length over flashmem at the same", result["ratios"],
        {
            "path": lambda row: row["path"],
            "over": lambda row: row["over"],
            "tokens": lambda row: f"{row['tokens']:,}",
            "seconds": lambda row: f"{row['seconds_ratio']:.2f}" if "seconds_ratio" in row else "",
            "peak bytes": lambda row: f"{row['peak_bytes_ratio']:.2f}" if "peak_bytes_ratio" in row else "",
        },
    )  # fmt: skip


def _plan_table(result: dict[str, Any]) -> Table:
    memory = result["memory"]
    return _table(
        f"{_title(result)}\nweights {format_bytes(memory['weight_bytes'])}, for KV on the device "
        f"{format_bytes(memory['kv_device_budget_bytes'])}, for mirrors {format_bytes(memory['host_budget_bytes'])}",
        memory["rows"],
        {
            "context": lambda row: f"{row['context_tokens']:,}",
            "mode": lambda row: row["mode"],
            "pages": lambda row: f"{row['selected_pages']:,} of {row['pages']:,}",
            "device bytes a session": lambda row: format_bytes(row["device_bytes"]),
            "host": lambda row: format_bytes(row["host_bytes"]),
            "sessions that fit": lambda row: f"{row['sessions_fit']:,}",
        },
    )  # fmt: skip


def _capacity_table(result: dict[str, Any]) -> Table:
    def ratio(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row[name]:.2f}" if name in row else ""

    return _table(
        _title(result), result["rows"],
        {
            "context": lambda row: f"{row['context']:,}",
            "mode": lambda row: row["mode"],
            "fit": lambda row: f"{row['sessions_fit']:,}",
            "opened": lambda row: str(row["batch"]),
            "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}" if "tokens_per_second" in row else "",
            "sessions ratio": ratio("sessions_ratio"),
            "throughput ratio": ratio("throughput_ratio"),
            "": lambda row: row.get("failed", "" if row["all_opened"] else "not all that fit were opened"),
        },
    )  # fmt: skip


__all__ = ["add_command"]
