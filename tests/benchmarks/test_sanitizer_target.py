"""What compute-sanitizer looks at: it runs, swaps pages, and covers every kernel."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest
import torch

from benchmarks import common, gpu_checks, gpu_sanitizer_target
from flashmem.config import KVFormat


@pytest.mark.parametrize("kv_format", ["fp32", "fp8"])
def test_sanitizer_target_swaps_pages_of_a_store(kv_format: KVFormat) -> None:
    assert gpu_sanitizer_target.run_store("cpu", kv_format) > 0


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_sanitizer_target_swaps_pages_of_an_engine(
    kernels: Literal["reference", "fused"], triton_device: torch.device
) -> None:
    assert gpu_sanitizer_target.run_decode(str(triton_device), "fp8", 9, kernels) > 0


def test_the_sanitizer_looks_at_every_kernel() -> None:
    """Every test that is named exists, in every file of tests that run kernels."""
    for name in gpu_checks.KERNEL_TESTS:
        file, test = name.split("::")
        assert f"def {test}(" in (common.ROOT / "tests" / "kernels" / f"test_{file}").read_text()
    files = {
        path.name for path in (common.ROOT / "tests" / "kernels").glob("*.py") if "triton_device" in path.read_text()
    }
    assert files == {"test_" + name.split("::")[0] for name in gpu_checks.KERNEL_TESTS}


def test_the_store_part_of_the_sanitizer_target_is_without_transformers() -> None:
    words = ["benchmarks.gpu_sanitizer_target", "store", "--device", "cpu", "--kv-formats", "fp32"]
    code = f"import runpy, sys; sys.argv = {words}; runpy.run_module({words[0]!r}, run_name='__main__')"
    code += "; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "pages copied to the device" in done.stdout
