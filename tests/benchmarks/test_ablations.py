"""Variants of the shipped run, the threshold that is matched to it, and a small run with a variant that fails."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks import ablations, common
from flashmem import LSAConfig
from flashmem.accounting.models import shipped_model
from flashmem.cli.options import EngineOptions
from flashmem.config import ModelDefaults
from flashmem.evaluation import write_items
from flashmem.evaluation.suites.choose import make
from flashmem.policy import ThresholdPolicy, make_policy
from flashmem.types import PageView


def test_every_variant_differs_from_the_shipped_run_in_one_option(tmp_path: Path) -> None:
    config = ModelDefaults.of(shipped_model()).config()
    made = ablations.variants(config, (1, 2), tmp_path)
    assert [variant.name for variant in made] == [
        "tau 16", "tau 32", "tau 128", "sink 0", "sink 4", "recency 1", "recency 4", "recency 32", "layer 1", "layer 2",
        "mean of logits", "observed 1", "observed 16", "half the budget",
    ]  # fmt: skip
    options = {item.name for item in fields(EngineOptions)}
    for variant in made:
        option, _ = variant.options
        assert option.removeprefix("--").replace("-", "_") in options
    assert made[-1].options == ("--keep", "0.06")
    assert [variant.name for variant in made if variant.reads] == ["layer 1", "layer 2", "observed 1", "observed 16"]


def test_the_threshold_selects_what_the_budget_selects_in_the_mean() -> None:
    """Answers of one, two and three windows; each answer counts alike, as in the table."""
    config, draw = LSAConfig(keep=0.2, page_chunks=4, recency_pages=1), torch.Generator().manual_seed(3)
    views = [
        [
            PageView(
                num_pages=40 + window, page_chunks=4, num_chunks=4 * (40 + window), always=(0, 39 + window),
                logits_N=2 * answer + torch.randn(4 * (40 + window), generator=draw),
            )
            for window in range(1 + answer)
        ]
        for answer in range(3)
    ]  # fmt: skip
    answers = []
    for group in views:
        noted = ablations._Noted(make_policy(config))
        assert [len(noted.select(view).pages) for view in group] == [8, 9, 9][: len(group)]
        answers.append(noted.windows)
    rule = ThresholdPolicy(threshold=ablations.matched_threshold(answers, config), floor_pages=config.floor_pages)

    def mean(pages: list[list[int]]) -> float:
        return sum(sum(counts) / len(counts) for counts in pages) / len(pages)

    budget = mean([[window.room for window in windows] for windows in answers])
    chosen = [[len(rule.select(view).pages) - len(view.always) for view in group] for group in views]
    assert budget - 1 < mean(chosen) <= budget
    assert len({counts[0] for counts in chosen}) > 1  # more pages for some, fewer for others


def test_unknown_variants_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--items", "x", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--variants", "tau 7"]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *words])
    with pytest.raises(SystemExit, match="2"):
        ablations.main()
    assert "unknown variants tau 7; known are tau 16," in capsys.readouterr().err


@pytest.mark.slow
def test_a_variant_that_fails_is_named_and_the_others_are_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """'tau 16' finds samples of another run in its place, and is refused."""
    items = make("mini-table1", lengths=[2048], n=2, tasks=["single"])
    write_items(tmp_path / "items", items)
    taken = tmp_path / "runs" / "tau 16" / "run.json"
    taken.parent.mkdir(parents=True)
    taken.write_text("{}")
    words = ["--items", tmp_path / "items", "--runs", tmp_path / "runs", "--out", tmp_path / "out", "--limit", 1]
    words += ["--jobs", 2, "--variants", "tau 16", "half the budget"]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *map(str, words)])
    assert ablations.main() == 1
    text = (tmp_path / "out" / "compare.json").read_text()
    told = json.loads(text)
    assert list(told["failed"]) == ["tau 16"] and "samples of another run" in " ".join(told["failed"]["tau 16"])
    assert [run["name"] for run in told["runs"]] == ["shipped", "lsa+rescue", "lsa-stale", "half the budget"]
    assert told["runs"][0]["items"] == 1 and told["runs"][3]["settings"] == {"keep": 0.06}
    assert str(tmp_path) not in text and str(common.ROOT) not in text
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| half the budget | keep 0.06 |" in table and table.endswith("Failed, and not compared: tau 16.\n")

    taken.unlink()  # what is left is run, what is there is not
    samples = tmp_path / "runs" / "shipped" / "samples.jsonl"
    before = samples.read_text()
    monkeypatch.setattr(sys, "argv", ["ablations.py", *map(str, words[:-1])])
    assert ablations.main() == 0
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert not told["failed"] and [run["name"] for run in told["runs"]][3:] == ["tau 16"]
    assert samples.read_text() == before and before.count("\n") == 4
