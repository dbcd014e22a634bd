"""A small random model on disk, with and without a tokenizer, and a way to run commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from flashmem.backbone import random_model
from flashmem.cli import app

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Run a command; what happens to stderr and to the status is in the result."""

    def invoke(*args: object, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


@pytest.fixture(scope="session")
def id_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without a tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "ids"
    model = random_model("WCHC")
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a tokenizer of bytes."""
    directory = tmp_path_factory.mktemp("models") / "text"
    model = random_model("WCHC", seed=1)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"<extra{index}>" for index in range(320 - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory
