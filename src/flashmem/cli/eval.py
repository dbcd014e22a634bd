"""`flashmem eval`: freeze questions, put them under every policy, and report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..accounting.models import DEMO, shipped_model
from .errors import ReportingGroup
from .options import EngineOptions, Json, with_options
from .output import answer, answer_json, log, stderr
from .sizes import parse_tokens

if TYPE_CHECKING:
    from ..evaluation.runner import Progress as Tell

_SUITES = (
    "mini-table1", "multi-turn", "perplexity", "ruler", "ruler-files", "longbench-v2", "longmemeval", "longmemeval-m",
    "mrcr",
)  # fmt: skip
_STANDARD = (
    "full,lsa,lsa+rescue,recency@match,random@match,carry-over@match,native@match,oracle@match,recency-tail,random-10%"
)

app = typer.Typer(cls=ReportingGroup, help="Compare policies on the same questions, at the same bytes.")


def add_command(parent: typer.Typer) -> None:
    app.command("gen")(generate)
    app.command("run")(with_options(run))
    app.command("report")(report)
    app.command("compare")(compare)
    app.command("judge")(judge)
    parent.add_typer(app, name="eval")


def generate(
    suite: Annotated[str, typer.Argument(help=f"One of {', '.join(_SUITES)}.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the items; must be new or empty.")],
    lengths: Annotated[str, typer.Option(help="Tokens of the documents, e.g. 16K,64K.")] = "16K",
    n: Annotated[int, typer.Option(help="Items, conversations or passages per task and length.")] = 100,
    seed: Annotated[int, typer.Option(help="Another seed, other documents and questions.")] = 0,
    tasks: Annotated[str | None, typer.Option(help="Tasks of the suite, with commas.", show_default="all")] = None,
    per_document: Annotated[
        int | None, typer.Option(help="Questions per task and document.", show_default="the suite's")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Folder made by flashmem.training.backbone.corpus.", show_default="text of our own"),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file: RULER's haystack, or what perplexity continues.")
    ] = None,
    model: Annotated[str, typer.Option(help="Whose tokenizer ruler and perplexity --text use.")] = DEMO,
    data: Annotated[Path | None, typer.Option(help="Folder of a published benchmark's files.")] = None,
    json: Json = False,
) -> None:
    """Freeze documents and questions with their checksums.

    mini-table1, multi-turn and perplexity are for the model that flashmem ships; ruler (and perplexity with --text)
    for any tokenizer; the others are read from the published files, which --data names the folder of.

    Example: `flashmem eval gen mini-table1 -o items --lengths 16K,64K --n 100`
    """
    from ..evaluation import write_items
    from ..evaluation.suites.choose import make

    items = make(
        suite, lengths=[parse_tokens(length) for length in lengths.split(",")], n=n, seed=seed,
        tasks=None if tasks is None else tasks.split(","), per_document=per_document, corpus=corpus, text=text,
        model=str(shipped_model()) if model == DEMO else model, data=data,
    )  # fmt: skip
    written = write_items(output, items)
    values = {"documents": len(written.documents), "items": len(written.items), "sha256": written.sha256}
    if json:
        answer_json(values)
    else:
        answer(f"{output}: {values['items']} items about {values['documents']} documents, sha256 {written.sha256[:16]}")


def run(
    items: Annotated[Path, typer.Argument(help="Directory made by `flashmem eval gen`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of the results; goes on with what is there.")
    ],
    engine: EngineOptions,
    policies: Annotated[str, typer.Option(help="Policies to compare, with commas.")] = _STANDARD,
    seeds: Annotated[int, typer.Option(help="Seeds of random policies.")] = 3,
    batch: Annotated[int, typer.Option(help="Questions of one document that are decoded together.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Items per task and length.", show_default="all")] = None,
    memories: Annotated[
        Path | None, typer.Option(help="Keep documents that were read here.", show_default="not kept")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template (text suites).")] = False,
    shard: Annotated[
        str, typer.Option(help="i/n: every n-th document from the i-th on; auto asks accelerate.")
    ] = "0/1",
    json: Json = False,
) -> None:
    """Answer every question under every policy. An interrupted run goes on where it was.

    Example: `flashmem eval run items -o results --keep 0.1 --page-chunks 16 --dtype float32`
    """
    from ..evaluation import RunConfig, parse_policies, read_items, run_items

    config = RunConfig(
        batch=batch, limit=limit, memories=None if memories is None else str(memories), shard=parse_shard(shard),
        chat=chat,
    )  # fmt: skip
    if shard == "auto" and engine.device is None and engine.device_map is None:
        engine = replace(engine, device=process_device())
    contenders = parse_policies(policies.split(","), seeds=seeds)
    asked = read_items(items)
    loaded = engine.engine()
    with _progress() as tell:
        path = run_items(loaded, asked, contenders, output, config, progress=tell)
    if json:
        answer_json({"samples": str(path)})
    else:
        log(f"samples in {path}")


def report(
    results: Annotated[Path, typer.Argument(help="Directory of `flashmem eval run`.")],
    margin: Annotated[
        float, typer.Option(help="Points of accuracy that non-inferior may lie below, as a share.")
    ] = 0.02,
    floor: Annotated[
        float | None,
        typer.Option(help="Full attention below this fails; such rows are greyed.", show_default="the suite's"),
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Draw pictures; needs matplotlib.")] = True,
    json: Json = False,
) -> None:
    """Write metrics.json, table.md, report.html, pictures and kvpress directories beside the samples.

    Example: `flashmem eval report results`
    """
    from ..evaluation.report import write_report
    from ..evaluation.table import tables

    metrics = write_report(results, margin=margin, floor=floor, pictures=pictures)
    if json:
        answer_json(metrics)
    else:
        answer("\n\n".join(table.markdown() for table in tables(metrics)[:1]))
        log(f"written: metrics.json, table.md, report.html and kvpress/ in {results}")


def compare(
    results: Annotated[list[Path], typer.Argument(help="Directories of runs on the same items, the reference first.")],
    policy: Annotated[str, typer.Option(help="Whose answers are compared.")] = "lsa",
    also: Annotated[
        str | None, typer.Option(help="Other policies of the first run, compared too.", show_default="none")
    ] = None,
    margin: Annotated[float, typer.Option(help="Points that non-inferior may lie below, as a share.")] = 0.02,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the table there, as Markdown.")] = None,
    json: Json = False,
) -> None:
    """Compare runs that differ in settings, answer by answer: the table of an ablation.

    Example: `flashmem eval compare results/tau64 results/tau16 results/tau128`
    """
    from ..evaluation.compare import compare as compare_runs
    from ..evaluation.compare import plain, table_of

    compared = compare_runs(results, policy=policy, also=also.split(",") if also else (), margin=margin)
    table = table_of(compared).markdown()
    if output is not None:
        output.write_text(table + "\n", encoding="utf-8")
    if json:
        answer_json(plain(compared))
    else:
        answer(table)


def judge(
    results: Annotated[Path, typer.Argument(help="Directory of a LongMemEval run.")],
    base_url: Annotated[str, typer.Option(help="Where chat completions are, e.g. http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="The judge's name there.")],
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key.", show_default="no key")] = None,
    json: Json = False,
) -> None:
    """Let a model judge the answers; `flashmem eval report` then uses its verdicts instead of the scores.

    Example: `flashmem eval judge results --base-url http://localhost:8000/v1 --model my-judge`
    """
    from ..evaluation.judge import chat_endpoint, judge_run

    key = None if api_key_file is None else api_key_file.read_text(encoding="utf-8").strip()
    with _progress() as tell:
        told = judge_run(
            results, chat_endpoint(base_url, model, key), judge=model,
            progress=lambda done, total: tell("items", done, total),
        )  # fmt: skip
    if json:
        answer_json(told)
    else:
        answer(f"{told['right']} of {told['asked']} answers held right")


def parse_shard(text: str) -> tuple[int, int]:
    """'1/4' is (1, 4); 'auto' is this process among those that accelerate started."""
    if text == "auto":
        from accelerate import PartialState  # initialises distributed state: only when asked for

        state = PartialState()
        return state.process_index, state.num_processes
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ValueError(f"shard {text!r} is neither i/n nor auto")
    return int(index), int(count)


def process_device() -> str:
    """The device that accelerate gives this process."""
    from accelerate import PartialState

    return str(PartialState().device)


@contextmanager
def _progress() -> Iterator[Tell]:
    """Two bars on stderr: questions answered, and tokens of the document that is being read."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr) as bars:
        tasks: dict[str, TaskID] = {"items": bars.add_task("questions", total=None)}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task("reading tokens", total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield tell


__all__ = ["add_command", "parse_shard"]
