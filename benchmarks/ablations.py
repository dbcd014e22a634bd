"""What each setting of the shipped model is worth: a run per variant on the same items, all compared with the shipped.

python -m benchmarks.ablations --items items --runs runs --out results/ablation --device cuda --jobs 12

`--items` is a directory of `flashmem eval gen`. Every variant is one `flashmem eval run`, in a process of its own with
one CPU thread, and its results stay under `--runs`: started again, the program goes on where it was. A variant that
fails is named in the result with the end of its log, and the exit status is 1; the others are compared all the same.
docs/guides/ablations.md says what each variant asks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import common
from flashmem import Engine, LSAConfig, MemoryIndexer
from flashmem.accounting.models import DEMO, shipped_model
from flashmem.config import ModelDefaults
from flashmem.evaluation import read_items
from flashmem.evaluation.asking import question_ids, read_document
from flashmem.evaluation.compare import compare, plain, table_of
from flashmem.evaluation.decoding import decode
from flashmem.evaluation.runner import limited
from flashmem.policy import make_policy, page_maxima
from flashmem.types import PageView, Policy, Scorer, Selection

SHIPPED, THRESHOLD = "shipped", "threshold"
ALSO = ("lsa+rescue", "lsa-stale")
"""Policies of the shipped run that are variants: they need no run of their own."""
TAUS, SINKS, RECENCIES, OBSERVED = (16, 32, 64, 128), (0, 1, 4), (1, 4, 16, 32), (1, 16)
"""No fewer recency pages than 1: the page being filled cannot leave the device."""
TAIL_LINES = 12


@dataclass(frozen=True)
class Variant:
    """A run that differs from the shipped one."""

    name: str
    options: tuple[str, ...]
    """Of `flashmem eval run`."""
    reads: bool = False
    """Its memories are its own: documents must be read again."""


@dataclass(frozen=True)
class Outcome:
    """How a variant's process ended."""

    name: str
    status: int
    seconds: float
    tail: tuple[str, ...]


def variants(config: LSAConfig, layers: Sequence[int], indexers: Path) -> list[Variant]:
    """All variants with a run of their own, but for the threshold, which must be found first."""
    assert config.keep is not None
    made = [Variant(f"tau {tau}", ("--tau", str(tau))) for tau in TAUS if tau != config.tau]
    made += [Variant(f"sink {n}", ("--sink-pages", str(n))) for n in SINKS if n != config.sink_pages]
    made += [Variant(f"recency {n}", ("--recency-pages", str(n))) for n in RECENCIES if n != config.recency_pages]
    made += [Variant(f"layer {csa}", ("--indexer", str(indexers / f"layer-{csa}")), reads=True) for csa in layers]
    made += [Variant("mean of logits", ("--ensemble", "mean"))]
    made += [Variant(f"observed {n}", ("--observation-window", str(n)), reads=True) for n in OBSERVED]
    return [*made, Variant("half the budget", ("--keep", repr(config.keep / 2)))]


