"""flashmem kv: the JSON that programs read, the table that people read, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import Run
from flashmem.accounting import flops_report, kv_report, resolve_geometry

FLASH = resolve_geometry("deepseek-v4-flash")


def test_json_is_the_formulas(run: Run) -> None:
    result = run("kv", "--model", "deepseek-v4-flash", "--context", "512K", "--keep", "0.1", "--json")
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    report = kv_report(FLASH, 512 * 1024, keep=0.1)
    flops = flops_report(FLASH, 512 * 1024, resident_chunks=report.resident_chunks)
    assert values["context_tokens"] == 524_288
    assert values["paper"]["full_bytes"] == report.paper.full_bytes
    assert values["paper"]["resident_bytes"] == report.paper.resident_bytes
    assert values["paper"]["ratio"] == report.paper.ratio
    assert values["all_in"]["full_bytes"] == report.all_in.full_bytes
    assert values["all_in"]["device_bytes"] == sum(values["all_in"]["device_components"].values())
    assert values["all_in"]["host_bytes"] == report.all_in.host_bytes
    assert values["flops_per_token"]["full"] == flops.full.total
    assert values["flops_per_token"]["lsa"] == flops.lsa.total


def test_table_names_both_accountings(run: Run) -> None:
    result = run("kv", "--context", "1M")
    assert result.exit_code == 0
    assert "paper accounting" in result.stdout
    assert "all-in accounting" in result.stdout
    assert "whole model" in result.stdout
    assert result.stderr == ""


def test_any_config_json(run: Run, id_model: Path) -> None:
    for model in (id_model, id_model / "config.json"):
        assert json.loads(run("kv", "--model", model, "--context", 4096, "--json").stdout)["num_pages"] == 16


@pytest.mark.parametrize("context", ["0", "1", "3", "1.5K", "100M"])
def test_any_context_has_an_answer(run: Run, context: str) -> None:
    assert run("kv", "--context", context).exit_code == 0
    values = json.loads(run("kv", "--context", context, "--json").stdout)
    assert values["paper"]["resident_bytes"] <= values["paper"]["full_bytes"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--context", "5X"), "'5X' is not a size"),
        (("--context", "9" * 400), "is too large"),
        (("--context", "-1"), "'-1' is not a size"),
        (("--keep", "0"), "keep must lie in (0, 1], got 0.0"),
        (("--targets", "99"), "num_targets must lie in 0..21, got 99"),
        (("--model", "nobody/nothing"), "no model 'nobody/nothing'"),
        (("--keep", "1.5"), "keep must lie in (0, 1], got 1.5"),
        (("--page-chunks", "5"), "page_chunks must be a power of two"),
        (("--format", "fp4"), "'fp4' is not one of"),
        (("--bogus",), "No such option: --bogus"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run: Run, args: tuple[str, ...], message: str) -> None:
    result = run("kv", *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_formulas_need_no_torch() -> None:
    code = (
        "import sys; from flashmem.cli import app; app(['kv', '--json'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
