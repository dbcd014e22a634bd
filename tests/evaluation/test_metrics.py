"""From samples to numbers: cells, greyed rows, averages, comparisons, ablations; without any model."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from flashmem.evaluation import compare, metrics, stats
from flashmem.evaluation.compare import plain
from flashmem.evaluation.report import write_report
from flashmem.evaluation.table import markdown

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
POLICIES = [("full", 0), ("lsa", 0), ("random@match", 0), ("random@match", 1)]
HELD = {"full": 1000, "lsa": 100, "random@match": 100}


def sample(policy: str, seed: int, task: str, length: int, index: int, score: float, **more: Any) -> dict[str, Any]:
    held = HELD[policy] * length // 1024
    return {
        "id": f"{length}/{task}-{index}", "task": task, "length": length, "document": f"{length}-{index % 4}",
        "conversation": None, "policy": policy, "seed": seed, "prediction": "x", "answers": ["y"], "score": score,
        "correct": score == 1, "new_tokens": 3, "context_tokens": length, "extra": {},
        "cycles": [{"step": 0, "selected": 3, "pages": 3, "paper": held, "full_paper": 1000 * length // 1024}] * 2,
        "bytes": {"paper": held, "full_paper": 1000 * length // 1024, "all_in": 2 * held, "full_all_in": 2000},
        "evidence_recall": 0.5, "mass_recall": None, "moved_bytes": 7, "widened": 0, "early": 1, "depth": index / 20,
        "seconds": 0.1, **more,
    }  # fmt: skip


def scores(policy: str, seed: int, task: str, length: int, index: int) -> float:
    if policy == "full":
        return float(task == "easy" or length == 1024 or index < 4)  # hard fails at 2048
    if policy == "lsa":
        return float(index != 0)
    return float(index % (3 + seed) == 0)


def write_run(out: Path, rows: list[dict[str, Any]], **lsa: Any) -> Path:
    out.mkdir(parents=True)
    settings = {
        "keep": 0.1, "threshold": 0.5, "page_chunks": 8, "tau": 64, "sink_pages": 1, "recency_pages": 2, "seed": 0,
    }  # fmt: skip
    labels = [{"label": label, "seed": seed} for label, seed in POLICIES]
    run = {
        "suite": "test", "made": {"filler": "prose"}, "items_sha256": "ab" * 32, "model_name": "demo", "model": "m1",
        "indexer": "i1", "dtype": "float32", "lsa": settings | lsa, "policies": labels, "samples": len(rows),
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(run))
    (out / "environments.json").write_text(json.dumps([{"cpu": "a CPU", "gpus": []}]))
    half = len(rows) // 2
    for name, part in (("samples-0-of-2.jsonl", rows[: half + 3]), ("samples-1-of-2.jsonl", rows[half:])):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in part))  # three rows stand in both
    return out


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        sample(policy, seed, task, length, index, scores(policy, seed, task, length, index))
        for policy, seed in POLICIES
        for task in ("easy", "hard")
        for length in (1024, 2048)
        for index in range(12)
    ]


@pytest.fixture
def out(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", rows)


def cell(made: dict[str, Any], policy: str, task: str, length: int) -> dict[str, Any]:
    (found,) = (c for c in made["cells"] if (c["policy"], c["task"], c["length"]) == (policy, task, length))
    return dict(found)


def test_cells(out: Path, rows: list[dict[str, Any]]) -> None:
    made = metrics.compute(out)
    assert made["samples"] == len(rows) and made["complete"]
    lsa = cell(made, "lsa", "easy", 1024)
    assert (lsa["n"], lsa["seeds"], lsa["documents"], lsa["right"]) == (12, 1, 4, 11)
    assert lsa["score"] == pytest.approx(11 / 12)
    assert lsa["interval"] == stats.wilson(11, 12) and lsa["interval_kind"] == "Wilson"
    assert [lsa["paper_ratio_of_means"], lsa["paper_mean_of_ratios"]] == pytest.approx([0.1, 0.1])
    drawn = cell(made, "random@match", "easy", 1024)
    assert (drawn["n"], drawn["seeds"], drawn["right"]) == (12, 2, 4 + 3)
    assert drawn["interval_kind"] == "bootstrap over documents"
    assert (lsa["evidence_recall"], lsa["mass_recall"], lsa["early"]) == (0.5, None, 12)


def test_rows_in_which_full_attention_fails_are_greyed_and_not_averaged(out: Path) -> None:
    made = metrics.compute(out)
    assert [(row["task"], row["length"]) for row in made["rows"] if row["greyed"]] == [("hard", 2048)]
    averages = {(a["policy"], a["length"]): a for a in made["averages"]}
    assert averages["full", None]["rows"] == 3 and averages["full", None]["score"] == 1
    assert averages["lsa", 2048]["rows"] == 1
    assert not [c for c in made["comparisons"] if (c["task"], c["length"]) == ("hard", 2048)]
    assert "*hard 2K* †" in markdown(made)
    lenient = metrics.compute(out, floor=0.0)
    assert [row["greyed"] for row in lenient["rows"]].count(True) == 1  # far below its own score at 1K all the same


def test_both_averages_of_ratios_are_named(out: Path) -> None:
    """Rows of 1K hold 100 of 1,000 bytes, rows of 2K 200 of 2,000; all-in 200 and 400 of 2,000."""
    average = next(a for a in metrics.compute(out)["averages"] if (a["policy"], a["length"]) == ("lsa", None))
    assert average["paper_mean_of_ratios"] == pytest.approx(0.1)
    assert average["all_in_mean_of_ratios"] == pytest.approx((0.1 + 0.1 + 0.2) / 3)
    assert average["all_in_ratio_of_means"] == pytest.approx(800 / 6000)


def test_comparisons(out: Path) -> None:
    made = metrics.compute(out)
    with_full = [c for c in made["comparisons"] if (c["policy"], c["against"]) == ("lsa", "full")]
    rows = [c for c in with_full if c["task"] is not None]
    assert len(rows) == 3 and len(with_full) == 3 + 2 + 1  # rows, lengths, everything
    assert all((c["gained"], c["lost"], c["pairs"]) == (0, 1, 12) for c in rows)
    assert all(c["holm_p"] >= c["mcnemar_p"] for c in rows) and not any(c["noninferior"] for c in rows)
    pooled = next(c for c in with_full if c["length"] is None)
    assert (pooled["pairs"], pooled["lost"], pooled["clusters"]) == (36, 3, 8)
    drawn = [c for c in made["comparisons"] if c["against"] == "random@match" and c["task"] == "easy"]
    assert all((c["gained"], c["lost"]) == (8, 1) for c in drawn)  # against seed 0, which is right more often
    alphas = sorted(c["alpha"] for c in rows)
    assert alphas == pytest.approx([0.05 / 3, 0.05 / 2, 0.05])


def test_an_incomplete_run_says_so(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    out = write_run(tmp_path / "part", rows)
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(run | {"samples": len(rows) + 1}))
    assert "incomplete" in markdown(metrics.compute(out))
    with pytest.raises(ValueError, match="holds no samples"):
        metrics.compute(tmp_path)


def test_perplexity_has_a_table_of_its_own(tmp_path: Path) -> None:
    rows = []
    for policy, loss in (("full", 2.0), ("lsa", 2.5)):
        for index in range(4):
            row = sample(
                policy, 0, "perplexity", 1024, index, 0.0, new_tokens=8, losses=[loss + index] * 4 + [loss] * 4
            )
            rows.append({name: value for name, value in row.items() if name not in ("prediction", "score", "correct")})
    out = write_run(tmp_path / "run", rows)
    made = write_report(out, pictures=False)
    assert made["rows"] == made["cells"] == []
    entries = [entry for entry in made["perplexity"] if entry["policy"] == "lsa"]
    assert [(entry["first"], entry["last"]) for entry in entries] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [entry["nats"] for entry in entries] == pytest.approx([4.0, 4.0, 2.5, 2.5])
    assert all(entry["above_full"] == pytest.approx(0.5) for entry in entries)
    assert "1K, tokens 3-4" in (out / "table.md").read_text()


def test_ablations_are_compared_with_the_first_run(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    worse = [
        row | {"score": 0.0, "correct": False} if row["policy"] == "lsa" and row["id"].endswith(("-1", "-2")) else row
        for row in rows
    ]
    first, second = write_run(tmp_path / "tau64", rows), write_run(tmp_path / "tau16", worse, tau=16)
    compared = compare([first, second])
    base, other = compared["runs"]
    assert len(compared["environments"]) == 1 and compared["items_sha256"]
    assert base["settings"] == {} and other["settings"] == {"tau": 16}
    assert base["items"] == other["items"] == 36
    assert (other["paired"].gained, other["paired"].lost) == (0, 6)
    assert other["holm_p"] == other["paired"].mcnemar_p == 2 / 64
    table = compare_table(compared)
    assert "| tau16 | tau 16 | 36 |" in table and "0 / 6" in table


def test_rows_are_about_what_every_run_answered(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """A run that was interrupted makes all rows shorter: none is an average over items that others lack."""
    begun = [row for row in rows if not row["id"].endswith("-0")]
    runs = [write_run(tmp_path / "whole", rows), write_run(tmp_path / "begun", begun)]
    compared = compare(runs)
    (items,), (lost, none) = {run["items"] for run in compared["runs"]}, (run["left_out"] for run in compared["runs"])
    assert 0 < items < items + lost == 36 and none == 0  # 36 as above, without the tasks that full attention fails
    assert f"(others left out: {lost} of whole)" in compare_table(compared)
    other = write_run(tmp_path / "other", [row for row in rows if row["id"].endswith("-0")])
    with pytest.raises(ValueError, match="no item was answered in all of whole, begun, other"):
        compare([*runs, other])


def test_other_policies_of_the_first_run_are_compared_with_it(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "tau64", rows), write_run(tmp_path / "tau16", rows, tau=16)
    compared = compare([first, second], also=["full"])
    assert [(run["name"], run["policy"]) for run in compared["runs"]] == [
        ("tau64", "lsa"), ("full", "full"), ("tau16", "lsa"),
    ]  # fmt: skip
    full, other = (run["paired"] for run in compared["runs"][1:])
    assert (full.gained, full.lost, other.gained) == (3, 0, 0)
    assert json.loads(json.dumps(plain(compared)))["runs"][1]["paired"]["gained"] == 3
    assert [run["name"] for run in compare([first], also=["full"])["runs"]] == ["tau64", "full"]
    with pytest.raises(ValueError, match="tau64 has no policy 'oracle@match'"):
        compare([first, second], also=["oracle@match"])


def compare_table(compared: dict[str, Any]) -> str:
    from flashmem.evaluation.compare import table_of

    return table_of(compared).markdown()


def test_runs_that_cannot_be_paired_are_refused(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", rows), write_run(tmp_path / "b", rows)
    run = json.loads((second / "run.json").read_text())
    (second / "run.json").write_text(json.dumps(run | {"items_sha256": "cd" * 32}))
    with pytest.raises(ValueError, match="b was run on other items than a"):
        compare([first, second])
    with pytest.raises(ValueError, match="has no policy 'oracle@match'"):
        compare([first, first], policy="oracle@match")
    with pytest.raises(ValueError, match="at least two"):
        compare([first])


def test_the_report_is_complete_and_loads_nothing(out: Path) -> None:
    made = write_report(out)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == len(list((out / "plots").glob("*.svg"))) == 5
    assert page.count("<table>") == 6 and 'class="greyed"' in page
    plain = page.replace('xmlns="http://www.w3.org/2000/svg"', "").replace(
        'xmlns:xlink="http://www.w3.org/1999/xlink"', ""
    )  # fmt: skip
    assert not [loads for loads in ("<script", "<link", "<img", "@import", "src=", "http:", "https:") if loads in plain]
    document = ElementTree.fromstring(page.replace("<!DOCTYPE html>", "").replace('<meta charset="utf-8">', ""))
    assert [child.tag for child in document] == ["head", "body"]  # well-formed: every element is closed
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    assert json.loads((out / "metrics.json").read_text())["version"] == 1
    directory = out / "kvpress" / "test__1024__flashmem--demo__lsa__0.90"
    assert json.loads((directory / "metrics.json").read_text())["easy"] == {"string_match": 91.67}
    assert (directory / "predictions.csv").read_text().count("\n") == 1 + 24
    assert "compression_ratio: 0.9\n" in (directory / "config.yaml").read_text()
    first = page
    write_report(out)
    assert (out / "report.html").read_text() == first  # the same samples give the same page
    assert made["policies"] == ["full", "lsa", "random@match"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_report_opens_in_a_browser(out: Path, tmp_path: Path) -> None:
    write_report(out)
    assert BROWSER is not None
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000", "--dump-dom",
    ]  # fmt: skip
    page = (out / "report.html").as_uri()
    done = subprocess.run([BROWSER, *options, page], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<svg") == 5 and done.stdout.count("<table>") == 6
    assert "<h1>test</h1>" in done.stdout and "CONSOLE" not in done.stderr