class Ablation:
    """All runs on one set of items."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.directory = shipped_model() if args.model == DEMO else Path(args.model)
        self.config = ModelDefaults.of(self.directory).config()
        if self.config.keep is None:
            raise ValueError(f"{self.directory.name} names no budget in its flashmem.json: nothing to ablate from")
        self.indexer = MemoryIndexer.from_pretrained(self.directory / "indexer")
        self.runs: Path = args.runs
        layers = self.indexer.target_layers
        known = variants(self.config, layers if len(layers) > 1 else (), self.runs / "indexers")
        names = [variant.name for variant in known] + [THRESHOLD]
        if unknown := sorted(set(args.variants or ()) - set(names)):
            raise ValueError(f"unknown variants {', '.join(unknown)}; known are {', '.join(names)}")
        self.chosen = [variant for variant in known if args.variants is None or variant.name in args.variants]
        self.threshold = args.variants is None or THRESHOLD in args.variants

    def run(self) -> tuple[dict[str, Any], str]:
        """Run what is missing and compare; returns the result and its table, empty where nothing can be compared."""
        self._write_indexers()
        shipped, *outcomes = self._run_all()
        whole = [SHIPPED, *(outcome.name for outcome in outcomes if not outcome.status)]
        told: dict[str, Any] = {
            "failed": {o.name: list(o.tail) for o in (shipped, *outcomes) if o.status},
            "seconds_of_this_call": {o.name: round(o.seconds, 1) for o in (shipped, *outcomes)},
            "limit": self.args.limit,
            "batch": self.args.batch,
            "jobs": self.args.jobs,
            "device": self.args.device,
        }
        if shipped.status:
            return told, ""
        try:
            compared = compare([self.runs / name for name in whole], also=ALSO)
        except ValueError as error:  # as where full attention fails in every row
            told["failed"]["comparison"] = [common.without_paths(str(error))]
            return told, ""
        run = json.loads((self.runs / SHIPPED / "run.json").read_text())
        told |= {name: run[name] for name in ("items_sha256", "suite", "made", "model", "indexer", "lsa")}
        return told | plain(compared), table_of(compared).markdown()

    def _run_all(self) -> list[Outcome]:
        """The shipped run first: it reads the documents that most others open."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            started: list[Future[Outcome]] = [
                pool.submit(self._run, Variant(SHIPPED, ()), ("full", "lsa", *ALSO)),
                *(pool.submit(self._run, variant) for variant in self.chosen if variant.reads),
            ]
            if not started[0].result().status:
                others = [variant for variant in self.chosen if not variant.reads]
                if self.threshold:
                    others.insert(0, Variant(THRESHOLD, ("--threshold", f"{self._matched_threshold():.6g}")))
                started += [pool.submit(self._run, variant) for variant in others]
            outcomes = {outcome.name: outcome for outcome in (future.result() for future in started)}
        order = [SHIPPED, THRESHOLD, *(variant.name for variant in self.chosen)]
        return [outcomes[name] for name in order if name in outcomes]

    def _run(self, variant: Variant, policies: Sequence[str] = ("lsa",)) -> Outcome:
        common.log(f"{variant.name} ...")
        started, log = time.perf_counter(), self.runs / f"{variant.name}.log"
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                self._command(variant, policies), stdout=file, stderr=subprocess.STDOUT, check=False,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        seconds = time.perf_counter() - started
        common.log(f"{variant.name}: {'done' if not done.returncode else 'FAILED'} after {seconds:.0f} s")
        tail = [common.without_paths(line) for line in log.read_text(encoding="utf-8").splitlines()[-TAIL_LINES:]]
        return Outcome(variant.name, done.returncode, seconds, tuple(tail))

    def _command(self, variant: Variant, policies: Sequence[str]) -> list[str]:
        args = self.args
        limit = [] if args.limit is None else ["--limit", str(args.limit)]
        return [
            sys.executable, "-m", "flashmem", "eval", "run", str(args.items), "--output", str(self.runs / variant.name),
            "--model", args.model, "--device", args.device, "--memories", str(self.runs / "memories"),
            "--batch", str(args.batch), "--policies", ",".join(policies), *limit, *variant.options,
        ]  # fmt: skip

    def _write_indexers(self) -> None:
        """The shipped indexer with one of its layers; nothing is trained anew."""
        self.runs.mkdir(parents=True, exist_ok=True)
        for variant in self.chosen:
            if "--indexer" in variant.options:
                path = Path(variant.options[-1])
                self.indexer.derive(layers=(int(path.name.removeprefix("layer-")),)).save_pretrained(path)

    def _matched_threshold(self) -> float:
        """The threshold of `matched_threshold` for these items; kept beside the runs."""
        path = self.runs / "threshold.json"
        if not path.is_file():
            common.log("looking for the threshold ...")
            answers = self._answers()
            path.write_text(json.dumps({"threshold": matched_threshold(answers, self.config), "answers": len(answers)}))
        return float(json.loads(path.read_text())["threshold"])

    def _answers(self) -> list[list[Window]]:
        """What level 1 sees while the fixed budget answers every question, apart from each other."""
        engine, made = Engine.from_pretrained(self.directory, device=self.args.device), []
        policy = make_policy(self.config)
        for document, asked in limited(read_items(self.args.items), self.args.limit):
            with read_document(
                engine, document, self.runs / "memories", keep=True, chat=False, tell=lambda *_: None
            ) as reading:  # fmt: skip
                for at in range(0, len(asked), self.args.batch):
                    items = asked[at : at + self.args.batch]
                    noted = [_Noted(policy) for _ in items]
                    with ExitStack() as stack:
                        sessions = [stack.enter_context(engine.resume(reading.snapshot, policy=p)) for p in noted]
                        for session, item in zip(sessions, items, strict=True):
                            session.append(question_ids(engine, reading, item))
                        decode(engine, sessions, [item.max_new_tokens for item in items])
                    made += [listener.windows[1:] for listener in noted]  # the first is the document's
        engine.close()
        return made


