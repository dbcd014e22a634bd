"""What result files may contain, and the statistics in them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import common


def test_command_line_names_no_absolute_path(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/a/b/recall.py", "--model", "/data/models/small/", "--out=/tmp/x/r.json", "--keep", "0.1", "a/b.json"]
    monkeypatch.setattr(sys, "argv", words)
    expected = "python -m benchmarks.recall --model small --out=r.json --keep 0.1 a/b.json"
    assert common.command_line() == expected


def test_paths_are_cut_out_of_texts() -> None:
    line = 'File "/a/b/c.py", line 3, in /x/y: see tests/e2e/test_x.py, 1/2 and https://example.org/a/b'
    assert (
        common.without_paths(line)
        == 'File "c.py", line 3, in y: see tests/e2e/test_x.py, 1/2 and https://example.org/a/b'
    )


def test_a_result_says_where_it_was_measured(tmp_path: Path) -> None:
    common.write_result(tmp_path / "new" / "r.json", "x", {"value": 3}, common.machine())
    result = json.loads((tmp_path / "new" / "r.json").read_text())
    assert result["bench"] == "x" and result["value"] == 3
    assert {"cpu", "cores", "threads", "load_average", "torch", "transformers", "commit"} <= result["machine"].keys()


def test_wilson_interval() -> None:
    low, high = common.wilson(50, 50)
    assert high == 1 and low == pytest.approx(0.9287, abs=1e-4)  # 1 / (1 + 1.96^2 / 50)
    low, high = common.wilson(5, 10)
    assert low == pytest.approx(1 - high) and low == pytest.approx(0.2366, abs=1e-4)


def test_spread_is_in_milliseconds() -> None:
    assert common.spread([0.003, 0.001, 0.002])["median"] == 2
    assert common.spread([0.001])["max"] == 1
