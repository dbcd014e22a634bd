"""Run every policy over every item, on the same prefill, and append one line per answer to a samples file.

A document is read once and saved. Each question is read once, over the whole history as prefill always does, and every
policy goes on from a snapshot taken there: level 1 selects by the policy, and the answer is decoded from the pages that
it keeps. The first answer token follows from the question's prefill and is therefore the same under every policy.

Questions of a document are decoded together, in groups that depend on the item set alone: a run that was interrupted
and goes on gives what an uninterrupted one gives.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from ..backbone.steps import Picks
from ..engine import Engine, Session
from ..memory import MANIFEST as MEMORY_MANIFEST
from ..memory import SavedMemory
from ..policy import always_kept, page_scores
from ..types import PageView, Scorer, Selection
from .environment import environment, tokenizer_digest
from .items import Content, Document, Item, ItemSet
from .policies import Contender, Reference, build
from .scorers import score

log = logging.getLogger(__name__)

RUN_FILE, ENVIRONMENT_FILE = "run.json", "environments.json"
BYTES = ("paper", "full_paper", "all_in", "full_all_in")
"""What a sample tells, as means over its cycles: bytes held and of a full cache, in both accountings."""


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


@dataclass(slots=True)
class Answer:
    """What one policy made of one item."""

    tokens: list[int] = field(default_factory=list)
    cycles: list[dict[str, int]] = field(default_factory=list)
    """Per cycle: decode step, pages selected, and after that step pages and bytes held, in both accountings."""
    selected: list[tuple[int, ...]] = field(default_factory=list)
    """Pages on the device at the start of each cycle."""
    eligible: list[tuple[int, ...]] = field(default_factory=list)
    """Pages that a policy could win or lose in each cycle."""
    stats: dict[str, Any] = field(default_factory=dict)
    moved_bytes: int = 0
    """Bytes copied to the device after the first selection."""
    losses: list[float] = field(default_factory=list)


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
            with _document(engine, document, memories, config.memories is not None, tell) as reading:
                for group in missing:
                    for row in _run_group(engine, reading, group, contenders):
                        if (row["id"], f"{row['policy']}#{row['seed']}") not in done:
                            _append(file, row)
                    finished += len(group)
                    tell("items", finished, total)
    return path


def describe(engine: Engine, items: ItemSet, contenders: Sequence[Contender], config: RunConfig) -> dict[str, Any]:
    """What makes two runs the same: their samples may stand in one directory."""
    lsa = asdict(engine.config)
    for name in ("disk_path", "host_budget_bytes", "disk_budget_bytes"):  # where bytes wait changes no answer
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
        "samples": len(contenders) * sum(len(asked) for _, asked in _limited(items, config.limit)),
    }


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


def _claim(out: Path, description: Mapping[str, Any]) -> None:
    """Write what this run is, or raise where the directory holds another one."""
    path = out / RUN_FILE
    values = json.loads(json.dumps(description))
    if not path.is_file():
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if differing := sorted(name for name in values.keys() | found.keys() if values.get(name) != found.get(name)):
        raise ValueError(f"{out} holds samples of another run: {', '.join(differing)} differ; choose another directory")


def _note_environment(out: Path, values: Mapping[str, Any]) -> None:
    """Add the environment of this process to those that made samples here, where it is a new one."""
    path = out / ENVIRONMENT_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if dict(values) not in found:
        path.write_text(json.dumps([*found, values], indent=1) + "\n", encoding="utf-8")


def _append(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


Group = tuple[Item, ...]


def _work(items: ItemSet, config: RunConfig) -> Iterator[tuple[Document, list[Group]]]:
    """Documents of this shard, each with its items in groups of one task (so that answers are about as long)."""
    for document, kept in _limited(items, config.limit)[config.shard[0] :: config.shard[1]]:
        tasks = dict.fromkeys(item.task for item in kept)
        groups = []
        for task in tasks:
            mine = [item for item in kept if item.task == task]
            groups += [tuple(mine[at : at + config.batch]) for at in range(0, len(mine), config.batch)]
        yield document, groups


def _limited(items: ItemSet, limit: int | None) -> list[tuple[Document, list[Item]]]:
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


# ---- one document


@dataclass(slots=True)
class Reading:
    """A document that was read: what every question goes on from."""

    snapshot: SavedMemory
    stale: torch.Tensor
    """Page scores [P] of level 1 at its end."""


@contextmanager
def _document(
    engine: Engine, document: Document, memories: Path, keep: bool, tell: Progress
) -> Iterator[Reading]:  # fmt: skip
    """Read a document, or open it where it was kept."""
    path = memories / f"{_memory_name(engine, document)}.mem"
    if not (path / MEMORY_MANIFEST).is_file():
        with engine.session() as session:
            session.append(document.content, on_progress=lambda done, total: tell("tokens", done, total))
            session.save(path)
    ranking = _Ranking()
    with engine.open(path) as opened:
        snapshot = opened.snapshot()
    with engine.resume(snapshot, policy=ranking) as session:
        reading = Reading(session.snapshot(), ranking.scores)
    yield reading
    if not keep:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def _memory_name(engine: Engine, document: Document) -> str:
    identity = json.dumps([engine.identity(), document.content], default=list)
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


class _Ranking:
    """Looks at level 1's scores and keeps only what must be kept."""

    name = "ranking"
    scorer: Scorer = "memory"

    def __init__(self) -> None:
        self.scores = torch.empty(0)

    def select(self, view: PageView) -> Selection:
        assert view.logits_N is not None
        self.scores = page_scores(view.logits_N, view.page_chunks, view.num_pages)
        return Selection(view.always)


