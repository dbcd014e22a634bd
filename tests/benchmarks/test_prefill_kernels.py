"""The program that checks and times the prefill kernels, tried in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import prefill_kernels
from flashmem.kernels.sparse_attention import fused as attention

pytestmark = pytest.mark.usefixtures("triton_device")


@torch.no_grad()
def test_checks_pass_and_a_wrong_kernel_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    if triton_device.type == "cuda":
        pytest.skip("sizes for the interpreter")
    out = tmp_path / "rows.json"
    assert prefill_kernels.main(["--tiny", "--out", str(out)]) == 0
    checks = [row for row in json.loads(out.read_text())["rows"] if "check" in row]
    assert [row["check"] for row in checks].count("attention") == 6 and len(checks) == 8
    right = attention.attend_rows_fused
    monkeypatch.setattr(attention, "attend_rows_fused", lambda *args, **more: right(*args, **more) * 1.1)
    monkeypatch.setattr(prefill_kernels, "level_2", lambda *args: None)
    assert prefill_kernels.main(["--tiny", "--out", str(out)]) == 1
