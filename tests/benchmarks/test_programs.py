"""Small runs of the benchmarks themselves."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import common, decode_cost, gpu_checks, prefill, recall
from flashmem import Engine, LSAConfig
from flashmem.backbone import random_model
from flashmem.bench import synthetic


def test_synthetic_history_is_a_session_like_others() -> None:
    engine = Engine(common.v4_shaped_model(), config=LSAConfig(policy="native", keep=0.5, page_chunks=4))
    with engine.session() as session:
        synthetic.fill(engine, session, 1003)
        engine.check()
        assert session.state.position == 1003 and session.pages.num_chunks == 250
        assert len(session.pages.resident) == 32  # half of 63 pages
        session.append([1, 2, 3, 4, 5])
        session.generate(max_new_tokens=3)
        engine.check()
    engine.close()


def test_decode_cost_keeps_resident_pages_equal() -> None:
    result = decode_cost.run(2048, 8192, resident_pages=5, rounds=2, block=2, device="cpu")
    assert [row["resident_pages"][0] for row in result["rows"]] == [5, 5, 32]
    assert result["step_time_ratio"] > 0


def test_prefill_reports_time_and_memory() -> None:
    result = prefill.run(1100, LSAConfig(policy="native", keep=0.5, prefill_chunk=300))
    assert result["within_limits"] and result["accounting"]["all_in_host_bytes"] > 0


def test_documents_hold_their_facts_once() -> None:
    document = recall.make_document(4096, seed=0)
    assert len(document.ids) == 4096 and len(document.facts) == 102
    assert len({tuple(key) for key, _ in document.facts}) == 102
    places = [i for i, token in enumerate(document.ids) if token == recall.MAGIC]
    assert len(places) == 102 and all(b - a >= recall.FACT_LENGTH for a, b in pairwise(places))
    told = {tuple(document.ids[i + 1 : i + 6]) for i in places}
    assert told == {(*key, *value) for key, value in document.facts}


@pytest.mark.trial
def test_recall_of_a_model_that_knows_the_task(trial_model: Path) -> None:
    args = SimpleNamespace(
        model=trial_model, contexts=[4096], questions=4, keep=[0.1], seeds=[0], layers=[0], page_chunks=16, seed=0
    )
    result = recall.run(args)
    shares = {row["policy"]: row["exact_share"] for row in result["contexts"][0]["policies"]}
    assert shares["full"] == shares["native 10 %"] == 1
    assert str(trial_model.parent) not in recall.markdown(result)


def test_parts_of_the_gpu_checks_run_on_the_cpu() -> None:
    args = SimpleNamespace(device="cpu", geometries=1, load_tokens=2048, load_windows=2, window_steps=3)
    assert gpu_checks.run_exactness(args)["passed"]
    assert gpu_checks.run_copies_under_load(args)["passed"]
    assert gpu_checks.run_copy_rates(SimpleNamespace(device="cpu", records=3, copy_rounds=1))["passed"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the memory part does not fail")
def test_a_gpu_check_that_fails_or_hangs_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, without a GPU, the memory part cannot run; what the other measured is kept, and no path is in the file."""
    out = tmp_path / "checks.json"
    words = ["gpu_checks.py", "--device", "cpu", "--records", "3", "--copy-rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--parts", "memory", "copy_rates", "--out", str(out)])
    assert gpu_checks.main() == 1
    result = json.loads(out.read_text())
    assert (result["complete"], result["passed"]) == (True, False)
    assert result["copy_rates"]["passed"] and result["copy_rates"]["records"] == 3
    assert (
        not result["memory"]["passed"] and "ended with status" in result["memory"]["why"] and result["memory"]["tail"]
    )
    assert str(common.ROOT) not in out.read_text() and str(tmp_path) not in out.read_text()
    hung = gpu_checks.run_alone("copy_rates", 0.5)
    assert not hung["passed"] and "more than" in hung["why"]


@pytest.mark.parametrize(
    ("texts", "counts", "passed"),
    [
        (["def test_a(): pass", "def test_b(): pass\n\ndef test_c(): pass"], {"passed": 3}, [True, True]),
        (["def test_a(): pass", "def test_b(): assert 1 == 2"], {"passed": 1, "failed": 1}, [True, False]),
        (
            ["import pytest\ndef test_a(): pytest.skip('no reason')\ndef test_b(): pass", "def test_c(): pass"],
            {"passed": 2, "skipped": 1},
            [False, True],
        ),
        (["import os\ndef test_a(): os._exit(3)", "nothing = 1"], {}, [False, False]),
    ],
)
def test_files_of_tests_run_side_by_side_and_are_merged(
    tmp_path: Path, texts: list[str], counts: dict[str, int], passed: list[bool]
) -> None:
    """A file that fails, skips, dies or holds no test spoils the whole, and says how it ended."""
    files = [tmp_path / f"test_{i}.py" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    result = gpu_checks.run_pytest([str(file) for file in files])
    assert result["counts"] == counts and result["passed"] == all(passed)
    assert [row["passed"] for row in result["files"].values()] == passed
    assert len(result["failures"]) == counts.get("failed", 0) + counts.get("skipped", 0)
    failed = {file for file, row in result["files"].items() if row["exit_status"]}
    assert result["tail"].keys() == failed and all(result["tail"].values())


def test_only_tests_of_kernels_run_as_kernel_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "run_pytest", lambda files, *words: {"files": files})
    files = gpu_checks.run_kernel_tests(None)["files"]
    assert {Path(file).parts[:2] for file in files} == {("tests", name) for name in ("kernels", "e2e", "lookahead")}
    assert "tests/e2e/test_fused_cuda.py" in gpu_checks.run_tests(None)["files"]


def test_races_of_a_top_k_are_seen() -> None:
    model = random_model("WCHC", seed=1)
    text, gap = gpu_checks.text_without_races(model, 120, seed=3)
    assert len(text) == 120 and gap > gpu_checks.LEAST_GAP
    assert gpu_checks.closest_race(model, text) == gap
    assert gpu_checks.closest_race(model, text[:20]) == float("inf")  # five chunks, all of them picked
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(compressor := getattr(layer.self_attn, "compressor", None), "indexer"):
                compressor.indexer.scorer.weights_proj.weight.zero_()
    assert gpu_checks.closest_race(model, text) == 0


@pytest.mark.slow
def test_a_part_that_is_killed_keeps_what_its_program_said(tmp_path: Path) -> None:
    """The output of a program within a part is passed on while it comes."""
    code = "import sys; from benchmarks.gpu_checks import run_aloud; run_aloud([sys.executable, '-c', sys.argv[1]])"
    says = "import time; print('half way'); time.sleep(60)"
    result = gpu_checks.run_process([sys.executable, "-c", code, says], tmp_path / "none.json", seconds=20)
    assert not result["passed"] and "more than" in result["why"] and result["tail"] == ["half way"]
