"""Items from the files of published benchmarks, which are not ours to ship.

Each loader takes the folder that the files were put into, and says which file it misses and where it is to be had.
Texts stay as they are; what a benchmark's own prompt says is read from its own file, or worded by us where noted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..items import Document, Item, ItemSet

LONGMEMEVAL_TOKENS, LONGBENCH_TOKENS, MRCR_TOKENS = 128, 128, 4096
"""Tokens of an answer, at most."""
CHARACTERS_PER_TOKEN = 4  # of English, about: bins of MRCR have to be named before a tokenizer is known


def load_longbench_v2(folder: str | Path) -> ItemSet:
    """LongBench-v2: `data.json` of the data set, and the repository's `prompts/0shot.txt` with its places to fill.

    The table's rows are its classes of length: short, medium and long.
    """
    where = "of THUDM/LongBench-v2 (the data set, and prompts/0shot.txt of the repository THUDM/LongBench)"
    data, prompt = _need(folder, "data.json", where), _need(folder, "0shot.txt", where)
    before, mark, after = prompt.read_text(encoding="utf-8").partition("$DOC$")
    if not mark:
        raise ValueError(f"{prompt} is not LongBench-v2's prompt: it has no place $DOC$ for the text")
    documents: dict[str, Document] = {}
    items: list[Item] = []
    for row in _json(data):
        _fields(data, row, "_id", "length", "question", "answer", "context", "difficulty", "domain")
        document = _document(before + str(row["context"]).strip())
        documents.setdefault(document.id, document)
        question = after
        for place, name in (("$Q$", "question"), *((f"$C_{letter}$", f"choice_{letter}") for letter in "ABCD")):
            question = question.replace(place, str(row[name]).strip())
        items.append(
            Item(
                id=str(row["_id"]),
                task=str(row["length"]),
                length=0,
                document=document.id,
                question=question,
                answers=(str(row["answer"]),),
                scorer="choice",
                max_new_tokens=LONGBENCH_TOKENS,
                extra={"difficulty": row["difficulty"], "domain": row["domain"]},
            )
        )
    return _set("longbench-v2", documents, items, [data, prompt])


def load_longmemeval(folder: str | Path, name: str = "longmemeval_s.json") -> ItemSet:
    """LongMemEval S or M: the history as dated sessions in order of date, then the question. The words are ours.

    Evidence is every turn that the file marks `has_answer`. Rows are question types; abstention has its own.
    """
    data = _need(folder, name, "of xiaowu0162/longmemeval (longmemeval_s.json or longmemeval_m.json)")
    documents: dict[str, Document] = {}
    items: list[Item] = []
    for row in _json(data):
        _fields(data, row, "question_id", "question_type", "question", "answer", "haystack_sessions", "haystack_dates")
        text, evidence = _history(row)
        document = _document(text)
        documents.setdefault(document.id, document)
        abstain = str(row["question_id"]).endswith("_abs")
        items.append(
            Item(
                id=str(row["question_id"]),
                task="abstention" if abstain else str(row["question_type"]),
                length=0,
                document=document.id,
                answers=(str(row["answer"]),),
                scorer="contains",
                question=f"\n\nToday is {row.get('question_date', 'unknown')}. {row['question']}\nShort answer:",
                max_new_tokens=LONGMEMEVAL_TOKENS,
                evidence=tuple(evidence),
                extra={"question": row["question"], "question_type": row["question_type"], "abstain": abstain},
            )
        )
    return _set(Path(name).stem.replace("_", "-"), documents, items, [data])


def load_mrcr(folder: str | Path, name: str = "mrcr.jsonl") -> ItemSet:
    """OpenAI MRCR as JSON lines with the data set's columns; rows are numbers of needles, binned by length.

    A conversation with many similar requests; asked for is one of the answers, after a given random string.
    """
    data = _need(folder, name, "of openai/mrcr, its parquet files written as JSON lines")
    documents: dict[str, Document] = {}
    items: list[Item] = []
    for index, row in enumerate(_lines(data)):
        _fields(data, row, "prompt", "answer", "random_string_to_prepend", "n_needles")
        messages = json.loads(row["prompt"]) if isinstance(row["prompt"], str) else row["prompt"]
        said = [f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages]
        document = _document("".join(said[:-1]))
        documents.setdefault(document.id, document)
        characters = int(row.get("n_chars") or sum(map(len, said)))
        items.append(
            Item(
                id=f"{index}",
                task=f"{row['n_needles']} needles",
                length=_bin(characters),
                document=document.id,
                question=said[-1] + "Assistant:",
                answers=(str(row["answer"]),),
                scorer="mrcr",
                max_new_tokens=MRCR_TOKENS,
                extra={"prefix": row["random_string_to_prepend"]},
            )
        )
    return _set("mrcr", documents, items, [data])


def load_ruler(folder: str | Path) -> ItemSet:
    """RULER rows as kvpress's data set has them: `<length>.jsonl` with context, question, answer_prefix, answer, task.

    `max_new_tokens` is a column too. Tasks that start with `qa` take one of several references, all others want all.
    """
    folder = Path(folder)
    files = sorted((path for path in folder.glob("*.jsonl") if path.stem.isdecimal()), key=lambda path: int(path.stem))
    if not files:
        raise ValueError(
            f"{folder} holds no RULER rows: put the splits of simonjegou/ruler there as JSON lines, one file per "
            "length, named 4096.jsonl, 8192.jsonl ..."
        )
    documents: dict[str, Document] = {}
    items: list[Item] = []
    for path in files:
        for index, row in enumerate(_lines(path)):
            _fields(path, row, "context", "question", "answer_prefix", "answer", "task", "max_new_tokens")
            document = _document(str(row["context"]))
            documents.setdefault(document.id, document)
            references = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            items.append(
                Item(
                    id=f"{path.stem}/{index}",
                    task=str(row["task"]),
                    length=int(path.stem),
                    document=document.id,
                    question=str(row["question"]),
                    answers=tuple(map(str, references)),
                    scorer="part" if str(row["task"]).startswith("qa") else "all",
                    max_new_tokens=int(row["max_new_tokens"]),
                    extra={"answer_prefix": row["answer_prefix"]},
                )
            )
    return _set("ruler", documents, items, files)


LOADERS: Mapping[str, Callable[[Path], ItemSet]] = {
    "longbench-v2": load_longbench_v2,
    "longmemeval": load_longmemeval,
    "longmemeval-m": lambda folder: load_longmemeval(folder, "longmemeval_m.json"),
    "mrcr": load_mrcr,
    "ruler-files": load_ruler,
}


def _history(row: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """Sessions in order of date as text, and the characters of the turns that hold the answer."""
    sessions = sorted(zip(row["haystack_dates"], row["haystack_sessions"], strict=True), key=lambda pair: str(pair[0]))
    text = "These are earlier conversations with a user. A question about them follows.\n"
    evidence: list[tuple[int, int]] = []
    for number, (date, turns) in enumerate(sessions, 1):
        text += f"\nConversation {number}, {date}\n"
        for turn in turns:
            said = f"{turn['role']}: {str(turn['content']).strip()}\n"
            if turn.get("has_answer"):
                evidence.append((len(text), len(text) + len(said)))
            text += said
    return text, evidence


def _need(folder: str | Path, name: str, where: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"{path} is missing: get {name} {where}, and put it into {Path(folder)}")
    return path


def _json(path: Path) -> list[dict[str, Any]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, list):
        raise ValueError(f"{path} holds no list of questions")
    return values


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error


def _fields(path: Path, row: Mapping[str, Any], *names: str) -> None:
    if missing := [name for name in names if name not in row]:
        raise ValueError(f"{path}: a row lacks {', '.join(missing)}")


def _document(text: str) -> Document:
    return Document(id=hashlib.sha256(text.encode()).hexdigest()[:16], content=text)


def _set(suite: str, documents: Mapping[str, Document], items: list[Item], files: list[Path]) -> ItemSet:
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return ItemSet(suite=suite, documents=tuple(documents.values()), items=tuple(items), made={"files_sha256": sums})


def _bin(characters: int) -> int:
    """The next power of two of tokens, from 4,096."""
    size = 4096
    while size < characters / CHARACTERS_PER_TOKEN:
        size *= 2
    return size


__all__ = ["LOADERS", "load_longbench_v2", "load_longmemeval", "load_mrcr", "load_ruler"]
