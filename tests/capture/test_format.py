"""Shards: what is written is read back, nothing half-written or damaged passes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flashmem
from flashmem.capture.format import MANIFEST, Csr, Document, ShardReader, ShardWriter, file_name
from support.shard_cases import GEOMETRY, make_document, make_meta


def assert_same(one: Document, other: Document) -> None:
    for item in dataclasses.fields(Document):
        mine, theirs = (getattr(document, item.name) for document in (one, other))
        assert_equal(mine, theirs)


def assert_equal(mine: Any, theirs: Any) -> None:
    if isinstance(mine, torch.Tensor):
        assert mine.dtype is theirs.dtype and torch.equal(mine, theirs)
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_equal(mine[key], theirs[key])
    elif isinstance(mine, Csr):
        for item in dataclasses.fields(Csr):
            assert_equal(getattr(mine, item.name), getattr(theirs, item.name))
    else:
        assert mine == theirs


def write(directory: Path, *documents: Document, **meta: Any) -> None:
    with ShardWriter(directory, make_meta(**meta)) as writer:
        for document in documents:
            writer.write(document)


def test_round_trip(tmp_path: Path) -> None:
    documents = [make_document(), make_document("bare"), make_document("é", positions=(21,))]
    write(tmp_path, *documents)
    reader = ShardReader(tmp_path)
    reader.check()
    assert reader.meta.to_mapping() == make_meta().to_mapping() and reader.meta.geometry == GEOMETRY
    assert len(reader) == 3 and reader.rids == ("a/b 1", "bare", "é")
    for wanted, found in zip(documents, reader, strict=True):
        assert_same(wanted, found)
    assert_same(reader["bare"], reader[1])
    assert [entry.queries for entry in reader.entries] == [3, 3, 1]


def test_several_directories_are_read_as_one(tmp_path: Path) -> None:
    first, second = make_document("one"), make_document("two", positions=(21,))
    write(tmp_path / "a", first)
    write(tmp_path / "b", second)
    reader = ShardReader(tmp_path / "a", tmp_path / "b")
    reader.check()
    assert reader.rids == ("one", "two") and reader.directory == tmp_path / "a"
    for wanted, found in zip((first, second), reader, strict=True):
        assert_same(wanted, found)
    with pytest.raises(ValueError, match="'one', which"):
        ShardReader(tmp_path / "a", tmp_path / "a")


def test_directories_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", make_document("one"))
    with ShardWriter(tmp_path / "b", replace(make_meta(), vote_p=0.7)) as writer:
        writer.write(make_document("two"))
    with pytest.raises(ValueError, match="differ in vote_p"):
        ShardReader(tmp_path / "a", tmp_path / "b")


def test_empty_shards_can_be_read(tmp_path: Path) -> None:
    write(tmp_path)
    reader = ShardReader(tmp_path)
    reader.check()
    assert len(reader) == 0 and list(reader) == []


def test_reading_maps_the_file(tmp_path: Path) -> None:
    write(tmp_path, make_document())
    document = ShardReader(tmp_path)[0]
    maps = Path("/proc/self/maps").read_text()
    assert file_name(document.rid) in maps


def test_resume_skips_what_is_whole_and_rewrites_what_is_not(tmp_path: Path) -> None:
    write(tmp_path, make_document("one"), make_document("two"), make_document("three"))
    (tmp_path / file_name("three")).unlink()
    path = tmp_path / file_name("two")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (tmp_path / "doc-four.tmp").write_bytes(b"half")
    with ShardWriter(tmp_path, make_meta()) as writer:
        assert [writer.holds(rid, "s1") for rid in ("one", "two", "three", "four")] == [True, False, False, False]
        with pytest.raises(ValueError, match="'one' made from another prompt"):
            writer.holds("one", "s2")
        writer.write(make_document("two"))
    assert not list(tmp_path.glob("*.tmp"))
    reader = ShardReader(tmp_path)
    reader.check()
    assert reader.rids == ("one", "two")


@pytest.mark.parametrize("name", ["model", "layers", "tau", "observe", "settings"])
def test_another_meta_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    other = {"model": "x", "layers": (1,), "tau": 9, "observe": 4, "settings": {}}[name]
    with pytest.raises(ValueError, match=f"another {name}"):
        ShardWriter(tmp_path, make_meta(**{name: other}))


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path, make_meta()),
        pytest.raises(flashmem.FlashmemError, match="another process writes"),
    ):
        ShardWriter(tmp_path, make_meta())
    ShardWriter(tmp_path, make_meta()).close()


def test_foreign_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="something other than shards"):
        ShardWriter(tmp_path, make_meta())
    with pytest.raises(ValueError, match="holds no shards"):
        ShardReader(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"format": "flashmem-memory"}))
    with pytest.raises(ValueError, match="not the manifest of flashmem shards"):
        ShardReader(tmp_path)


def test_damage_is_found(tmp_path: Path) -> None:
    write(tmp_path, make_document("one"))
    path, manifest = tmp_path / file_name("one"), tmp_path / MANIFEST
    good, text = path.read_bytes(), manifest.read_text()
    path.write_bytes(good[:-9] + b"x" + good[-8:])
    with pytest.raises(flashmem.DamagedError, match="checksum"):
        ShardReader(tmp_path).check()
    path.write_bytes(good[:-1])
    with pytest.raises(flashmem.DamagedError, match="bytes long"):
        ShardReader(tmp_path)
    path.unlink()
    with pytest.raises(flashmem.DamagedError, match="missing"):
        ShardReader(tmp_path)
    path.write_bytes(good)
    for bad, match in (
        (text[:50], "damaged"),
        (text.replace('"queries": 3', '"queries": 4'), "checksum"),
        (text.replace('"version": 1', '"version": 2'), "version 2"),
    ):
        manifest.write_text(bad)
        with pytest.raises(flashmem.DamagedError, match=match):
            ShardReader(tmp_path)


def test_contradictory_documents_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    good = make_document()
    late = Csr.from_rows([(torch.tensor([n]), torch.ones(1)) for n in good.num_chunks.tolist()])
    nothing = (torch.empty(0), torch.empty(0))
    twice = Csr.from_rows([nothing, (torch.tensor([0, 0]), torch.ones(2)), nothing])
    bad: list[tuple[dict[str, Any], str]] = [
        ({"positions": good.positions.flip(0)}, "ascend"),
        ({"positions": good.positions + 4}, "within tokens"),
        ({"num_chunks": good.num_chunks + 1}, "contradicts"),
        ({"observed": good.observed * 0}, "observed"),
        ({"hidden": {0: good.hidden[0]}}, "layers"),
        ({"hidden": {csa: x.float() for csa, x in good.hidden.items()}}, "hidden"),
        ({"rows": {csa: x[1:] for csa, x in good.rows.items()}}, "rows"),
        ({"mass": {}}, "label layers"),
        ({"vote": late}, "visible"),
        ({"vote": twice}, "ascend within a row"),
        ({"rid": ""}, "id must have"),
        ({"rid": "x" * 300}, "id must have"),
    ]
    with ShardWriter(tmp_path, make_meta()) as writer:
        for changes, match in bad:
            with pytest.raises(ValueError, match=match):
                writer.write(dataclasses.replace(good, **changes))
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_csr_rows_and_dense() -> None:
    csr = Csr.from_rows([(torch.tensor([1, 3]), torch.tensor([0.5, 2])), (torch.empty(0), torch.empty(0))])
    csr.check(torch.tensor([4, 0]))
    assert csr.dense(5).tolist() == [[0, 0.5, 0, 2, 0], [0, 0, 0, 0, 0]]
    assert [x.tolist() for x in csr.row(0)] == [[1, 3], [0.5, 2]] and len(csr.row(1)[0]) == 0
