"""One line of JSON per answer: `samples.jsonl`, or one file per shard."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..engine import Engine
from .asking import Answers, Group, Reading
from .decoding import Answer
from .items import Item
from .policies import Contender, Reference
from .scorers import score

log = logging.getLogger(__name__)

BYTES = ("paper", "full_paper", "all_in", "full_all_in")
"""What a sample tells, as means over its cycles: bytes held and of a full cache, in both accountings."""


def samples_name(shard: tuple[int, int]) -> str:
    return "samples.jsonl" if shard[1] == 1 else f"samples-{shard[0]}-of-{shard[1]}.jsonl"


def read_samples(path: Path, *, mend: bool = False) -> list[dict[str, Any]]:
    """Rows of a samples file; a last line that an interruption cut off is dropped (from the file too with `mend`)."""
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        log.warning("%s: the last line is incomplete and is dropped", path.name)
        if mend:
            path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def sample_rows(
    engine: Engine,
    reading: Reading,
    group: Group,
    contenders: Sequence[Contender],
    answers: Answers,
    references: Sequence[Reference],
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """All rows of a group, item by item; `seconds` is what an item took under all policies."""
    before = {contender.key: reading.snapshot.session["cycle"]["stats"] for contender in contenders}
    for index, item in enumerate(group):
        for contender in contenders:
            answer, counted = answers[contender.key][index], before[contender.key]
            yield {
                **_identity(item, contender),
                **_outcome(engine, item, answer),
                "cycles": answer.cycles,
                "bytes": _held(contender, answer),
                "evidence_recall": evidence_recall(engine, reading, item, answer),
                "mass_recall": mass_recall(answer, references[index].masses),
                "moved_bytes": answer.moved_bytes,
                "widened": answer.stats["widened"] - counted["widened"],
                "early": answer.stats["early"] - counted["early"],
                "depth": _depth(reading, item),
                "seconds": round(seconds, 3),
            }
            if item.conversation is not None:  # its session goes on counting
                before[contender.key] = answer.stats


def evidence_recall(engine: Engine, reading: Reading, item: Item, answer: Answer) -> float | None:
    """Share of the pages that hold evidence that were resident when the answer began; None without known evidence."""
    if not item.evidence:
        return None
    page_tokens = engine.config.page_chunks * engine.geometry.csa_ratio
    wanted = {token // page_tokens for token in reading.tokens_of(item.evidence)}
    return len(wanted & set(answer.selected[0])) / len(wanted)


def mass_recall(answer: Answer, masses: Sequence[torch.Tensor]) -> float | None:
    """Share of the full run's attention to eligible pages that fell on resident ones, over the cycles of both runs."""
    kept = whole = 0.0
    for selected, eligible, mass in zip(answer.selected, answer.eligible, masses, strict=False):
        there = set(selected)
        pages = [page for page in eligible if page < len(mass)]
        whole += float(mass[pages].sum())
        kept += float(mass[[page for page in pages if page in there]].sum())
    return kept / whole if whole else None


def _identity(item: Item, contender: Contender) -> dict[str, Any]:
    return {
        "id": item.id,
        "task": item.task,
        "length": item.length,
        "document": item.document,
        "conversation": item.conversation,
        "policy": contender.label,
        "seed": contender.seed,
    }


def _outcome(engine: Engine, item: Item, answer: Answer) -> dict[str, Any]:
    """An answer with its score, or the losses of a given continuation."""
    made: dict[str, Any] = {
        "new_tokens": len(answer.tokens),
        "context_tokens": answer.stats["tokens"] - len(answer.tokens) + 1,
        "extra": dict(item.extra),
    }
    if item.target is not None:
        return made | {"losses": [round(loss, 5) for loss in answer.losses]}
    text = _text(engine, answer.tokens)
    points = score(text, item)
    return made | {"prediction": text, "answers": list(item.answers), "score": points, "correct": points == 1}


def _held(contender: Contender, answer: Answer) -> dict[str, float]:
    held = {name: fmean(cycle[name] for cycle in answer.cycles) for name in BYTES}
    if contender.kind == "full":  # a system without paging has no page table, and no second copy of index keys
        held["all_in"] = held["full_all_in"]
    return held


def _depth(reading: Reading, item: Item) -> float | None:
    """Where the only piece of evidence starts, as a share of the document."""
    if len(item.evidence) != 1:
        return None
    first = min(reading.tokens_of(item.evidence), default=0)
    return round(first / int(reading.snapshot.session["position"]), 4)


def _text(engine: Engine, tokens: Sequence[int]) -> str:
    if engine.tokenizer is None:
        return " ".join(str(token) for token in tokens if token not in engine.stop_ids)
    return str(engine.tokenizer.decode(list(tokens), skip_special_tokens=True))


def is_answer(sample: Mapping[str, Any]) -> bool:
    """Whether a sample has an answer, rather than losses."""
    return "losses" not in sample


__all__ = ["BYTES", "evidence_recall", "is_answer", "mass_recall", "read_samples", "sample_rows", "samples_name"]
