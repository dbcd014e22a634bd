"""Published dumps become shards; a dump that would run code is refused before it does."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import flashmem
from flashmem.capture.dumps import ConvertConfig, convert, load_dump
from flashmem.capture.format import ShardReader
from support.shard_cases import FIRST, GEOMETRY, TOKENS, make_dump

CONFIG = ConvertConfig(tau=8, observe=3, queries=20, vote_layers=2)


def write(directory: Path, *dumps: object) -> Path:
    directory.mkdir(exist_ok=True)
    for index, dump in enumerate(dumps):
        (directory / f"doc_{index:05d}.pkl").write_bytes(pickle.dumps(dump))
    return directory


def test_a_dump_becomes_a_document(tmp_path: Path) -> None:
    dump = make_dump()
    events: list[tuple[str, str]] = []
    source = write(tmp_path / "dumps", dump, make_dump(1))
    found = convert(source, tmp_path / "shards", GEOMETRY, CONFIG, lambda rid, what: events.append((rid, what)))
    assert found == (2, 0) and events == [("doc_00000", "written"), ("doc_00001", "written")]
    reader = ShardReader(tmp_path / "shards")
    reader.check()
    assert (reader.meta.layers, reader.meta.labels, reader.meta.dtype) == ((0, 2), (), "bfloat16")
    document = reader[0]
    assert document.positions.tolist() == list(range(FIRST, FIRST + TOKENS - 1))
    assert document.tokens == FIRST + TOKENS and document.mass == {} and document.evidence is None
    pointers = dump["label_pointers"].tolist()
    for query, position in enumerate(document.positions.tolist()):
        most: dict[int, int] = {}
        for token in range(position + 1 - FIRST, min(position + 9 - FIRST, TOKENS)):
            for label in range(pointers[token], pointers[token + 1]):
                chunk, score = int(dump["label_indices"][label]), int(dump["label_scores"][label])
                most[chunk] = max(most.get(chunk, 0), score)
        chunks, values = document.vote.row(query)
        assert dict(zip(chunks.tolist(), values.tolist(), strict=True)) == most
        seen = int(document.observed[query])
        assert seen == min(3, query + 1)
        for csa in (0, 2):
            wanted = dump[f"hidden_layer_{csa}"][query + 1 - seen : query + 1]
            assert torch.equal(document.hidden[csa][query, 3 - seen :], wanted)
    assert torch.equal(document.rows[2], dump["compk_layer_2"][: (FIRST + TOKENS) // 4])
    assert convert(source, tmp_path / "shards", GEOMETRY, CONFIG) == (0, 2)


class Malicious:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.target, "w"))


class HiddenInStorage:
    def __init__(self, target: str) -> None:
        buffer = io.BytesIO()
        torch.save(Malicious(target), buffer)
        self.data = buffer.getvalue()

    def __reduce__(self) -> tuple[Any, ...]:
        return (torch.storage._load_from_bytes, (self.data,))


@pytest.mark.parametrize("kind", [Malicious, HiddenInStorage])
def test_code_in_a_dump_does_not_run(tmp_path: Path, kind: Any) -> None:
    target = tmp_path / "owned"
    source = write(tmp_path / "dumps", make_dump() | {"extra": kind(str(target))})
    with pytest.raises(ValueError, match=r"doc_00000\.pkl: refused: .*open"):
        convert(source, tmp_path / "shards", GEOMETRY, CONFIG)
    assert not target.exists() and not (tmp_path / "shards").exists()
    pickle.loads((source / "doc_00000.pkl").read_bytes())  # noqa: S301 (the trap works where it is not refused)
    assert target.exists()


@pytest.mark.parametrize("value", [Path("x"), io.BytesIO(), torch.nn.Linear(1, 1), torch.float32, range(3)])
def test_other_classes_are_named(tmp_path: Path, value: object) -> None:
    source = write(tmp_path / "dumps", {"x": value})
    with pytest.raises(ValueError, match=r"refused: it asks for \w+(\.\w+)+; a dump holds tensors"):
        load_dump(source / "doc_00000.pkl")


def test_damaged_dumps_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "dumps", make_dump())
    path = source / "doc_00000.pkl"
    good = path.read_bytes()
    for bad in (b"", good[: len(good) // 2], b"not a pickle", good[:-1]):
        path.write_bytes(bad)
        with pytest.raises(flashmem.DamagedError, match=r"doc_00000\.pkl is damaged"):
            load_dump(path)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="not a dict"):
        load_dump(path)


def test_dumps_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    good = make_dump()
    bad: list[tuple[dict[str, Any], str]] = [
        ({"compk_layer_2": good["compk_layer_2"][:10]}, "second pass"),
        ({"compk_layer_0": good["compk_layer_0"][:, :19]}, "rows.l0"),
        ({"positions_layer_2": good["positions_layer_2"] + 1}, "positions of CSA index 2"),
        ({"hidden_layer_2": good["hidden_layer_2"][:-1]}, "hidden states of CSA index 2"),
        ({"hidden_layer_2": good["hidden_layer_2"][:, :5]}, "hidden.l2"),
        ({"label_pointers": good["label_pointers"][:-1]}, "pointers"),
        ({"label_scores": good["label_scores"][:-1]}, "pointers"),
        ({"hidden_layer_7": good["hidden_layer_2"]}, "CSA indices below 3"),
    ]
    for number, (changes, match) in enumerate(bad):
        source = write(tmp_path / f"dumps{number}", good | changes)
        with pytest.raises(ValueError, match=match):
            convert(source, tmp_path / f"shards{number}", GEOMETRY, CONFIG)
    del good["label_scores"]
    with pytest.raises(ValueError, match="lacks label_scores"):
        convert(write(tmp_path / "dumps", good), tmp_path / "shards", GEOMETRY, CONFIG)
    with pytest.raises(ValueError, match="no hidden states"):
        convert(write(tmp_path / "dumps", {}), tmp_path / "shards", GEOMETRY, CONFIG)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no doc_"):
        convert(tmp_path / "none", tmp_path / "shards", GEOMETRY, CONFIG)
