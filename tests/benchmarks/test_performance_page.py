"""The page of numbers is made of result files, and says so where there are none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.common import ROOT

from bench.bench_cases import small_geometry, small_skeleton
from benchmarks import performance_page
from flashmem.bench import decode, profile, report, swap
from flashmem.bench.skeleton import describe, plan


def test_without_results_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"bench": "prefill", "command": "python -m benchmarks.prefill"}))
    assert performance_page.NOTHING in performance_page.page([tmp_path, tmp_path / "missing"])


def test_results_become_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = swap.SwapCase(geometry=small_geometry(), context_tokens=2048, page_chunks=16)
    swaps = swap.run(case, device=torch.device("cpu"), churns=(1.0,), rounds=1)
    skeleton, budgets = small_skeleton(), {"device_budget_bytes": 8 << 20, "host_budget_bytes": 1 << 30}
    rows = decode.run_capacity(skeleton, contexts=[256], windows=1, max_sessions=1, **budgets)
    about = {"model": describe(skeleton), "memory": plan(skeleton, [256], 8, *budgets.values())}
    parts = profile.run_profile(skeleton, context=256, modes=["lsa"], batches=[1], windows=1, **budgets)
    peers = [
        {"bench": "level 1 peer", "peer": "DeepGEMM and torch", "chunks": 65_536, "warm_us": 20.0, "ours_warm_us": 10.0,
         "ratio": 2.0},
        {"bench": "peer", "peer": "vllm", "state": "peer absent"},
        {"bench": "ceilings", "copy_gb_per_s": 3000.0, "bf16_tflop_per_s": 800.0},
        {"bench": "level 1", "chunks": 65_536, "batch": 8, "precision": "fp8", "warm_us": 11.0, "floor_us": 9.0},
        {"bench": "level 1", "chunks": 65_536, "batch": 8, "precision": "fp8", "warm_us": 10.0, "floor_us": 9.0},
    ]  # fmt: skip
    results = {
        "swap": swaps, "capacity": {**about, "rows": rows}, "profile": {**about, "rows": parts},
        "gpu_kernels": {"rows": peers},
    }  # fmt: skip
    for name, result in results.items():
        monkeypatch.setattr(sys, "argv", ["flashmem", "bench", name])
        report.write_result(tmp_path / f"{name}.json", name, result, report.machine(), program="flashmem")
    text = performance_page.page([tmp_path])
    assert "## Capacity (capacity.json)" in text and "**2 of 8 experts**" in text
    assert "## Page swaps (swap.json)" in text and "`flashmem bench swap`" in text
    assert "| level 2: scores | 256 | lsa | 1 |" in text
    assert "| level 1 peer | DeepGEMM and torch | 65,536 | - | - | 20.0 | 10.0 | 2.00 |  |" in text
    assert "| peer absent |" in text and "a copy on the device at 3,000 GB/s; TFLOP/s: bf16 800" in text
    assert "| level 1 | 65,536 | 8 | - | fp8 | 10.0 | 9.0 | - | - |" in text and "| 11.0 |" not in text
    assert f"{swaps['rows'][0]['peak_ratio']:.1%}" in text and performance_page.NOTHING not in text


def test_a_target_that_is_missed_says_where_and_why(tmp_path: Path) -> None:
    def capacity(ratio: float) -> None:
        row = {"mode": "lsa", "batch": 4, "throughput_ratio": ratio, "sessions_ratio": 9.0}
        (tmp_path / "capacity-1m.json").write_text(json.dumps({"bench": "other", "rows": [{"mode": "full"}, row]}))

    capacity(3.25)
    text = performance_page.page([tmp_path])
    assert "| 1M, equal bytes for KV: throughput, LSA / full | at least 3.20 | 3.25 | yes | capacity-1m.json |" in text
    assert "falls short" not in text
    capacity(3.15)
    text = performance_page.page([tmp_path])
    assert "| 3.15 | no |" in text and "- **1M, equal bytes for KV: throughput, LSA / full** falls short at B=4" in text
    rows = [
        {"bench": "attend peer", "peer": "gather and torch products, compiled", "kv_format": "fp8", "batch": batch,
         "ratio": ratio}
        for batch, ratio in ((1, 4.5), (8, 2.0))
    ]  # fmt: skip
    (tmp_path / "gpu_kernels-peers.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    text = performance_page.page([tmp_path])
    assert "| at least 4.00 | 2.00 to 4.50 | 1 of 2 |" in text
    assert "compiled / ours** falls short at B=8 fp8 (2.00). Loads, decoding" in text


def test_the_page_in_the_repository_is_the_one_made() -> None:
    folders = [ROOT / "results", ROOT / "benchmarks" / "results"]
    assert performance_page.PAGE.read_text() == performance_page.page(folders)
