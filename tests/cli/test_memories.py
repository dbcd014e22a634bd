"""read, ask, chat, generate and inspect over real sessions of a random model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import flashmem
from cli.conftest import Run
from flashmem import LSAConfig

BOOK = "It was the best of times, it was the worst of times. " * 12
SMALL = ("--page-chunks", 4, "--tau", 8, "--policy", "native", "--keep", 0.3)
SHORT = ("--max-new-tokens", 6)


@pytest.fixture
def book(run: Run, text_model: Path, tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(BOOK)
    result = run("read", tmp_path / "book.txt", "-o", tmp_path / "book.mem", "--model", text_model, *SMALL)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'book.mem'}: {len(BOOK)} tokens in 40 pages")
    return tmp_path / "book.mem"


def test_ask_answers_what_the_engine_answers(run: Run, text_model: Path, book: Path) -> None:
    result = run("ask", book, "Which times?", "--model", text_model, *SMALL[2:], *SHORT, "--json")
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)

    config = LSAConfig(page_chunks=4, tau=8, policy="native", keep=0.3)
    engine = flashmem.Engine.from_pretrained(text_model, config=config, device="cpu")
    session = engine.session()
    session.append(BOOK)
    assert values["answer"] == session.generate("Which times?", max_new_tokens=6)
    assert values["stats"]["resident_pages"] == session.stats()["resident_pages"] < values["stats"]["pages"]


def test_ask_prints_the_answer_alone_on_stdout(run: Run, text_model: Path, book: Path) -> None:
    plain = run("ask", book, "Which?", "--model", text_model, *SHORT)
    as_json = run("ask", book, "Which?", "--model", text_model, *SHORT, "--json")
    assert plain.stdout == json.loads(as_json.stdout)["answer"] + "\n"
    assert "pages on the device" in plain.stderr


def test_memories_are_not_replaced_unasked(run: Run, text_model: Path, book: Path) -> None:
    args = ("read", book.with_name("book.txt"), "-o", book, "--model", text_model, *SMALL)
    refused = run(*args)
    assert refused.exit_code == 2
    assert "exists; --force replaces it" in refused.stderr
    assert run(*args, "--force").exit_code == 0


def test_a_memory_of_another_model_is_refused(run: Run, id_model: Path, book: Path) -> None:
    result = run("ask", book, "Which?", "--model", id_model)
    assert result.exit_code == 2
    assert "was made with model" in result.stderr


def test_chat_keeps_turns_and_saves(run: Run, text_model: Path, book: Path, tmp_path: Path) -> None:
    lines = f"first\n\n/stats\n/help\n/save {tmp_path / 'chat.mem'}\n/save {book}\nsecond\n/quit\nnever\n"
    result = run("chat", book, "--model", text_model, *SHORT, stdin=lines)
    assert result.exit_code == 0, result.stderr
    assert "saved" in result.stderr
    assert f"{book} exists" in result.stderr.replace("\n", "")
    session = json.loads(run("inspect", tmp_path / "chat.mem", "--json").stdout)
    assert session["position"] == len(BOOK) + len("first") + 5  # the sixth new token has not run

    engine = flashmem.Engine.from_pretrained(text_model, config=LSAConfig(page_chunks=4), device="cpu")
    first = engine.open(book).generate("first", max_new_tokens=6)
    assert result.stdout.startswith(first)


def test_a_chat_survives_a_bad_turn(run: Run, id_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    lines = f"1 2 3\nwords\n99999\n/save {tmp_path}/file/x\n/stats\n4 5\n/save {tmp_path / 'c.mem'}\n"
    result = run("chat", "--model", id_model, *SMALL, *SHORT, stdin=lines)
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2
    log = " ".join(result.stderr.split())
    for message in ("flashmem: this model has no tokenizer", "got 99999", "Not a directory", "saved"):
        assert message in log, log
    assert json.loads(run("inspect", tmp_path / "c.mem", "--json").stdout)["position"] == 3 + 6 + 2 + 5


@pytest.mark.parametrize(
    ("name", "value"),
    [("page_chunks", ...), ("page_chunks", "4"), ("kv_format", 1), ("observation_window", None), ("dtype", "float99")],
)
def test_a_forged_memory_is_one_line(run: Run, text_model: Path, book: Path, name: str, value: object) -> None:
    """Its checksum fits, but what it says of its engine makes no sense."""
    manifest = json.loads((book / "manifest.json").read_text())
    del manifest["sha256"], manifest["session"][name]
    if value is not ...:
        manifest["session"][name] = value
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (book / "manifest.json").write_text(json.dumps(manifest))
    result = run("ask", book, "Which?", "--model", text_model)
    assert result.exit_code == 2 and name in result.stderr


@pytest.mark.parametrize("content", ["{", "[]", '"x"', '{"version": "1.0", "model": {}}'])
def test_a_damaged_tokenizer_is_one_line(run: Run, id_model: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(id_model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(content)
    result = run("generate", "x", "--model", tmp_path / "model")
    assert result.exit_code == 2 and "the tokenizer cannot be loaded" in result.stderr


def test_generate_without_a_tokenizer_takes_ids(run: Run, id_model: Path) -> None:
    result = run("generate", "-", "--model", id_model, *SMALL, *SHORT, stdin="1 2 3 4 5 6 7 8")
    assert result.exit_code == 0, result.stderr
    engine = flashmem.Engine.from_pretrained(id_model, config=LSAConfig(page_chunks=4), device="cpu")
    assert [int(word) for word in result.stdout.split()] == engine.session().generate([*range(1, 9)], max_new_tokens=6)

    refused = run("generate", "words", "--model", id_model, *SMALL)
    assert refused.exit_code == 2
    assert "no tokenizer" in refused.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("read", "missing.txt", "-o", "x.mem"), "missing.txt"),
        (("ask", "missing.mem", "Which?"), "is not a memory"),
        (("generate", "x", "--policy", "best"), "unknown policy 'best'"),
        (("generate", "x", "--policy", "random"), "needs a budget"),
        (("generate", "x", "--device-budget", "8Gib"), "'8Gib' is not a size"),
        (("generate", "x", "--device-budget", "1KiB"), "device"),
        (("generate", "x", "--indexer", "missing.pt"), "no indexer checkpoint"),
        (("generate", "x", "--device", "cpu", "--device-map", "auto"), "not both"),
        (("generate", "x", "--device", "cuda:99"), "CUDA devices that PyTorch can use"),
        (("generate", "x", "--device", "gpu"), "device 'gpu'"),
        (("generate", "x", "--max-new-tokens", 0), "max_new_tokens must be at least 1, got 0"),
        (("generate", "x", "--top-p", 2), "top_p must lie in (0, 1], got 2.0"),
        (("generate", "x", "--temperature", "nan"), "temperature must be a finite number from 0, got nan"),
        (("generate", "x", "--seed", 1 << 70), "seed must fit into 64 bits"),
        (("generate", "x", "--keep", 0), "keep must lie in (0, 1], got 0.0"),
        (("generate", "x", "--page-chunks", 1 << 40), "exceed the model's 1048576 positions"),
        (("generate", "x", "--observation-window", 1 << 40), "exceed the model's 1048576 positions"),
        (("generate", "x", "--device-budget", "900000TiB"), "bytes needed"),
        (("generate", "x", "--disk-budget", "1GiB"), "disk_budget_bytes needs disk_path"),
        (("read", "/dev/null", "-o", "x.mem"), "/dev/null is empty: there is nothing to read"),
        (("read", ".", "-o", "x.mem"), "Is a directory"),
        (("read", __file__, "-o", "x.mem", "--host-budget", 1), "host: "),
        (("chat", "missing.mem"), "is not a memory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run: Run, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*args, "--model", text_model)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_no_text_is_refused(run: Run, text_model: Path, tmp_path: Path) -> None:
    (tmp_path / "image.txt").write_bytes(b"abc\xff\xfe")
    result = run("read", tmp_path / "image.txt", "-o", tmp_path / "x.mem", "--model", text_model)
    assert result.exit_code == 2
    assert "is not UTF-8 text: invalid start byte at byte 3" in result.stderr


class TestInspect:
    def test_memory(self, run: Run, book: Path) -> None:
        values = json.loads(run("inspect", book, "--verify", "--json").stdout)
        assert values["kind"] == "memory"
        assert (values["pages"], values["page_chunks"], values["pages_verified"]) == (40, 4, True)

    def test_damaged_memory(self, run: Run, book: Path) -> None:
        pages = next(book.glob("pages-*"))
        content = bytearray(pages.read_bytes())
        content[-100] ^= 1
        pages.write_bytes(content)
        assert run("inspect", book).exit_code == 0  # opening does not read pages
        result = run("inspect", book, "--verify")
        assert result.exit_code == 2
        assert "checksum" in result.stderr

    def test_model(self, run: Run, id_model: Path) -> None:
        values = json.loads(run("inspect", id_model, "--json").stdout)
        assert (values["kind"], values["csa_layers"], values["hca_layers"]) == ("model", 2, 1)
        assert values["weight_bytes"] > 0
        assert "csa layers" in run("inspect", id_model).stdout

    def test_indexer(self, run: Run, id_model: Path, tmp_path: Path) -> None:
        engine = flashmem.Engine.from_pretrained(id_model, device="cpu")
        engine.indexer.save_pretrained(tmp_path / "indexer")
        values = json.loads(run("inspect", tmp_path / "indexer", "--json").stdout)
        assert (values["kind"], values["layers"]) == ("memory indexer", [0, 1])

    def test_neither(self, run: Run, tmp_path: Path) -> None:
        for path, message in ((tmp_path, "is no memory"), (tmp_path / "x", "nothing at")):
            result = run("inspect", path)
            assert result.exit_code == 2
            assert message in result.stderr.replace("\n", " ")
