"""capture over a real model: shards, their summary, bad input in one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from cli.conftest import Run
from flashmem.capture.format import ShardReader
from support.shard_cases import CONFIG, GEOMETRY, make_dump

SETTINGS = ("--tau", 8, "--observe", 2, "--queries-per-doc", 5, "--max-new-tokens", 12, "--vote-layers", 1)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    records = [
        {"id": "one", "prompt": "The key is 42. What is the key?", "response": " It is 42.", "evidence": [[4, 13]]},
        {"id": "two", "prompt": "Tell me more.", "tail": 3},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_capture_writes_shards_and_goes_on(run: Run, text_model: Path, prompts: Path, tmp_path: Path) -> None:
    args = ("capture", text_model, prompts, "-o", tmp_path / "shards", *SETTINGS, "--device", "cpu")
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    assert "2 documents, 10 queries" in result.stdout and "2 written now, 0 there before" in result.stdout
    reader = ShardReader(tmp_path / "shards")
    reader.check()
    assert reader["one"].evidence is not None and reader["one"].evidence.row(0)[0].tolist() == [1, 2, 3]
    assert reader["two"].tokens == len("Tell me more.") + 12 and reader["two"].prompt_tokens == 10
    values = json.loads(run(*args, "--json", "--batch", 2).stdout)
    assert values["run"]["there"] == 2 and values["run"]["written"] == 0 and values["total"]["documents"] == 2


def test_dumps_are_converted(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "dumps").mkdir()
    (tmp_path / "dumps" / "doc_00003.pkl").write_bytes(pickle.dumps(make_dump()))
    result = run("capture", tmp_path, tmp_path / "dumps", "-o", tmp_path / "shards", "--layers", "0,2", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["run"] == {"written": 1, "there": 0}
    reader = ShardReader(tmp_path / "shards")
    assert reader.rids == ("doc_00003",) and reader.meta.geometry == GEOMETRY


def test_bad_input_is_one_line(run: Run, text_model: Path, prompts: Path, tmp_path: Path) -> None:
    shards = ("-o", tmp_path / "shards")
    cases = [
        ((text_model, prompts, *shards, "--layers", "a"), "names no CSA indices"),
        ((text_model, prompts, *shards, "--layers", "5"), "CSA indices must lie in 0..1"),
        ((text_model, prompts, *shards, "--tau", "0"), "tau must be at least 1"),
        ((text_model, tmp_path / "none.jsonl", *shards), "none.jsonl"),
        ((tmp_path, prompts, *shards), "no config.json"),
        ((text_model, text_model, *shards), "holds no doc_*.pkl"),
    ]
    for args, message in cases:
        result = run("capture", *args)
        assert result.exit_code == 2 and not result.stdout, args
        assert message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "shards").exists()
