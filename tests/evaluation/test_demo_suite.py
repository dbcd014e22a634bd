"""The shipped model through a small suite, against numbers that do not depend on which indexer it comes with.

LSA's rule is a fixed budget here and its scorer the native one, so that all budgets, and with them every number, are
those of the model alone. `PYTHONPATH=src python tests/evaluation/test_demo_suite.py` writes the golden file anew.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmem import Engine, LSAConfig, MemoryIndexer
from flashmem.accounting.models import shipped_model
from flashmem.backbone import load_model
from flashmem.evaluation import RunConfig, parse_policies, run_items, write_items
from flashmem.evaluation.report import write_report
from flashmem.evaluation.suites import mini
from flashmem.training.backbone.tasks import Lexicon

TASKS = ("single", "multivalue", "vt", "talk", "hop")
POLICIES = ("full", "lsa", "recency@match", "random@match", "oracle@match")
GOLDEN = Path(__file__).parent / "golden_demo_suite.json"


def make_engine() -> Engine:
    model, tokenizer = load_model(shipped_model(), device="cpu", dtype=torch.float32, device_map=None)
    config = LSAConfig(keep=0.2, page_chunks=8)
    return Engine(model, tokenizer, indexer=MemoryIndexer.native(model, layers=(1, 2)), config=config)


def make_results(engine: Engine, directory: Path) -> Path:
    """Items frozen, run and reported."""
    lexicon = Lexicon.load(shipped_model())
    text, _ = mini.filler(None, lexicon, prose_tokens=20_000)
    items = write_items(
        directory / "items", mini.generate(lexicon, text, [2048], n=2, per_document=2, names=TASKS)
    )  # fmt: skip
    run_items(engine, items, parse_policies(POLICIES, seeds=1), directory / "out", RunConfig())
    write_report(directory / "out")
    return directory / "out"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = make_engine()
    yield made
    made.close()


@pytest.fixture(scope="module")
def out(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_results(engine, tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def metrics(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "metrics.json").read_text()))


def summary(metrics: dict[str, Any]) -> dict[str, Any]:
    """What must stay: scores, right answers, bytes and recall of every cell, and the items' checksum."""
    names = ("score", "right", "evidence_recall", "mass_recall")
    cells = {
        f"{cell['policy']} {cell['task']}": {name: cell[name] for name in names} | {"paper": cell["bytes"]["paper"]}
        for cell in metrics["cells"]
    }
    return {"items_sha256": metrics["run"]["items_sha256"], "model": metrics["run"]["model"], "cells": cells}


@pytest.mark.slow
def test_golden_numbers(metrics: dict[str, Any]) -> None:
    expected, found = json.loads(GOLDEN.read_text()), summary(metrics)
    assert (found["items_sha256"], found["model"]) == (expected["items_sha256"], expected["model"])
    assert found["cells"].keys() == expected["cells"].keys()
    for name, cell in expected["cells"].items():
        assert found["cells"][name] == pytest.approx(cell, rel=1e-3), name


@pytest.mark.slow
def test_full_attention_knows_the_answers(metrics: dict[str, Any]) -> None:
    assert metrics["complete"]
    scores = {cell["task"]: cell["score"] for cell in metrics["cells"] if cell["policy"] == "full"}
    assert scores.pop("vt") >= 0.5 and set(scores.values()) == {1.0}
    averages = {average["policy"]: average for average in metrics["averages"] if average["length"] is None}
    assert averages["oracle@match"]["score"] > averages["recency@match"]["score"]
    assert 0.2 < averages["lsa"]["paper_ratio_of_means"] < 0.25


@pytest.mark.slow
def test_the_report_loads_nothing(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 3 and "<table" in page
    for loads in ("<script", "<link", "<img", "@import", "src=", "http:", "https:"):
        assert loads not in page.replace('xmlns="http://www.w3.org/2000/svg"', "").replace(
            'xmlns:xlink="http://www.w3.org/1999/xlink"', ""
        ), loads
    assert len(list((out / "kvpress").glob("mini-table1__2048__flashmem--demo__*/metrics.json"))) == len(POLICIES)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        numbers = json.loads((make_results(make_engine(), Path(folder)) / "metrics.json").read_text())
    GOLDEN.write_text(json.dumps(summary(numbers), indent=1) + "\n")
