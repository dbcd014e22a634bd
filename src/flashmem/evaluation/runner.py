"""Run every policy over every item, on the same prefill, and append one line per answer to a samples file.

Questions of a document are decoded together, in groups that depend on the item set alone: a run that was interrupted
and goes on gives what an uninterrupted one gives. The first answer token follows from the question's prefill and is
therefore the same under every policy.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from ..engine import Engine
from .asking import Group, answer_conversation, answer_group, read_document
from .environment import environment, tokenizer_digest
from .items import Document, Item, ItemSet
from .policies import Contender
from .samples import read_samples, sample_rows, samples_name

RUN_FILE, ENVIRONMENT_FILE = "run.json", "environments.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How items are run; what is run is the engine's and the item set's."""

    batch: int = 16
    """Questions of one document that are decoded together."""
    memories: str | None = None
    """Directory in which documents that were read are kept for later runs; None keeps them only while needed."""
    shard: tuple[int, int] = (0, 1)
    """(i, n): this process runs every n-th document from the i-th on."""
    limit: int | None = None
    """Run only so many items of each task and length."""
    chat: bool = False
    """Put documents and questions into the tokenizer's chat template."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        index, count = self.shard
        if not 0 <= index < count:
            raise ValueError(f"shard {index}/{count}: the index must lie in 0..{count - 1}")


Progress = Callable[[str, int, int], None]
"""Told (what, done, total) after every group of questions ("items") and every prefill chunk ("tokens")."""


def run_items(
    engine: Engine,
    items: ItemSet,
    contenders: Sequence[Contender],
    out: str | Path,
    config: RunConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Run what is missing in `out`; returns the samples file of this shard.

    Raises ValueError where `out` holds samples of another model, item set or setting.
    """
    config = config or RunConfig()
    out, tell = Path(out), progress or (lambda *_: None)
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, describe(engine, items, contenders, config))
    _note_environment(out, environment(engine))
    path = out / samples_name(config.shard)
    done = {(row["id"], f"{row['policy']}#{row['seed']}") for row in read_samples(path, mend=True)}
    work = list(_work(items, config))
    total, finished = sum(len(group) for _, groups in work for group in groups), 0
    with ExitStack() as stack:
        if config.memories is None:
            memories = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flashmem-eval-")))
        else:
            memories = Path(config.memories)
        file = stack.enter_context(path.open("a", encoding="utf-8"))
        for document, groups in work:
            missing = [group for group in groups if not _complete(group, contenders, done)]
            finished += sum(len(group) for group in groups if group not in missing)
            tell("items", finished, total)
            if not missing:
                continue
            with read_document(
                engine, document, memories, keep=config.memories is not None, chat=config.chat,
                tell=lambda read, of: tell("tokens", read, of),
            ) as reading:  # fmt: skip
                for group in missing:
                    started = time.perf_counter()
                    ask = answer_conversation if group[0].conversation is not None else answer_group
                    answers, references = ask(engine, reading, group, contenders)
                    seconds = (time.perf_counter() - started) / len(group)
                    for row in sample_rows(engine, reading, group, contenders, answers, references, seconds):
                        if (row["id"], f"{row['policy']}#{row['seed']}") not in done:
                            _append(file, row)
                    finished += len(group)
                    tell("items", finished, total)
    return path


def describe(engine: Engine, items: ItemSet, contenders: Sequence[Contender], config: RunConfig) -> dict[str, Any]:
    """What makes two runs the same: their samples may stand in one directory."""
    lsa = asdict(engine.config)
    # where bytes wait changes no answer
    for name in ("disk_path", "host_budget_bytes", "disk_budget_bytes", "history_budget_bytes"):
        lsa.pop(name)
    return {
        "items_sha256": items.sha256,
        "suite": items.suite,
        "made": dict(items.made),
        "model_name": Path(engine.backbone.model.name_or_path).name,
        "model": engine.fingerprint(),
        "tokenizer_sha256": tokenizer_digest(engine.tokenizer),
        "indexer": engine.indexer.fingerprint(),
        "dtype": str(engine.backbone.dtype).removeprefix("torch."),
        "lsa": lsa | {"policy": engine.policy.name},
        "policies": [asdict(contender) for contender in contenders],
        "batch": config.batch,
        "limit": config.limit,
        "chat": config.chat,
        "samples": len(contenders) * sum(len(asked) for _, asked in limited(items, config.limit)),
    }


def _claim(out: Path, description: Mapping[str, Any]) -> None:
    """Write what this run is, or raise where the directory holds another one."""
    path = out / RUN_FILE
    values = json.loads(json.dumps(description))
    if not path.is_file():
        _write_json(path, values)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if differing := sorted(name for name in values.keys() | found.keys() if values.get(name) != found.get(name)):
        raise ValueError(f"{out} holds samples of another run: {', '.join(differing)} differ; choose another directory")


def _note_environment(out: Path, values: Mapping[str, Any]) -> None:
    """Add the environment of this process to those that made samples here, where it is a new one."""
    path = out / ENVIRONMENT_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if dict(values) not in found:
        _write_json(path, [*found, values])


def _write_json(path: Path, values: Any) -> None:
    """At once: other shards read it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _append(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def _work(items: ItemSet, config: RunConfig) -> Iterator[tuple[Document, list[Group]]]:
    """Documents of this shard, each with its items in groups: conversations, and questions of one task in batches."""
    for document, kept in limited(items, config.limit)[config.shard[0] :: config.shard[1]]:
        alike: dict[tuple[str | None, str | None], list[Item]] = {}
        for item in kept:
            name = (item.conversation, None) if item.conversation is not None else (None, item.task)
            alike.setdefault(name, []).append(item)
        groups: list[Group] = []
        for (conversation, _), mine in alike.items():
            size = len(mine) if conversation is not None else config.batch
            groups += [tuple(mine[at : at + size]) for at in range(0, len(mine), size)]
        yield document, groups


def limited(items: ItemSet, limit: int | None) -> list[tuple[Document, list[Item]]]:
    """Documents with the first `limit` items of each task and length."""
    taken: dict[tuple[str, int], int] = {}
    made: list[tuple[Document, list[Item]]] = []
    for document, asked in items.by_document():
        kept = []
        for item in asked:
            cell = item.task, item.length
            taken[cell] = taken.get(cell, 0) + 1
            if limit is None or taken[cell] <= limit:
                kept.append(item)
        if kept:
            made.append((document, kept))
    return made


def _complete(group: Group, contenders: Sequence[Contender], done: set[tuple[str, str]]) -> bool:
    return all((item.id, contender.key) in done for item in group for contender in contenders)


__all__ = ["ENVIRONMENT_FILE", "RUN_FILE", "Progress", "RunConfig", "describe", "limited", "run_items"]