class _Nothing:
    """Keeps only what must be kept, unseen: for sessions that read a question for others."""

    name = "nothing"
    scorer: Scorer = "none"

    def select(self, view: PageView) -> Selection:
        return Selection(view.always)


# ---- one group of questions


def _run_group(
    engine: Engine, reading: Reading, group: Group, contenders: Sequence[Contender]
) -> Iterator[dict[str, Any]]:
    """Rows of all policies for all items of a group: full first, then what nobody waits for, then the matched."""
    started = time.perf_counter()
    snapshots = [_asked(engine, reading, item.question) for item in group]
    references = [Reference(_level_1_runs(snapshot), stale=reading.stale) for snapshot in snapshots]
    answers: dict[str, list[Answer]] = {}
    phases = [
        [c for c in contenders if c.kind == "full"],
        [c for c in contenders if c.kind != "full" and not c.matched and c.kind != "oracle"],
        [c for c in contenders if c.matched or c.kind == "oracle"],
    ]
    for phase in phases:
        jobs = [(contender, index) for contender in phase for index in range(len(group))]
        made = _decode_jobs(engine, jobs, snapshots, references, group)
        for (contender, _), answer in zip(jobs, made, strict=True):
            answers.setdefault(contender.key, []).append(answer)
        for contender in phase:
            if contender.label == "lsa":
                for reference, answer in zip(references, answers[contender.key], strict=True):
                    reference.budgets = [cycle["selected"] for cycle in answer.cycles]
    seconds = (time.perf_counter() - started) / len(group)
    for index, item in enumerate(group):
        for contender in contenders:
            yield _row(engine, item, contender, answers[contender.key][index], references[index], seconds)


def _asked(engine: Engine, reading: Reading, question: Content) -> SavedMemory:
    """A snapshot of the document with the question behind it."""
    with engine.resume(reading.snapshot, policy=_Nothing()) as session:
        session.append(question)
        return session.snapshot()


def _level_1_runs(snapshot: SavedMemory) -> int:
    """Level 1 runs before a session that resumes from here selects."""
    return int(snapshot.session["cycle"]["stats"]["cycles"])


