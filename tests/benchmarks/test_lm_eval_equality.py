"""Items made from lm_eval's samples, and what counts as a difference; the run itself is `slow`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from benchmarks.lm_eval_equality import Asked

from benchmarks import common, lm_eval_equality

PROMPT = "The grass is green.\nWhat is the special magic number for a-b?"
PREFIX = " The special magic number for a-b is"
ASKED = Asked(
    "niah_single_1", 3, PROMPT + PREFIX, ("12",), 128, {"full": " 12", "lsa": " 1"}, {"full": 1.0, "lsa": 0.0}
)


def samples(**changed: Any) -> list[dict[str, Any]]:
    held = {"paper": 10, "full_paper": 40}
    rows = [
        {"id": ASKED.id, "policy": label, "prediction": ASKED.answers[label], "score": score, "bytes": held}
        for label, score in (("full", 1.0), ("lsa", 0.0))
    ]
    return [rows[0], rows[1] | changed]


def test_items_are_lm_evals_prompts_cut_before_the_question() -> None:
    other = replace(ASKED, task="ruler_vt", prompt="VAR A = 12345\nQuestion: Find all?\n\nVAR\nQuestion: Find all that")
    items = lm_eval_equality.items_of([ASKED, other], 4096)
    (document, longer), (item, chains) = items.documents, items.items
    assert (document.content, item.question) == (
        "The grass is green.",
        PROMPT.removeprefix("The grass is green.") + PREFIX,
    )
    assert (longer.content, chains.question) == (other.prompt[: -len(chains.question)], "\nQuestion: Find all that")
    assert (item.task, item.answers, item.scorer, item.max_new_tokens) == ("niah_single_1", ("12",), "all", 128)
    assert chains.task == "vt" and lm_eval_equality.OURS["ruler_qa_hotpot"] == "qa_2"
    assert len(lm_eval_equality.OURS) == 13


def test_a_difference_in_answer_or_score_is_one() -> None:
    scores = {"full": {ASKED.task: 1.0}, "lsa": {ASKED.task: 0.0}}
    same = lm_eval_equality.compare([ASKED], scores, samples())
    assert same["equal"] and [row["kv_paper_ratio"] for row in same["items"]] == [0.25, 0.25]
    for changed in ({"prediction": " 2"}, {"score": 0.5}):
        told = lm_eval_equality.compare([ASKED], scores, samples(**changed))
        assert not told["equal"] and [row["equal"] for row in told["items"]] == [True, False]
    task = lm_eval_equality.compare([ASKED], scores | {"lsa": {ASKED.task: 0.25}}, samples())
    assert not task["equal"] and all(row["equal"] for row in task["items"])


@pytest.mark.slow
def test_one_item_by_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "equality.json"
    words = ["lm_eval_equality.py", "--limit", "1", "--tasks", "ruler_vt", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    assert lm_eval_equality.main() == 0
    told = json.loads(out.read_text())
    assert told["equal"] and len(told["items"]) == 2 and not told["not_built"] and not told["cut_changes_tokens"]
    assert told["items"][1]["kv_paper_ratio"] < 0.2 and str(common.ROOT) not in out.read_text()
