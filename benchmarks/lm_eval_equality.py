"""RULER by lm_eval and by our own runner: the same items must get the same answers and the same scores.

HF_HUB_OFFLINE=1 python -m benchmarks.lm_eval_equality --limit 2 --out results/lm_eval/equality.json

lm_eval builds its tasks, asks the registered model `flashmem` and scores. Then the prompts and targets of its samples
log are frozen as items of our own, and the runner of `flashmem eval run` reads, asks and scores them: document and
question apart, every policy from one snapshot. Policies: full (every page) and lsa (the model's own settings). Exit
status 1 where an answer or a score differs.

Tasks whose text lm_eval fetches from elsewhere cannot be built without a network; the result says what was not reached.
"""

from __future__ import annotations

import hashlib
import random
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy
import torch
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from benchmarks import common
from flashmem import Engine
from flashmem.accounting.models import shipped_model
from flashmem.evaluation import Document, Item, ItemSet, parse_policies, read_samples, run_items, write_items
from flashmem.evaluation.lm_eval import FlashmemLM
from flashmem.evaluation.suites.ruler import TASKS

OURS = {name if name.startswith("niah") else f"ruler_{name}": name for name in TASKS if not name.startswith("qa")}
OURS |= {"ruler_qa_squad": "qa_1", "ruler_qa_hotpot": "qa_2"}
"""Tasks of lm_eval's group `ruler`, and what our suite calls them."""
SEED = 0
POLICIES = {"full": "all", "lsa": "lsa"}
"""Our label of a policy, and its name as a model argument."""


@dataclass(frozen=True)
class Asked:
    """What lm_eval asked once, and what came back under each policy."""

    task: str
    doc_id: int
    prompt: str
    references: tuple[str, ...]
    max_new_tokens: int
    answers: Mapping[str, str]
    scores: Mapping[str, float]

    @property
    def id(self) -> str:
        return f"{self.task}-{self.doc_id}"


def build(names: Iterable[str], length: int) -> tuple[dict[str, Any], dict[str, str]]:
    """lm_eval's tasks, and why others could not be built: what they fetch was not reached."""
    arguments = {"max_seq_lengths": [length], "tokenizer": str(shipped_model())}
    random.seed(SEED)  # lm_eval's generators draw from the global ones
    numpy.random.seed(SEED)
    manager, made, failed = TaskManager(metadata=arguments), dict[str, Any](), dict[str, str]()
    for name in names:
        common.log(f"building {name} ...")
        try:
            with redirect_stdout(sys.stderr):  # the generators print their search
                made |= manager.load(name)["tasks"]
        except OSError as error:
            failed[name] = f"{type(error).__name__}: {common.without_paths(str(error))}"
    return made, failed