def _decode_jobs(
    engine: Engine, jobs: Sequence[tuple[Contender, int]], snapshots: Sequence[SavedMemory],
    references: Sequence[Reference], group: Group,
) -> list[Answer]:  # fmt: skip
    """Decode one answer per (contender, item), all in one batch."""
    if not jobs:
        return []
    watched = all(contender.kind == "full" for contender, _ in jobs)
    with ExitStack() as stack:
        sessions: list[Session] = []
        for contender, index in jobs:
            policy = build(contender, engine.config, engine.geometry.csa_ratio, references[index])
            resumed = engine.resume(snapshots[index], policy=policy, rescue=contender.rescue)
            sessions.append(stack.enter_context(resumed))
        limits = [group[index].max_new_tokens for _, index in jobs]
        if not watched:
            return decode(engine, sessions, limits)
        return decode(engine, sessions, limits, [references[index].masses for _, index in jobs])


@torch.no_grad()
def decode(
    engine: Engine,
    sessions: Sequence[Session],
    limits: Sequence[int],
    masses: Sequence[list[torch.Tensor]] | None = None,
) -> list[Answer]:
    """Greedy answers of sessions whose prompts have run; `masses` get what every page was given, one entry a cycle."""
    answers = [Answer() for _ in sessions]
    watchers = [_Watcher(session, answer) for session, answer in zip(sessions, answers, strict=True)]
    live = list(range(len(sessions)))
    for step in range(max(limits)):
        chosen: list[int] = []
        for index in live:
            token = int(sessions[index].next_logits.argmax())  # type: ignore[union-attr]
            answers[index].tokens.append(token)
            sessions[index].ids.append(token)
            chosen.append(token)
        going = [
            (index, token) for index, token in zip(live, chosen, strict=True)
            if token not in engine.stop_ids and step + 1 < limits[index]
        ]  # fmt: skip
        live = [index for index, _ in going]
        if not live:
            break
        rows = [sessions[index] for index in live]
        with _observed(engine, rows, None if masses is None else [masses[index] for index in live]) as settle:
            engine.decode(rows, [token for _, token in going])
            for index in live:
                watchers[index].after_step(step + 1)
            settle([len(answers[index].cycles) for index in live])
    for watcher in watchers:
        watcher.finish()
    return answers


