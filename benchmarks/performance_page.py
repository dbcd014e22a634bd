"""Write docs/performance.md from the results of `flashmem bench`: JSON files, whichever are there, the rows of
`flashmem bench kernels` (JSON lines). Before the tables comes what was aimed at (`performance_targets`).

python -m benchmarks.performance_page results benchmarks/results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, log
from benchmarks.performance_targets import TARGETS, Target
from flashmem.bench import profile, report

PAGE = ROOT / "docs" / "performance.md"
Row = Mapping[str, Any]
HEAD = """# Performance

Made by `python -m benchmarks.performance_page` from files that programs wrote; no number here is typed. How to
measure, and what the columns mean: [Measuring](guides/bench.md).
"""
NOTHING = "Not measured yet: there is no result file.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / "results", ROOT / "benchmarks" / "results"])
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    args.out.write_text(page(args.folders), encoding="utf-8")
    log(f"wrote {args.out.name}")


def page(folders: Sequence[Path]) -> str:
    """The whole page; a section for every result file, in the order of names."""
    paths = sorted((path for folder in folders for path in folder.glob("*.json*")), key=lambda path: path.name)
    results = [(path.name, _read(path)) for path in paths]
    sections = [section for name, result in results for section in _section(name, result)]
    return "\n".join([HEAD, *_targets(dict(results)), *(sections or [NOTHING])])


def _read(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    about = {"command": rows[0]["command"], "machine": rows[0]} if rows[0]["bench"] == "machine" else {}
    return {"bench": "gpu_kernels", **about, "rows": rows}


def _targets(found: Mapping[str, Any]) -> Iterator[str]:
    """What was aimed at and what came, and why where it fell short."""
    lines: list[Row] = []
    for target in TARGETS:
        if found.keys() >= set(target.files) and (values := target.values(*(found[name] for name in target.files))):
            reached = sum(map(target.reached, values.values()))
            shown = f"{reached} of {len(values)}" if 0 < reached < len(values) else "yes" if reached else "no"
            lines.append({"target": target, "values": values, "met": shown})
    if not lines:
        return
    yield "## What was aimed at\n"
    yield "Each target with the least and the most that was measured for it, where the section of its file says.\n"
    yield _markdown(
        {
            "what": lambda row: row["target"].what,
            "target": lambda row: row["target"].text,
            "measured": lambda row: _range(row["values"], row["target"].form),
            "met": lambda row: row["met"],
            "file": lambda row: ", ".join(row["target"].files),
        },
        lines,
    )  # fmt: skip
    for line in lines:
        if line["met"] != "yes":
            yield _shortfall(line["target"], line["values"])
    yield ""


def _shortfall(target: Target, values: Mapping[str, float]) -> str:
    short = {at: value for at, value in values.items() if not target.reached(value)}
    listed = ", ".join(f"{at} ({value:{target.form}})" for at, value in short.items())
    return f"- **{target.what}** falls short at {listed}. {target.why}"


def _range(values: Mapping[str, float], form: str) -> str:
    least, most = min(values.values()), max(values.values())
    return format(least, form) if least == most else f"{least:{form}} to {most:{form}}"


def _section(name: str, result: Any) -> Iterator[str]:
    """Nothing for a file of another program."""
    if not isinstance(result, dict) or "command" not in result or "machine" not in result:
        return
    if (tables := TABLES.get(str(result.get("bench")))) is None:
        return
    machine = result["machine"]
    where = ", ".join(machine["gpus"]) if result.get("device", "cuda") != "cpu" and machine["gpus"] else machine["cpu"]
    yield f"## {tables.title} ({name})\n"
    yield f"`{result['command']}` on {where}; torch {machine['torch']}, commit {machine['commit']}.\n"
    yield from tables.text(result)
    if rows := tables.rows(result):
        yield _markdown(tables.columns, rows)


def _markdown(columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


class Tables:
    """How the result of one bench is shown."""

    def __init__(
        self,
        title: str,
        text: Callable[[Row], Iterator[str]],
        columns: Mapping[str, Callable[[Row], str]],
        rows: Callable[[Row], Sequence[Row]] = lambda result: result["rows"],
    ) -> None:
        self.title, self.text, self.columns, self.rows = title, text, columns, rows


def _of_pages(result: Row) -> Iterator[str]:
    yield (
        f"{result['resident_pages']:,} of {result['pages']:,} pages of {result['record_bytes']:,} bytes on the device; "
        f"copies {result['page_copies']}; medians of {result['rounds']} swaps, bytes checked before.\n"
    )


def _of_skeleton(result: Row) -> Iterator[str]:
    model, memory = result["model"], result["memory"]
    yield (
        f"A skeleton: {model['layers']} layers with **{model['experts']} of {model['experts_of_the_real_model']} "
        f"experts**, random weights, synthetic history. {model['kv_format']} records, {model['dtype']} weights of "
        f"{memory['weight_bytes'] / 2**30:.1f} GiB, {memory['kv_device_budget_bytes'] / 2**30:.1f} GiB of the device "
        f"for KV. LSA keeps {model['keep']:.1%} of the pages and replaces {model['churn']:.0%} of these in every "
        f"window of {model['tau']} steps.\n"
    )


def _of_profile(result: Row) -> Iterator[str]:
    yield from _of_skeleton(result)
    how = {(row["kernels"], row["cuda_graphs"]) for row in result["rows"] if "failed" not in row}
    for kernels, graphs in sorted(how):
        yield f"Kernels: {kernels}{', in captured graphs' if graphs else ''}. The parts of a step add up to it. "
        yield "A limit is the time that a part's bytes take at the rate of a copy on the device.\n"


def _of_prefill(result: Row) -> Iterator[str]:
    yield (
        f"{result['dtype']}, pieces of {result['prefill_chunk']:,} tokens; a stock prefill may take "
        f"{result['peak_limit_bytes'] / 2**30:.1f} GiB beside the weights.\n"
    )
    for row in result["ratios"]:
        if "seconds_ratio" in row:
            yield (
                f"{row['path']}, at its longest {row['tokens']:,} tokens, over {row.get('over', 'flashmem')} at the "
                f"same: {row['seconds_ratio']:.2f} of the seconds, {row['peak_bytes_ratio']:.2f} of the peak bytes.\n"
            )


def _profile_rows(result: Row) -> list[Row]:
    return [{**row, **line} for row in result["rows"] for line in profile.parts(row)]


def _of_gpu_kernels(result: Row) -> Iterator[str]:
    """What the device can do, and our own kernels against it; beside that their peers."""
    for row in result["rows"]:
        if row["bench"] == "ceilings":
            rates = ", ".join(f"{name.split('_')[0]} {row[name]:,.0f}" for name in row if name.endswith("_tflop_per_s"))
            yield f"Measured in this run: a copy on the device at {row['copy_gb_per_s']:,.0f} GB/s; TFLOP/s: {rates}. "
            yield "A floor is the longer of a case's bytes at the one and its operations at the other.\n"
        if row["bench"] == "stopped":
            yield f"The run ended within the part {row['part']!r}: {row['reason']}.\n"
    own = [row for row in report.fastest(result["rows"]).values() if "peer" not in row]
    yield _markdown(
        {
            "kernel": lambda row: row["bench"],
            "chunks or pages": lambda row: _known("chunks" if "chunks" in row else "pages", ",")(row),
            "batch": _known("batch", ","),
            "layers": _known("layers", ","),
            "precision": _precision,
            "us": _known("warm_us", ",.1f"),
            "floor, us": _known("floor_us", ",.1f"),
            "GB/s": _known("gb_per_s", ",.0f"),
            "of the copy": _known("share_of_copy_bandwidth", ".1%"),
        },
        own,
    )  # fmt: skip
    yield "Peers beside ours, in the same run; times are of replayed graphs where both have one, else as called.\n"


def _of_shipped(result: Row) -> Iterator[str]:
    agreement = result["agreement"]
    if agreement["rows"]:
        yield (
            f"Answers to {agreement['questions_per_task']} questions a task on documents of {agreement['context']:,} "
            "tokens, fed to each engine: its own best token at every step against that of PyTorch in float32. Beyond "
            f"float32, where all must be equal, {agreement['least_agreement']:.0%} of the tokens and "
            f"{agreement['most_divergence']} nats were asked for beforehand.\n"
        )
        yield _markdown(
            {
                "engine": lambda row: row["variant"],
                "kernels": lambda row: row["kernels"] + (", graphs" if row["cuda_graphs"] else ""),
                "equal tokens": lambda row: f"{row['equal_tokens']:,} of {row['tokens']:,}",
                "agreement": lambda row: f"{row['agreement']:.2%} ({_interval(row['agreement_interval'], '.2%')})",
                "KL, nats": lambda row: f"{row['kl_nats']:.2g} ({_interval(row['kl_interval'], '.2g')})",
                "99th of 100": _known("kl_p99", ".2g"),
                "within bounds": lambda row: "yes" if row["passed"] else "no",
            },
            agreement["rows"],
        )
    if result["lengths"]["rows"]:
        yield f"Lengths: {result['lengths']['dtype']}, random tokens read on the fused kernels, then decoded.\n"


def _interval(values: Sequence[float], form: str) -> str:
    return " to ".join(format(value, form) for value in values)


def _precision(row: Row) -> str:
    planar = {None: "", True: ", planar", False: ", interleaved"}[row.get("planar")]
    ordered = {None: "", True: ", ordered", False: ", any order"}[row.get("ordered")]
    return str(row.get("precision", row.get("kv_format", "-"))) + planar + ordered


def _gpu_kernels_rows(result: Row) -> list[Row]:
    """Peers beside ours, those that are not there too; all rows are in the file."""
    return [row for row in result["rows"] if "peer" in row]


def _peer_us(name: str) -> Callable[[Row], str]:
    """A time from graphs, or as called from Python."""
    return lambda row: next((f"{row[key]:,.1f}" for key in (f"{name}warm_us", f"{name}us") if key in row), "-")


def _known(name: str, form: str) -> Callable[[Row], str]:
    """A number of a row, or a dash where the row has none."""
    return lambda row: format(row[name], form) if row.get(name) is not None else "-"


def _of(name: str, key: str, form: str) -> Callable[[Row], str]:
    return lambda row: format(row[name][key], form) if key in row.get(name, {}) else "-"


TABLES: Mapping[str, Tables] = {
    "swap": Tables(
        "Page swaps", _of_pages,
        {
            "to": lambda row: {"in": "device", "out": "host"}[row["direction"]],
            "churn": _known("churn", ".0%"),
            "pages": _known("pages", ","),
            "swap, GB/s": _of("gb_per_s", "swap", ".1f"),
            "one by one": _of("gb_per_s", "one_by_one", ".1f"),
            "gather and copy": _of("gb_per_s", "gather_and_copy", ".1f"),
            "one pinned copy": _of("gb_per_s", "peak", ".1f"),
            "swap / one copy": _known("peak_ratio", ".1%"),
        },
    ),
    "decode": Tables(
        "Decode steps", _of_skeleton,
        {
            "context": _known("context", ","),
            "mode": lambda row: row["mode"],
            "batch": _known("batch", ","),
            "step inside a window, ms": _of("step_ms", "median", ".2f"),
            "mean over windows, ms": _known("mean_step_ms", ".2f"),
            "tokens/s": _known("tokens_per_second", ".1f"),
            "LSA / full": _known("mean_step_time_ratio", ".2f"),
            "": lambda row: row.get("failed", ""),
        },
    ),
    "capacity": Tables(
        "Capacity", _of_skeleton,
        {
            "context": _known("context", ","),
            "mode": lambda row: row["mode"],
            "sessions that fit": _known("sessions_fit", ","),
            "opened": _known("batch", ","),
            "tokens/s": _known("tokens_per_second", ".1f"),
            "step, ms": _of("step_ms", "median", ".2f"),
            "slowest": _of("step_ms", "max", ".2f"),
            "first of a window": _of("first_step_of_window_ms", "median", ".2f"),
            "sessions, LSA / full": _known("sessions_ratio", ".2f"),
            "throughput, LSA / full": _known("throughput_ratio", ".2f"),
            "": lambda row: row.get("failed", ""),
        },
    ),
    "profile": Tables(
        "Where the time of a decode step goes", _of_profile,
        {
            "part": lambda row: row["part"],
            "context": _known("context", ","),
            "mode": lambda row: row["mode"],
            "batch": _known("batch", ","),
            "ms": _known("ms", ".3f"),
            "of a step": _known("share", ".1%"),
            "limit, ms": _known("limit_ms", ".3f"),
        },
        _profile_rows,
    ),
    "prefill_stock": Tables(
        "Long prefill beside the stock model", _of_prefill,
        {
            "path": lambda row: row["path"],
            "tokens": _known("tokens", ","),
            "seconds": _known("seconds", ".2f"),
            "tokens/s": _known("tokens_per_second", ",.0f"),
            "peak bytes beside the weights": _known("peak_bytes", ","),
            "": lambda row: row.get("failed", ""),
        },
    ),
    "shipped_decode": Tables(
        "The shipped model, end to end", _of_shipped,
        {
            "context": _known("context", ","),
            "mode": lambda row: row["mode"],
            "read, tokens/s": _known("read_tokens_per_second", ",.0f"),
            "step, ms": _of("step_ms", "median", ".3f"),
            "slowest": _of("step_ms", "max", ".1f"),
            "tokens/s": _known("tokens_per_second", ",.1f"),
            "device bytes, all in": _known("device_bytes", ","),
        },
        lambda result: result["lengths"]["rows"],
    ),
    "prefill_kernels": Tables(
        "Kernels of prefill", lambda result: iter(()),
        {
            "what": lambda row: " ".join(filter(None, (row["time"], row.get("kind")))),
            "sizes of": lambda row: row["model"],
            "queries": _known("queries", ","),
            "chunks or entries": lambda row: _known("chunks" if "chunks" in row else "entries", ",")(row),
            "fused, ms": _known("fused_ms", ".3f"),
            "reference, ms": _known("reference_ms", ".2f"),
        },
        lambda result: [row for row in result["rows"] if "reference_ms" in row],
    ),
    "gpu_kernels": Tables(
        "Kernels and their peers", _of_gpu_kernels,
        {
            "what": lambda row: row["bench"],
            "peer": lambda row: row["peer"],
            "chunks": _known("chunks", ","),
            "batch": _known("batch", ","),
            "precision": lambda row: row.get("precision", row.get("kv_format", "-")),
            "peer, us": _peer_us(""),
            "ours, us": _peer_us("ours_"),
            "peer / ours": _known("ratio", ".2f"),
            "": lambda row: row.get("state", row.get("failed", "")),
        },
        _gpu_kernels_rows,
    ),
    "kernels": Tables(
        "Operations without fused kernels", lambda result: iter(()),
        {
            "operation": lambda row: row["operation"],
            "chunks": _known("chunks", ","),
            "ms": _of("milliseconds", "median", ".3f"),
            "GB/s": _known("gb_per_s", ".2f"),
        },
    ),
}  # fmt: skip


if __name__ == "__main__":
    main()
