"""Frozen items: what is read is what was written, and nothing else is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashmem.evaluation.items import Document, Item, ItemSet, read_items, write_items
from flashmem.types import DamagedError


def item(name: str, document: str = "d", **more: object) -> Item:
    values: dict[str, object] = {
        "id": name, "task": "t", "length": 4, "document": document, "question": (1, 2), "answers": ("a",),
        "scorer": "all", "max_new_tokens": 3,
    }  # fmt: skip
    return Item(**(values | more))  # type: ignore[arg-type]


def item_set() -> ItemSet:
    documents = (Document(id="d", content=(1, 2, 3)), Document(id="e", content="Größe"))
    items = (
        item("one", evidence=((0, 2), (2, 3)), extra={"kind": "x"}),
        item("two", "e", question="Was?", answers=("ß", "b"), conversation="c", target="t"),
    )
    return ItemSet(suite="s", documents=documents, items=items, made={"seed": 1})


def test_items_come_back_as_they_were(tmp_path: Path) -> None:
    made = item_set()
    written = write_items(tmp_path / "items", made)
    assert written == read_items(tmp_path / "items")
    assert (written.documents, written.items, written.made) == (made.documents, made.items, made.made)
    assert len(written.sha256) == 64
    assert write_items(tmp_path / "again", made).sha256 == written.sha256


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    write_items(tmp_path, item_set())
    path = tmp_path / "items.jsonl"
    path.write_text(path.read_text().replace('"a"', '"b"'))
    with pytest.raises(DamagedError, match=r"items\.jsonl is not the file that was frozen"):
        read_items(tmp_path)


def test_what_is_no_item_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="flashmem eval gen"):
        read_items(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(DamagedError, match="version 1"):
        read_items(tmp_path)
    with pytest.raises(ValueError, match="not empty"):
        write_items(tmp_path, item_set())


def test_ids_are_unique_and_documents_exist() -> None:
    documents = (Document(id="d", content=(1,)),)
    with pytest.raises(ValueError, match="'one' occurs twice"):
        ItemSet(suite="s", documents=documents, items=(item("one"), item("one")))
    with pytest.raises(ValueError, match="not there: e"):
        ItemSet(suite="s", documents=documents, items=(item("one", "e"),))