class _Watcher:
    """Notes what a session holds at the start of every cycle."""

    def __init__(self, session: Session, answer: Answer) -> None:
        self.session, self.answer = session, answer
        self.cycles = session.cycle.stats.cycles
        self._note(0)
        self.moved = session.pages.traffic.bytes_to_device

    def after_step(self, step: int) -> None:
        if self.session.cycle.stats.cycles != self.cycles:
            self.cycles = self.session.cycle.stats.cycles
            self._note(step - 1)

    def finish(self) -> None:
        self.answer.stats = self.session.stats()
        self.answer.moved_bytes = self.session.pages.traffic.bytes_to_device - self.moved

    def _note(self, step: int) -> None:
        session, stats = self.session, self.session.stats()
        self.answer.cycles.append(
            {
                "step": step,
                "selected": len(session.cycle.selection.pages),
                "pages": stats["resident_pages"],
                "paper": stats["resident_bytes_paper"],
                "full_paper": stats["full_bytes_paper"],
                "all_in": stats["device_bytes_all_in"],
                "full_all_in": stats["full_bytes_all_in"],
            }
        )
        config, engine = session.cycle.config, session.engine
        # the cycle began before the step that has run since: that one may have opened a page
        chunks = (session.state.position - bool(step)) // engine.geometry.csa_ratio
        pages = -(-chunks // config.page_chunks)
        always = set(always_kept(pages, config.sink_pages, config.recency_pages))
        self.answer.selected.append(session.cycle.selection.pages)
        self.answer.eligible.append(tuple(page for page in range(pages) if page not in always))


@contextmanager
def _observed(
    engine: Engine, rows: Sequence[Session], masses: Sequence[list[torch.Tensor]] | None
) -> Iterator[Callable[[Sequence[int]], None]]:
    """Sum the attention of one step by page; what is yielded adds it to the cycle that each row is in."""
    if masses is None:
        yield lambda cycles: None
        return
    page_chunks = engine.config.page_chunks
    seen = [torch.zeros(session.pages.num_pages + 1, dtype=torch.float64) for session in rows]

    def look(layer: int, picks: Picks) -> None:
        ids_BK, weights_BK = picks.chunk_ids.cpu(), picks.weights.sum(1).double().cpu()
        for row, page_mass in enumerate(seen):
            there = ids_BK[row] >= 0
            page_mass.index_add_(0, ids_BK[row][there] // page_chunks, weights_BK[row][there])

    def settle(cycles: Sequence[int]) -> None:
        for page_mass, total, cycle in zip(seen, masses, cycles, strict=True):
            if len(total) < cycle:
                total.append(page_mass)
            else:
                grown = torch.zeros(max(len(total[-1]), len(page_mass)), dtype=torch.float64)
                grown[: len(total[-1])] += total[-1]
                grown[: len(page_mass)] += page_mass
                total[-1] = grown

    engine.on_picks = look
    try:
        yield settle
    finally:
        engine.on_picks = None


# ---- rows


def _row(
    engine: Engine, item: Item, contender: Contender, answer: Answer, reference: Reference, seconds: float
) -> dict[str, Any]:
    """One line of the samples file."""
    text = _text(engine, answer.tokens)
    points = score(text, item)
    held = {name: _mean([cycle[name] for cycle in answer.cycles]) for name in BYTES}
    if contender.kind == "full":  # a system without paging has no page table, and no second copy of index keys
        held["all_in"] = held["full_all_in"]
    return {
        "id": item.id,
        "task": item.task,
        "length": item.length,
        "document": item.document,
        "policy": contender.label,
        "seed": contender.seed,
        "prediction": text,
        "answers": list(item.answers),
        "score": points,
        "correct": points == 1,
        "new_tokens": len(answer.tokens),
        "context_tokens": answer.stats["tokens"] - len(answer.tokens) + 1,
        "cycles": answer.cycles,
        "bytes": held,
        "evidence_recall": evidence_recall(item, answer.selected[0], engine),
        "mass_recall": mass_recall(answer, reference.masses),
        "moved_bytes": answer.moved_bytes,
        "widened": answer.stats["widened"],
        "early": answer.stats["early"],
        "depth": _depth(item),
        "seconds": round(seconds, 3),
    }


def evidence_recall(item: Item, resident: Sequence[int], engine: Engine) -> float | None:
    """Share of the pages that hold evidence that were resident when the answer began; None without known evidence."""
    if not item.evidence or isinstance(item.question, str):
        return None
    page_tokens = engine.config.page_chunks * engine.geometry.csa_ratio
    wanted = {token // page_tokens for first, last in item.evidence for token in range(first, last)}
    return len(wanted & set(resident)) / len(wanted)


def mass_recall(answer: Answer, masses: Sequence[torch.Tensor]) -> float | None:
    """Share of the full run's attention to eligible pages that fell on resident ones, over the cycles of both runs."""
    kept = whole = 0.0
    for selected, eligible, mass in zip(answer.selected, answer.eligible, masses, strict=False):
        there = set(selected)
        pages = [page for page in eligible if page < len(mass)]
        whole += float(mass[pages].sum())
        kept += float(mass[[page for page in pages if page in there]].sum())
    return kept / whole if whole else None


def _depth(item: Item) -> float | None:
    """Where the only piece of evidence starts, as a share of the document."""
    if len(item.evidence) != 1:
        return None
    return round(item.evidence[0][0] / item.length, 4)


def _text(engine: Engine, tokens: Sequence[int]) -> str:
    if engine.tokenizer is None:
        return " ".join(str(token) for token in tokens if token not in engine.stop_ids)
    return str(engine.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


__all__ = ["Answer", "Progress", "RunConfig", "describe", "read_samples", "run_items", "samples_name"]
