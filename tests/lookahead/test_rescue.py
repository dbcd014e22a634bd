"""Rescue: widening past the ceiling, and level 1 early when the lightning scores point outside the resident set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from flashmem import Engine, LSAConfig, Session
from flashmem.types import PageView, Selection
from support.stock import FixedPages, make_model, tokens

TEXT = tokens(400, seed=5)
RESCUE_COUNTS = ("misses", "looks", "fallbacks", "widened", "early")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("four-csa")


@contextmanager
def engine_of(model: Any, **options: Any) -> Iterator[Engine]:
    engine = Engine(model, config=LSAConfig(**{"page_chunks": 4, "recency_pages": 1, **options}))
    try:
        yield engine
        engine.check()
    finally:
        engine.close()


def run(engine: Engine, length: int, steps: int) -> Session:
    session = engine.session()
    if length:
        session.append(TEXT[:length])
    for token in TEXT[length : length + steps]:
        engine.decode([session], [token])
        session.check()
    return session


def rescue_counts(session: Session) -> dict[str, int]:
    return {name: value for name, value in session.stats().items() if name in RESCUE_COUNTS}


EAGER = {"policy": "lsa", "threshold": 0.01, "floor_pages": 1, "ceiling_pages": 2}
"""Nearly every page has a chunk above the threshold, and two may stay."""


def test_off_by_default(model: Any) -> None:
    with engine_of(model, **EAGER, tau=8) as engine:
        session = run(engine, 200, 20)
        assert session.stats()["truncated"] == session.stats()["cycles"] == 3
        assert rescue_counts(session) == dict.fromkeys(RESCUE_COUNTS, 0)
        assert len(session.cycle.selection.pages) == 2 + 2


def test_widens_when_the_ceiling_cuts(model: Any) -> None:
    with engine_of(model, **EAGER, tau=8, rescue=True, rescue_recall=0.0) as engine:
        session = run(engine, 200, 20)
        stats = session.stats()
        assert stats["widened"] == stats["fallbacks"] == stats["cycles"] == 3 and stats["early"] == 0
        assert stats["truncated"] == 0  # what was selected in the end is all that was wanted
        assert len(session.cycle.selection.pages) > 2 + 2


def test_does_not_widen_without_need(model: Any) -> None:
    with engine_of(model, policy="lsa", threshold=0.01, rescue=True, rescue_recall=0.0, tau=8) as engine:
        assert run(engine, 200, 20).stats()["fallbacks"] == 0


def test_a_fixed_budget_widens_too(model: Any) -> None:
    with engine_of(model, policy="lsa", keep=0.25, threshold=0.01, rescue=True, rescue_recall=0.0) as engine:
        session = run(engine, 240, 1)
        assert session.stats()["widened"] == 1 and len(session.cycle.selection.pages) == 2 * 4


def test_runs_early_when_the_picks_point_outside(model: Any) -> None:
    """A policy that keeps nothing is wrong about most of the lightning top-k: level 1 runs at the first look."""
    policy = FixedPages()
    with engine_of(model, policy=policy, tau=32, rescue=True, rescue_interval=4, rescue_recall=0.9) as engine:
        session = run(engine, 240, 4)
        assert rescue_counts(session) == dict.fromkeys(RESCUE_COUNTS, 0) and session.pages.resident == (0, 14, 15)
        wanted = picked_pages(engine, session)
        engine.decode([session], [1])  # looks first
        stats = session.stats()
        assert stats["early"] == stats["fallbacks"] == 1 and stats["cycles"] == len(policy.views) == 2
        per_look = len(engine.layout.target_layers) * engine.geometry.index_topk
        assert stats["looks"] == per_look and 0.1 * per_look < stats["misses"] <= per_look
        assert wanted - {0, 15} and wanted <= set(session.pages.resident)  # the picked pages joined
        assert session.cycle.steps == 1  # a new window began


def picked_pages(engine: Engine, session: Session) -> set[int]:
    """Pages of the target layers' own top-k over the whole history, from the backbone's weights."""
    pages: set[int] = set()
    for csa in engine.layout.target_layers:
        scorer = engine.scorers["native"].layers[engine.geometry.csa_layers.index(csa)]
        hidden, rows = session.state.observed(csa), session.pages.index_rows(csa)
        with torch.no_grad():
            logits = scorer.logits(hidden[-1:], rows[None], torch.tensor([session.state.position - 1]))[0]
        best = logits.argsort(descending=True)[: engine.geometry.index_topk]
        pages |= set((best // engine.config.page_chunks).tolist())
    return pages


def test_what_was_selected_stays_through_an_early_run(model: Any) -> None:
    even = frozenset(range(0, 14, 2))

    class Changing(FixedPages):
        """Even pages first, nothing from then on."""

        def select(self, view: PageView) -> Selection:
            self.pages = frozenset() if self.views else even
            return super().select(view)

    with engine_of(model, policy=Changing(), tau=16, rescue=True, rescue_interval=4, rescue_recall=1.0) as engine:
        session = run(engine, 240, 4)
        picked = picked_pages(engine, session)
        engine.decode([session], [1])
        assert session.stats()["early"] == 1 and even - picked
        assert even | picked <= set(session.pages.resident)
        session.select_by(rescue=False)
        for _ in range(16):  # past the boundary in time
            engine.decode([session], [1])
        assert not (even - {0}) & set(session.pages.resident)


def test_looks_every_interval_and_finds_nothing_wrong_with_everything(model: Any) -> None:
    with engine_of(model, policy="all", tau=64, rescue=True, rescue_interval=4, rescue_recall=1.0) as engine:
        session = run(engine, 100, 13)  # looks before steps 4, 8 and 12
        stats = session.stats()
        assert stats["looks"] == 3 * len(engine.layout.target_layers) * engine.geometry.index_topk
        assert stats["misses"] == stats["fallbacks"] == 0 and stats["cycles"] == 1


def test_recall_zero_never_runs_early(model: Any) -> None:
    with engine_of(model, policy=FixedPages(), tau=64, rescue=True, rescue_interval=2, rescue_recall=0.0) as engine:
        stats = run(engine, 200, 9).stats()
        assert stats["misses"] > 0 and stats["early"] == 0


@pytest.mark.parametrize("length", [0, 1, 3, 5])
def test_looks_at_histories_without_chunks(model: Any, length: int) -> None:
    with engine_of(model, policy="lsa", tau=64, rescue=True, rescue_interval=1, rescue_recall=1.0) as engine:
        assert run(engine, length, 12).stats()["misses"] == 0  # everything was born in the window


@pytest.mark.parametrize("lead", [0, 3])
def test_rescue_stays_within_a_tight_pool(model: Any, lead: int) -> None:
    """Always-kept pages stay, then what the rescue asks for; the share of the pool holds."""
    with engine_of(model, policy="all") as engine:
        size = engine.layout.record_bytes
    slots = 4 * (2 if lead else 1) + 2
    with engine_of(
        model, **EAGER, tau=8, lead=lead, prefill_chunk=16, rescue=True, rescue_interval=2, rescue_recall=1.0,
        device_budget_bytes=slots * size,
    ) as engine:  # fmt: skip
        session = run(engine, 240, 40)
        stats = session.stats()
        assert stats["early"] > 0 and stats["truncated"] > 0
        assert {0, session.pages.num_pages - 1} <= set(session.pages.resident)
        assert len(session.pages.resident) <= slots


def test_an_early_run_calls_a_running_prefetch_off(model: Any) -> None:
    with engine_of(
        model, policy=FixedPages(frozenset({3})), tau=8, lead=6, rescue=True, rescue_interval=4, rescue_recall=1.0
    ) as engine:
        session = run(engine, 240, 20)
        assert session.stats()["early"] > 0