def ask_lm_eval(tasks: Mapping[str, Any], limit: int, length: int) -> tuple[list[Asked], dict[str, Any], Engine]:
    """All tasks under both policies; also lm_eval's own scores of tasks, and the engine of the last policy, open."""
    logs: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    for label, name in POLICIES.items():
        common.log(f"lm_eval, {label} ...")
        lm = FlashmemLM(device="cpu", policy=name)
        told = evaluate(lm, {"tasks": dict(tasks), "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=0)
        logs[label] = {(task, row["doc_id"]): row for task in tasks for row in told["samples"][task]}
        scores[label] = {task: told["results"][task][f"{length},none"] for task in tasks}
        if label != list(POLICIES)[-1]:
            lm.engine.close()
    asked = []
    for (task, doc_id), row in next(iter(logs.values())).items():
        prompt, arguments = _request(row)
        of = {label: rows[task, doc_id] for label, rows in logs.items()}
        assert all(_request(other) == (prompt, arguments) for other in of.values())
        asked.append(
            Asked(
                task, doc_id, prompt, tuple(map(str, row["doc"]["outputs"])), int(arguments["max_gen_toks"]),
                {label: other["resps"][0][0] for label, other in of.items()},
                {label: float(other[str(length)]) for label, other in of.items()},
            )
        )  # fmt: skip
    return asked, scores, lm.engine


def _request(row: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Prompt and generation arguments of a logged sample."""
    ((prompt, arguments),) = row["arguments"]
    return prompt, arguments


def items_of(asked: Sequence[Asked], length: int) -> ItemSet:
    """The same prompts as documents with a question at the end, as our suite cuts them, and the same targets."""
    documents, items = [], []
    for one in asked:
        task = TASKS[OURS[one.task]]
        at = one.prompt.rindex(task.question)
        documents.append(Document(id=one.id, content=one.prompt[:at]))
        items.append(
            Item(
                id=one.id, task=OURS[one.task], length=length, document=one.id, question=one.prompt[at:],
                answers=one.references, scorer=task.scorer, max_new_tokens=one.max_new_tokens,
            )
        )  # fmt: skip
    return ItemSet(suite="ruler", documents=tuple(documents), items=tuple(items), made={"by": "lm_eval"})


def compare(
    asked: Sequence[Asked], scores: Mapping[str, Mapping[str, float]], samples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Item by item, and task by task; `equal` where nothing differs."""
    ours = {(row["id"], row["policy"]): row for row in samples}
    items, tasks = [], []
    for one in asked:
        for label in POLICIES:
            row = ours[one.id, label]
            items.append(
                {
                    "task": one.task,
                    "doc_id": one.doc_id,
                    "policy": label,
                    "prompt_sha256": hashlib.sha256(one.prompt.encode()).hexdigest()[:16],
                    "references": list(one.references),
                    "lm_eval": {"answer": one.answers[label], "score": one.scores[label]},
                    "flashmem": {"answer": row["prediction"], "score": row["score"]},
                    "kv_paper_ratio": round(row["bytes"]["paper"] / row["bytes"]["full_paper"], 4),
                    "equal": (one.answers[label], one.scores[label]) == (row["prediction"], row["score"]),
                }
            )
    for task in dict.fromkeys(one.task for one in asked):
        for label in POLICIES:
            mine = [row for row in items if (row["task"], row["policy"]) == (task, label)]
            score = sum(row["flashmem"]["score"] for row in mine) / len(mine)
            tasks.append(
                {
                    "task": task, "policy": label, "items": len(mine), "lm_eval": scores[label][task],
                    "flashmem": score, "equal": abs(scores[label][task] - score) < 1e-12,
                }
            )  # fmt: skip
    return {"equal": all(row["equal"] for row in [*items, *tasks]), "tasks": tasks, "items": items}


def run(names: Sequence[str], length: int, limit: int) -> dict[str, Any]:
    tasks, failed = build(names, length)
    if not tasks:
        raise ValueError(f"no task can be built: {failed}")
    asked, scores, engine = ask_lm_eval(tasks, limit, length)
    apart = [one.id for one in asked if not _same_tokens(engine.tokenizer, one)]
    with tempfile.TemporaryDirectory() as directory:
        items = write_items(Path(directory) / "items", items_of(asked, length))
        common.log("our runner ...")
        samples = read_samples(run_items(engine, items, parse_policies(list(POLICIES)), Path(directory) / "out"))
    result = {
        "lm_eval": lm_eval.__version__,
        "model": engine.fingerprint(),
        "indexer": engine.indexer.fingerprint(),
        "length": length,
        "limit": limit,
        "items_sha256": items.sha256,
        "not_built": failed,
        "cut_changes_tokens": apart,
        **compare(asked, scores, samples),
    }
    engine.close()
    return result


def _same_tokens(tokenizer: Any, one: Asked) -> bool:
    """Whether document and question, tokenised apart, are the prompt's tokens."""
    at = one.prompt.rindex(TASKS[OURS[one.task]].question)
    parts = tokenizer(one.prompt[:at])["input_ids"] + tokenizer(one.prompt[at:], add_special_tokens=False)["input_ids"]
    return bool(parts == tokenizer(one.prompt)["input_ids"])


def main() -> int:
    parser = common.parser(__doc__, threads=1)
    parser.add_argument("--tasks", nargs="+", choices=sorted(OURS), default=list(OURS), metavar="TASK")
    parser.add_argument("--length", type=int, default=4096, choices=(4096, 8192, 16384, 32768, 65536, 131072))
    parser.add_argument("--limit", type=int, default=2, help="items per task")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = common.machine()
    result = run(args.tasks, args.length, args.limit)
    common.write_result(args.out, "lm_eval_equality", result, started)
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
