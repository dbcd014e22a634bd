"""Greedy decoding of a batch of sessions, watched: what each holds in every cycle, and what full attention attends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backbone.steps import Picks
from ..engine import Engine, Session
from ..policy import always_kept


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
    losses: list[float] = field(default_factory=list)
    """Of every token of a given continuation, in nats."""
    stats: dict[str, Any] = field(default_factory=dict)
    """The session's, at the end; what it counts goes back to the document's first token."""
    moved_bytes: int = 0
    """Bytes copied to the device after the first selection."""


@torch.no_grad()
def decode(
    engine: Engine,
    sessions: Sequence[Session],
    limits: Sequence[int],
    *,
    targets: Sequence[Sequence[int] | None] | None = None,
    masses: Sequence[list[torch.Tensor]] | None = None,
) -> list[Answer]:
    """Greedy answers of sessions whose prompts have run, or the losses of given continuations.

    `limits` are tokens at most; a session with a target decodes that instead. `masses` are filled with the attention
    that every page was given, one entry [P] a cycle, summed over heads, CSA layers and steps.
    """
    targets = targets or [None] * len(sessions)
    answers = [Answer() for _ in sessions]
    watchers = [_Watcher(session, answer) for session, answer in zip(sessions, answers, strict=True)]
    live, step = list(range(len(sessions))), 0
    while live:
        for index in live:
            _choose(sessions[index], answers[index], targets[index], step)
        step += 1
        live = [index for index in live if not _ended(engine, answers[index], targets[index], limits[index])]
        if not live:
            break
        rows = [sessions[index] for index in live]
        with _observed(engine, rows, None if masses is None else [masses[index] for index in live]) as settle:
            engine.decode(rows, [answers[index].tokens[-1] for index in live])
            for index in live:
                watchers[index].after_step(step)
            settle([len(answers[index].cycles) for index in live])
    for watcher in watchers:
        watcher.finish()
    return answers


def _choose(session: Session, answer: Answer, target: Sequence[int] | None, step: int) -> None:
    """Decide the next token; it is run by the next step."""
    assert session.next_logits is not None
    if target is None:
        token = int(session.next_logits.argmax())
    else:
        token = target[step]
        answer.losses.append(-float(session.next_logits.log_softmax(-1)[token]))
    answer.tokens.append(token)
    session.ids.append(token)


def _ended(engine: Engine, answer: Answer, target: Sequence[int] | None, limit: int) -> bool:
    if target is not None:
        return len(answer.tokens) == len(target)
    return answer.tokens[-1] in engine.stop_ids or len(answer.tokens) == limit


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
        session, stats, answer = self.session, self.session.stats(), self.answer
        answer.cycles.append(
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
        answer.selected.append(session.cycle.selection.pages)
        answer.eligible.append(tuple(page for page in range(pages) if page not in always))


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


__all__ = ["Answer", "decode"]
