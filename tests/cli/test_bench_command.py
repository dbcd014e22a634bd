"""flashmem bench: tables for people, JSON for programs, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.bench_cases import small_config
from cli.conftest import Run
from flashmem.bench import decode as bench_decode
from flashmem.policy import AllPages

SMALL = ("--page-chunks", "4", "--device", "cpu")


def test_swap_prints_and_saves(run: Run, tmp_path: Path) -> None:
    out, config = tmp_path / "swap.json", small_config(tmp_path)
    words = ["bench", "swap", "--model", config, "--context", "4K", "--churn", "0.5", "--rounds", "2", *SMALL]
    result = run(*words, "--out", out, "--peer", "tilelang")
    assert result.exit_code == 0 and "one by one" in result.stdout and "50%" in result.stdout
    saved = json.loads(out.read_text())
    assert saved["bench"] == "swap" and {"commit", "cpu", "gpus"} <= saved["machine"].keys()
    assert saved["peers"].keys() == {"tilelang"} and len(saved["rows"]) == 2
    printed = json.loads(run(*words, "--json").stdout)
    assert printed["rows"][0]["pages"] == saved["rows"][0]["pages"]


@pytest.mark.parametrize("command", ["decode", "capacity"])
def test_skeletons_run_small(run: Run, tmp_path: Path, command: str) -> None:
    words = ["bench", command, "--model", small_config(tmp_path), "--experts", "2", "--context", "512"]
    words += ["--windows", "1", "--tau", "4", "--dtype", "float32", "--kv-budget", "3MB", *SMALL]
    words += ["--batch", "1,500"] if command == "decode" else ["--max-sessions", "1"]
    result = run(*words)
    assert result.exit_code == 0 and "2 of 8 experts" in result.stdout and "random" in result.stdout
    values = json.loads(run(*words, "--json").stdout)
    assert {row["mode"] for row in values["rows"]} == {"full", "lsa"}
    assert values["model"]["experts_of_the_real_model"] == 8 and values["memory"]["weight_bytes"] > 0


def test_what_is_measured_is_saved_before_the_end(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut off leaves the rows that it had, and says that it is not complete."""
    measured = bench_decode.measure

    def cut_off(engine: Any, *arguments: Any) -> dict[str, Any]:
        if engine.config.policy != AllPages():
            raise KeyboardInterrupt
        return measured(engine, *arguments)

    monkeypatch.setattr(bench_decode, "measure", cut_off)
    words = ["bench", "capacity", "--model", small_config(tmp_path), "--experts", "2", "--context", "512"]
    words += ["--tau", "4", "--dtype", "float32", "--kv-budget", "3MB", "--max-sessions", "1", *SMALL]
    assert run(*words, "--out", tmp_path / "out.json").exit_code
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["complete"] is False and [row["mode"] for row in saved["rows"]] == ["full"]
    assert saved["rows"][0]["tokens_per_second"] > 0 and saved["memory"]


def test_a_profile_shows_the_parts_of_a_step(run: Run, tmp_path: Path) -> None:
    words = ["bench", "profile", "--model", small_config(tmp_path), "--experts", "2", "--context", "512", "--tau", "4"]
    words += ["--windows", "1", "--dtype", "float32", "--kv-budget", "3MB", "--batch", "1", *SMALL]
    result = run(*words, "--out", tmp_path / "profile.json")
    assert result.exit_code == 0, result.stderr
    assert "level 2: scores" in result.stdout and "mean step over" in result.stdout
    saved = json.loads((tmp_path / "profile.json").read_text())
    assert saved["bench"] == "profile" and saved["model"]["kernels"] == "reference"
    assert saved["rows"][0]["components_ms"]


def test_prefill_goes_beside_the_stock_model(run: Run, tmp_path: Path) -> None:
    words = ["bench", "prefill", "--first", "256", "--context", "600", "--memory", "1GiB", "--device", "cpu"]
    result = run(*words, "--prefill-chunk", "256", "--page-chunks", "16", "--out", tmp_path / "prefill.json")
    assert result.exit_code == 0 and "stock, whole" in result.stdout and "flashmem" in result.stdout
    saved = json.loads((tmp_path / "prefill.json").read_text())
    assert [ratio["tokens"] for ratio in saved["ratios"]] == [512, 512] and saved["page_chunks"] == 16


def test_a_plan_runs_nothing(run: Run) -> None:
    words = ["bench", "capacity", "--plan", "--kv-budget", "30GiB", "--host-budget", "200GiB", "--device", "cpu"]
    values = json.loads(run(*words, "--json").stdout)
    assert "rows" not in values and len(values["memory"]["rows"]) == 6
    assert "8 of 256" in run(*words).stdout


def test_kernels_without_cuda_are_the_definitions(run: Run) -> None:
    result = run("bench", "kernels", "--device", "cpu", "--chunks", "64", "--rounds", "1")
    assert result.exit_code == 0 and "definitions" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("swap", "--churn", "0"), "churn must lie in (0, 1]"),
        (("swap", "--churn", "x"), "could not convert"),
        (("swap", "--peer", "nobody"), "no peer 'nobody'"),
        (("swap", "--device", "cuda:99"), "cuda:99"),
        (("profile", "--modes", "lsa,half", "--device", "cpu"), "modes are full and lsa, got 'half'"),
        (("kernels", "--device", "cpu", "--chunks", "65"), "multiples of 64"),
        (("capacity", "--experts", "300", "--plan", "--device", "cpu"), "experts must lie in 1..256"),
        (("decode", "--batch", "0", "--device", "cpu"), "at least 1"),
        (("decode", "--kv-budget", "much", "--device", "cpu"), "is not a size"),
    ],
)
def test_bad_input_is_one_line(run: Run, words: tuple[str, ...], message: str) -> None:
    result = run("bench", *words)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1
