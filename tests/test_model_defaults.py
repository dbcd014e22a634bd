"""`flashmem.json`: what a model directory says about its use, and who wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import flashmem
from flashmem.accounting import shipped_model
from flashmem.backbone import random_model
from flashmem.config import LSAConfig, ModelDefaults


def write(directory: Path, values: Any) -> Path:
    (directory / "flashmem.json").write_text(json.dumps(values))
    return directory


def test_where_there_is_no_file_the_defaults_are_ours(tmp_path: Path) -> None:
    for model in (tmp_path, "somebody/model"):
        assert ModelDefaults.of(model) == ModelDefaults()
    assert ModelDefaults().config() == LSAConfig()
    assert ModelDefaults().ask("why?") == "why?"


def test_what_is_given_wins(tmp_path: Path) -> None:
    defaults = ModelDefaults.of(write(tmp_path, {"lsa": {"keep": 0.2, "page_chunks": 16, "tau": 8}}))
    assert defaults.config() == LSAConfig(keep=0.2, page_chunks=16, tau=8)
    assert defaults.config(keep=0.5, policy="native") == LSAConfig(keep=0.5, policy="native", page_chunks=16, tau=8)


def test_a_given_threshold_asks_for_the_threshold_rule() -> None:
    defaults = ModelDefaults(lsa={"keep": 0.2, "page_chunks": 16})
    assert defaults.config(threshold=0.3) == LSAConfig(threshold=0.3, page_chunks=16)
    assert defaults.config(threshold=0.3, keep=0.1).keep == 0.1


def test_a_question_is_put_in_the_models_form() -> None:
    assert ModelDefaults(question="\nQ: {question}\nA:").ask("{x}?") == "\nQ: {x}?\nA:"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "holds no JSON object"),
        ({"lsb": {}}, "unknown entries lsb"),
        ({"lsa": []}, "lsa must be an object"),
        ({"lsa": {"kept": 0.1}}, "unknown options: kept"),
        ({"lsa": {"keep": 2}}, r"keep must lie in \(0, 1\]"),
        ({"lsa": {"page_chunks": "16"}}, "page_chunks must be an integer"),
        ({"lsa": {"disk_path": "/"}}, "must not set disk_path"),
        ({"lsa": {"device_budget_bytes": 1}}, "must not set device_budget_bytes"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"question": "Q:"}, "once, got 'Q:'"),
        ({"question": 1}, "question a text"),
    ],
)
def test_bad_files_are_refused_with_their_name(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ModelDefaults.of(write(tmp_path, values))
    assert str(tmp_path / "flashmem.json") in str(caught.value)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "flashmem.json").write_text("{")
    with pytest.raises(ValueError, match=r"flashmem\.json"):
        ModelDefaults.of(tmp_path)


def test_an_engine_takes_them_where_no_config_is_given(tmp_path: Path) -> None:
    random_model("WCHC").save_pretrained(tmp_path)
    write(tmp_path, {"lsa": {"keep": 0.25, "page_chunks": 4}, "dtype": "bfloat16"})
    engine = flashmem.Engine.from_pretrained(tmp_path, device="cpu")
    assert (engine.config.keep, engine.layout.page_chunks) == (0.25, 4)
    assert engine.backbone.dtype is torch.bfloat16
    engine.close()
    engine = flashmem.Engine.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert engine.backbone.dtype is torch.float32
    engine.close()
    engine = flashmem.Engine.from_pretrained(tmp_path, device="cpu", config=LSAConfig(policy="all"))
    assert engine.config == LSAConfig(policy="all")
    engine.close()


def test_the_shipped_model_has_small_pages_and_a_form_of_asking() -> None:
    defaults = ModelDefaults.of(shipped_model())
    assert defaults.config().page_chunks < LSAConfig().page_chunks
    assert defaults.ask("river garden?") == "\nQuestion: river garden?\nAnswer:"