@dataclass(frozen=True)
class Window:
    """What a threshold has to decide at one boundary."""

    maxima: torch.Tensor
    """Best logit of every eligible page, float64."""
    room: int
    """Eligible pages that the fixed budget selects."""


class _Noted:
    """A fixed budget, and what it saw."""

    name = "noted"
    scorer: Scorer = "memory"

    def __init__(self, budget: Policy) -> None:
        self.budget = budget
        self.windows: list[Window] = []

    def select(self, view: PageView) -> Selection:
        assert view.logits_N is not None
        maxima, always = page_maxima(view.logits_N, view.page_chunks, view.num_pages).double(), set(view.always)
        eligible = maxima[[page for page in range(view.num_pages) if page not in always]]
        selection = self.budget.select(view)
        self.windows.append(Window(eligible, len(selection.pages) - len(view.always)))
        return selection


def matched_threshold(answers: Sequence[Sequence[Window]], config: LSAConfig) -> float:
    """The threshold whose rule selects as many pages as the fixed budget, in the mean over windows and then answers."""

    def mean(pages: Callable[[Window], int]) -> float:
        return fmean(fmean(map(pages, windows)) for windows in answers)

    def selected(cut: float) -> Callable[[Window], int]:
        floor = config.floor_pages
        return lambda w: max(min(floor, len(w.maxima)), int((w.maxima > cut).sum()))

    wanted = mean(lambda window: window.room)
    cuts = torch.cat([window.maxima for windows in answers for window in windows]).unique()  # ascending
    low, high = 0, len(cuts) - 1
    while low < high:  # the lowest cut that selects no more
        middle = (low + high) // 2
        low, high = (middle + 1, high) if mean(selected(float(cuts[middle]))) > wanted else (low, middle)
    cut = float(cuts[low : low + 2].mean())  # between two pages: no rounding may decide
    return 1 / (1 + math.exp(-cut))


def write(out: Path, told: Mapping[str, Any], table: str, started: Mapping[str, Any]) -> None:
    """compare.json and table.md."""
    out.mkdir(parents=True, exist_ok=True)
    common.write_result(out / "compare.json", "ablations", told, started)
    failed = f"\n\nFailed, and not compared: {', '.join(told['failed'])}." if told["failed"] else ""
    (out / "table.md").write_text(table + failed + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path, required=True, metavar="DIR", help="made by `flashmem eval gen`")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="where runs and memories stay")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for compare.json and table.md")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="variants that run at a time")
    parser.add_argument("--limit", type=int, help="items per task and length")
    parser.add_argument("--batch", type=int, default=16, help="questions of one document that are decoded together")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these beside the shipped run")
    parser.add_argument("--model", default=DEMO, help="a model directory with an indexer and a budget of its own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = common.machine()
    try:
        ablation = Ablation(args)
    except ValueError as error:
        parser.error(str(error))
    told, table = ablation.run()
    write(args.out, told, table, started)
    return 1 if told["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
