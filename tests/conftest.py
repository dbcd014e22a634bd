"""Shared fixtures: one thread, fixed seeds, and the model directory of tests marked `trial`."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Time limits belong to pytest-timeout; examples are the same in every run unless a run asks for fresh ones
# with --hypothesis-profile=thorough.
settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("fixed")


if not torch.cuda.is_available():
    # read when triton is imported, which conftests below this one may do: kernels then run on the CPU, in numpy
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--trial-model", metavar="DIR", help="model directory for tests marked `trial`")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has_model, has_cuda = config.getoption("--trial-model") is not None, torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("trial") and not has_model:
            item.add_marker(pytest.mark.skip(reason="needs --trial-model DIR"))
        if item.get_closest_marker("gpu") and not has_cuda:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels run: a CUDA device, or else the CPU, interpreted (its bf16 products are wrong)."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def trial_model(request: pytest.FixtureRequest) -> Path:
    """The model directory given by --trial-model; tests that use it carry the marker `trial`."""
    directory = Path(request.config.getoption("--trial-model"))
    if not (directory / "config.json").is_file():
        raise pytest.UsageError(f"--trial-model: no config.json in {directory}")
    return directory
