"""What is asked: documents and items, frozen in a directory with checksums.

    manifest.json      format, version, suite, how it was made, checksums of the other two
    documents.jsonl    one document a line, read once and asked many times
    items.jsonl        one question a line

A document is text or token ids; its items are of the same kind. Places of evidence are token spans where it is ids,
character spans where it is text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..types import DamagedError

FORMAT, FORMAT_VERSION = "flashmem-items", 1
MANIFEST, DOCUMENTS, ITEMS = "manifest.json", "documents.jsonl", "items.jsonl"

Content = str | tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """What is read before the question."""

    id: str
    content: Content


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question about a document."""

    id: str
    task: str
    length: int
    """Nominal tokens of the document: the column of the table it belongs to."""
    document: str
    question: Content
    answers: tuple[str, ...]
    scorer: str
    """A name of `scorers.SCORERS`."""
    max_new_tokens: int
    evidence: tuple[tuple[int, int], ...] = ()
    """Spans [first, last) of the document that the answer needs, where known."""
    conversation: str | None = None
    """Items of one conversation are asked in their order, each after the answer to the one before."""
    target: Content | None = None
    """Where given nothing is generated: this continuation is scored (perplexity)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What a scorer or a report needs beyond this."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"item {self.id}: max_new_tokens must be at least 1, got {self.max_new_tokens}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemSet:
    """Documents with their items, in order."""

    suite: str
    documents: tuple[Document, ...]
    items: tuple[Item, ...]
    made: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the generator, or names and checksums of the official files."""
    sha256: str = ""
    """Of both files, as written; empty where the set has not been written."""

    def __post_init__(self) -> None:
        ids = [document.id for document in self.documents]
        if twice := _repeated(ids) or _repeated([item.id for item in self.items]):
            raise ValueError(f"{self.suite}: id {twice!r} occurs twice")
        if strays := sorted({item.document for item in self.items} - set(ids)):
            raise ValueError(f"{self.suite}: items ask about documents that are not there: {', '.join(strays[:3])}")

    def by_document(self) -> Iterator[tuple[Document, list[Item]]]:
        """Documents that are asked about, with their items."""
        asked: dict[str, list[Item]] = {document.id: [] for document in self.documents}
        for item in self.items:
            asked[item.document].append(item)
        for document in self.documents:
            if asked[document.id]:
                yield document, asked[document.id]


def write_items(directory: str | Path, items: ItemSet) -> ItemSet:
    """Freeze a set in a new or empty directory; returns it with its checksum."""
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty")
    directory.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Sequence[Document | Item]] = {DOCUMENTS: items.documents, ITEMS: items.items}
    for name, values in rows.items():
        with (directory / name).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(_plain(value), ensure_ascii=False) + "\n" for value in values)
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "suite": items.suite,
        "documents": len(items.documents),
        "items": len(items.items),
        "made": dict(items.made),
        "sha256": {name: _digest(directory / name) for name in (DOCUMENTS, ITEMS)},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return read_items(directory)


def read_items(directory: str | Path) -> ItemSet:
    """Read a frozen set. Raises ValueError where there is none, DamagedError where a checksum does not fit."""
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} holds no items: it has no {MANIFEST}; make some with `flashmem eval gen`")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT or manifest.get("version") != FORMAT_VERSION:
        raise DamagedError(f"{path} is not a manifest of {FORMAT} version {FORMAT_VERSION}")
    for name, wanted in manifest["sha256"].items():
        if _digest(directory / name) != wanted:
            raise DamagedError(f"{directory / name} is not the file that was frozen: its checksum differs")
    documents = tuple(Document(id=row["id"], content=_content(row["content"])) for row in _rows(directory / DOCUMENTS))
    items = tuple(_item(row) for row in _rows(directory / ITEMS))
    joined = "".join(manifest["sha256"][name] for name in (DOCUMENTS, ITEMS))
    return ItemSet(
        suite=manifest["suite"], documents=documents, items=items, made=manifest["made"],
        sha256=hashlib.sha256(joined.encode()).hexdigest(),
    )  # fmt: skip


def _item(row: dict[str, Any]) -> Item:
    known = {item.name for item in fields(Item)}
    if unknown := sorted(row.keys() - known):
        raise DamagedError(f"item {row.get('id')}: unknown fields {', '.join(unknown)}")
    row["question"], row["answers"] = _content(row["question"]), tuple(row["answers"])
    row["evidence"] = tuple((first, last) for first, last in row.get("evidence", ()))
    if row.get("target") is not None:
        row["target"] = _content(row["target"])
    return Item(**row)


def _plain(value: Document | Item) -> dict[str, Any]:
    """JSON values, without what is empty."""
    return {name: found for name, found in asdict(value).items() if found not in (None, (), {})}


def _content(value: str | list[int]) -> Content:
    return value if isinstance(value, str) else tuple(value)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _digest(path: Path) -> str:
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


__all__ = ["Content", "Document", "Item", "ItemSet", "read_items", "write_items"]
