"""Loaders of published benchmarks on fixtures of our own in their formats; missing files are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashmem.evaluation.items import ItemSet
from flashmem.evaluation.suites import choose, official

CHOICE = {
    "_id": "q1", "domain": "Stories", "sub_domain": "Short", "difficulty": "easy", "length": "short",
    "question": "Who kept the gate?", "choice_A": "Ada", "choice_B": "Ben", "choice_C": "Cleo", "choice_D": "Dov",
    "answer": "B", "context": "Ben kept the gate. $Q$ is no place to fill here.",
}  # fmt: skip
PROMPT = "Read.\n<$DOC$>\nAsked: $Q$ A $C_A$ B $C_B$ C $C_C$ D $C_D$ Say which."
MEMORY = {
    "question_id": "m1", "question_type": "knowledge-update", "question": "Where do I live?", "answer": "Bremen",
    "question_date": "2023/05/30", "haystack_dates": ["2023/05/02", "2023/05/01"],
    "haystack_session_ids": ["s2", "s1"], "answer_session_ids": ["s2"],
    "haystack_sessions": [
        [{"role": "user", "content": "I moved to Bremen.", "has_answer": True}, {"role": "assistant", "content": "Oh"}],
        [{"role": "user", "content": "I live in Kiel."}],
    ],
}  # fmt: skip
MESSAGES = [
    {"role": "user", "content": "write a poem about rain"},
    {"role": "assistant", "content": "rain falls"},
    {"role": "user", "content": "Prepend k7f to the first poem about rain."},
]
RULER = {
    "context": "Long text.", "question": "What is it?", "answer_prefix": " It is", "answer": ["7", "8"],
    "task": "niah_multivalue", "max_new_tokens": 128,
}  # fmt: skip


def write(path: Path, *rows: dict[str, Any], lines: bool = False) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(list(rows))
    path.write_text(text)


def text(items: ItemSet, index: int = 0) -> str:
    content = items.documents[index].content
    assert isinstance(content, str)
    return content


def test_longbench_v2(tmp_path: Path) -> None:
    write(tmp_path / "data.json", CHOICE, CHOICE | {"_id": "q2", "length": "long", "answer": "C"})
    (tmp_path / "0shot.txt").write_text(PROMPT)
    items = official.load_longbench_v2(tmp_path)
    assert text(items) == "Read.\n<Ben kept the gate. $Q$ is no place to fill here."
    assert len(items.documents) == 1  # both ask about the same text
    assert items.items[0].question == ">\nAsked: Who kept the gate? A Ada B Ben C Cleo D Dov Say which."
    assert [(item.task, item.answers, item.scorer) for item in items.items] == [
        ("short", ("B",), "choice"), ("long", ("C",), "choice"),
    ]  # fmt: skip
    assert set(items.made["files_sha256"]) == {"data.json", "0shot.txt"}


def test_longmemeval(tmp_path: Path) -> None:
    write(tmp_path / "longmemeval_s.json", MEMORY, MEMORY | {"question_id": "m2_abs"})
    items = official.load_longmemeval(tmp_path)
    history = text(items)
    assert history.index("Kiel") < history.index("Bremen")  # in order of date
    ((first, last),) = items.items[0].evidence
    assert history[first:last] == "user: I moved to Bremen.\n"
    assert "has_answer" not in history
    assert items.items[0].question == "\n\nToday is 2023/05/30. Where do I live?\nShort answer:"
    assert [item.task for item in items.items] == ["knowledge-update", "abstention"]
    assert items.suite == "longmemeval-s"


def test_mrcr(tmp_path: Path) -> None:
    row = {
        "prompt": json.dumps(MESSAGES), "answer": "k7frain falls", "random_string_to_prepend": "k7f", "n_needles": 2,
        "n_chars": 70_000,
    }  # fmt: skip
    write(tmp_path / "mrcr.jsonl", row, lines=True)
    items = official.load_mrcr(tmp_path)
    assert text(items) == "User: write a poem about rain\n\nAssistant: rain falls\n\n"
    (item,) = items.items
    assert item.question == "User: Prepend k7f to the first poem about rain.\n\nAssistant:"
    assert (item.task, item.length, item.extra["prefix"]) == ("2 needles", 32_768, "k7f")


def test_ruler_rows(tmp_path: Path) -> None:
    write(tmp_path / "4096.jsonl", RULER, RULER | {"task": "qa_1"}, lines=True)
    write(tmp_path / "16384.jsonl", RULER, lines=True)
    items = official.load_ruler(tmp_path)
    assert [(item.length, item.task, item.scorer) for item in items.items] == [
        (4096, "niah_multivalue", "all"), (4096, "qa_1", "part"), (16_384, "niah_multivalue", "all"),
    ]  # fmt: skip
    assert items.items[0].answers == ("7", "8") and items.items[0].extra == {"answer_prefix": " It is"}
    assert len(items.documents) == 1


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("longbench-v2", r"data\.json is missing: get data\.json of THUDM/LongBench-v2"),
        ("longmemeval", r"longmemeval_s\.json is missing: get longmemeval_s\.json of xiaowu0162/longmemeval"),
        ("longmemeval-m", r"longmemeval_m\.json is missing"),
        ("mrcr", r"mrcr\.jsonl is missing: get mrcr\.jsonl of openai/mrcr"),
        ("ruler-files", r"put the splits of simonjegou/ruler there as JSON lines"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, suite: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        choose.make(suite, lengths=[4096], n=1, data=tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match="name their folder with --data"):
        choose.make(suite, lengths=[4096], n=1)


def test_files_of_another_shape_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "longmemeval_s.json", {"question_id": "m1"})
    with pytest.raises(ValueError, match="a row lacks question_type, question, answer"):
        official.load_longmemeval(tmp_path)
    (tmp_path / "longmemeval_s.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        official.load_longmemeval(tmp_path)
    (tmp_path / "mrcr.jsonl").write_text('{"prompt": []}\n{')
    with pytest.raises(ValueError, match="lacks answer"):
        official.load_mrcr(tmp_path)
    write(tmp_path / "data.json", CHOICE)
    (tmp_path / "0shot.txt").write_text("no places")
    with pytest.raises(ValueError, match=r"no place \$DOC\$"):
        official.load_longbench_v2(tmp_path)


def test_options_of_other_suites_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown suite 'chess'"):
        choose.make("chess", lengths=[4096], n=1)
    with pytest.raises(ValueError, match="suite mrcr takes no --corpus, --tasks"):
        choose.make("mrcr", lengths=[4096], n=1, data=tmp_path, corpus=tmp_path, tasks=["x"])
