"""Commands with a model that brings its own settings and its own form of asking."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import flashmem
from cli.conftest import Run
from flashmem import LSAConfig

BOOK = "All happy families are alike. " * 20
SHORT = ("--max-new-tokens", 6)
DEFAULTS = {"lsa": {"policy": "native", "keep": 0.5, "page_chunks": 4}, "question": "\nQ: {question}\nA:"}


@pytest.fixture
def model(text_model: Path, tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(text_model, tmp_path / "model"))
    (directory / "flashmem.json").write_text(json.dumps(DEFAULTS))
    return directory


@pytest.fixture
def book(run: Run, model: Path, tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(BOOK)
    result = run("read", tmp_path / "book.txt", "-o", tmp_path / "book.mem", "--model", model)
    assert result.exit_code == 0, result.stderr
    return tmp_path / "book.mem"


def expected(model: Path, prompt: str) -> str:
    config = LSAConfig(policy="native", keep=0.5, page_chunks=4)
    engine = flashmem.Engine.from_pretrained(model, config=config, device="cpu")
    session = engine.session()
    session.append(BOOK)
    return str(session.generate(prompt, max_new_tokens=6))


def test_read_takes_the_models_settings_and_given_ones_win(run: Run, model: Path, book: Path, tmp_path: Path) -> None:
    assert json.loads(run("inspect", book, "--json").stdout)["page_chunks"] == 4
    assert json.loads(run("inspect", book, "--json").stdout)["settings"]["keep"] == 0.5
    args = ("read", tmp_path / "book.txt", "-o", tmp_path / "other.mem", "--model", model)
    assert run(*args, "--page-chunks", 8, "--keep", 0.25).exit_code == 0
    values = json.loads(run("inspect", tmp_path / "other.mem", "--json").stdout)
    assert (values["page_chunks"], values["settings"]["keep"]) == (8, 0.25)


def test_ask_puts_the_question_in_the_models_form(run: Run, model: Path, book: Path) -> None:
    asked = json.loads(run("ask", book, "Which?", "--model", model, *SHORT, "--json").stdout)
    raw = json.loads(run("ask", book, "Which?", "--model", model, *SHORT, "--raw", "--json").stdout)
    assert asked["stats"]["tokens"] - raw["stats"]["tokens"] == len("\nQ: \nA:")
    assert asked["answer"] == expected(model, "\nQ: Which?\nA:")
    assert raw["answer"] == expected(model, "Which?")


def test_chat_puts_every_line_in_the_models_form(run: Run, model: Path, book: Path, tmp_path: Path) -> None:
    for option, added in ((), len("\nQ: \nA:")), (("--raw",), 0):
        saved = tmp_path / f"chat{added}.mem"
        result = run("chat", book, "--model", model, *SHORT, *option, stdin=f"one\ntwo\n/save {saved}\n")
        assert result.exit_code == 0, result.stderr
        position = json.loads(run("inspect", saved, "--json").stdout)["position"]
        assert position == len(BOOK) + 2 * (len("one") + 6 + added) - 1  # the last new token has not run


def test_inspect_shows_them(run: Run, model: Path) -> None:
    values = json.loads(run("inspect", model, "--json").stdout)
    assert (values["lsa_defaults"], values["question_form"]) == (DEFAULTS["lsa"], DEFAULTS["question"])
    assert values["dtype_default"] == "auto"
    assert r"'\nQ: {question}\nA:'" in run("inspect", model).stdout


def test_a_bad_file_is_one_line_and_status_2(run: Run, model: Path, book: Path) -> None:
    (model / "flashmem.json").write_text('{"lsa": {"kept": 0.1}}')
    result = run("ask", book, "Which?", "--model", model)
    assert result.exit_code == 2
    assert "unknown options: kept" in result.stderr
