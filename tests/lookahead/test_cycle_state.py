"""Random lives of sessions, judged by the stock model: thousands of steps of append, decode, flip, evict, save, open.

Every logit must be the stock model's with just the chunks visible that were resident in that step; unused device memory
is NaN, and after every rule each resident page is compared with its home, byte by byte. With a policy that always wants
the same pages, the resident set must also be the one that `support.stock.Timeline` writes down.

`python tests/lookahead/test_cycle_state.py 500 60` runs longer than the tests do: 500 histories of 60 rules.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import flashmem.engine
from flashmem import BudgetError, Engine, LSAConfig, Session
from flashmem.store import PageStore
from support.stock import CSA_RATIO, FixedPages, InjectedError, Stock, Timeline, failing_layer, make_model, tokens

PAGE_CHUNKS, LONGEST, MOST_SESSIONS = 4, 260, 3
TEXT = tokens(LONGEST + 50, seed=9)
MODEL, STOCK = "tiny", functools.cache(lambda: Stock("tiny"))
POLICIES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "native": {"policy": "native", "keep": 0.4},
    "threshold": {"policy": "lsa", "threshold": 0.3, "floor_pages": 1, "ceiling_pages": 3, "rescue": True},
    "rescue": {"policy": "native", "keep": 0.3, "rescue": True, "rescue_interval": 2, "rescue_recall": 0.8},
    "random": {"policy": "random", "keep": 0.5},
}
counted = {"steps": 0, "rules": 0}
"""What all histories together did."""


@dataclass
class Life:
    """A session, what it was fed, and what the contract says about it."""

    session: Session
    line: Timeline
    ids: list[int] = field(default_factory=list)
    seen: dict[int, tuple[int, ...] | None] = field(default_factory=dict)
    """By position: pages that a decoded token could attend, None for an appended token (all)."""
    logits: dict[int, torch.Tensor] = field(default_factory=dict)

    def judge(self) -> None:
        """Compare all logits with the stock model's."""
        if not self.logits:
            return
        page_T = torch.arange(len(self.ids) // CSA_RATIO) // PAGE_CHUNKS
        allowed = torch.ones(len(self.ids), len(page_T), dtype=torch.bool)
        for position, pages in self.seen.items():
            if pages is not None:
                allowed[position] = torch.isin(page_T, torch.tensor(pages, dtype=torch.int64))
        wanted = STOCK().logits(self.ids, allowed)
        places = sorted(self.logits)
        got = torch.stack([self.logits[place] for place in places])
        torch.testing.assert_close(got, wanted[places], rtol=0, atol=1e-4)


class Lives(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        tau=st.sampled_from([1, 3, 8, 20]),
        lead=st.integers(0, 7),
        sink=st.integers(0, 2),
        recency=st.integers(1, 2),
        chunk=st.sampled_from([5, 18, 50]),
        device_pages=st.sampled_from([None, None, 14]),
        host_pages=st.sampled_from([None, 6]),
    )
    def start(
        self, policy: str, tau: int, lead: int, sink: int, recency: int, chunk: int, device_pages: int | None,
        host_pages: int | None,
    ) -> None:  # fmt: skip
        self.fixed = FixedPages() if policy == "fixed" else None
        self.directory = TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(flashmem.engine, "PageStore", functools.partial(PageStore, poison=True))
        self.model = make_model(MODEL)
        size = self.record_bytes()
        self.engine = Engine(
            self.model,
            config=LSAConfig(
                **({"policy": self.fixed} if self.fixed else POLICIES[policy]), page_chunks=PAGE_CHUNKS, tau=tau,
                lead=min(lead, tau - 1), sink_pages=sink, recency_pages=recency, prefill_chunk=chunk,
                device_budget_bytes=None if device_pages is None or self.fixed else device_pages * MOST_SESSIONS * size,
                max_sessions=MOST_SESSIONS, host_budget_bytes=None if host_pages is None else host_pages * size,
                disk_path=self.directory.name,
            ),
        )  # fmt: skip
        self.lives: list[Life] = []
        self.open()

    def record_bytes(self) -> int:
        engine = Engine(self.model, config=LSAConfig(page_chunks=PAGE_CHUNKS))
        engine.close()
        return engine.layout.record_bytes

    def teardown(self) -> None:
        if hasattr(self, "lives"):
            for life in self.lives:
                life.judge()
        if hasattr(self, "engine"):
            self.engine.close()
            assert not any(tier.bytes for tier in self.engine.store.tier_bytes().values())
        if hasattr(self, "patch"):
            self.patch.undo()
            self.directory.cleanup()

    def pick(self, index: int) -> Life:
        return self.lives[index % len(self.lives)]

    # ---- what callers do

    @precondition(lambda self: len(self.lives) < MOST_SESSIONS)
    @rule()
    def open(self) -> None:
        config = self.engine.config
        pages = self.fixed.pages if self.fixed else frozenset()
        line = Timeline(PAGE_CHUNKS, pages, config.tau, config.lead, config.sink_pages, config.recency_pages)
        self.lives.append(Life(self.engine.session(), line))

    @precondition(lambda self: self.lives)
    @rule(index=st.integers(0, 2), count=st.sampled_from((0, 1, 2, 15, 16, 17, 40, 70)))
    def append(self, index: int, count: int) -> None:
        life = self.pick(index)
        first = len(life.ids)
        new = TEXT[first : first + count] if first + count <= LONGEST else []
        try:
            life.session.append(new)
        except BudgetError as error:
            assert error.needed > error.available and life.session.ids == life.ids
            return
        if not new:
            return
        life.ids += new
        life.line.append(len(new))
        life.seen |= dict.fromkeys(range(first, len(life.ids)))
        life.logits[len(life.ids) - 1] = life.session.next_logits

    @precondition(lambda self: self.lives)
    @rule(who=st.sets(st.integers(0, 2), min_size=1), count=st.sampled_from((1, 2, 9, 30)))
    def decode(self, who: set[int], count: int) -> None:
        for _ in range(count):
            batch = [life for i, life in enumerate(self.lives) if i in who and len(life.ids) < LONGEST]
            if not batch or not self.step(batch):
                return

    def step(self, batch: list[Life]) -> bool:
        fed = [TEXT[len(life.ids)] for life in batch]
        try:
            logits = self.engine.decode([life.session for life in batch], fed)
        except BudgetError as error:
            assert error.needed > error.available
            assert all(life.session.ids == life.ids for life in batch)
            return False
        for life, token, row in zip(batch, fed, logits, strict=True):
            life.seen[len(life.ids)] = life.session.pages.resident
            life.logits[len(life.ids)] = row
            life.ids.append(token)
            life.line.decode()
            counted["steps"] += 1
        return True

    @precondition(lambda self: self.lives)
    @rule(index=st.integers(0, 2), layer=st.integers(0, 1), decoding=st.booleans())
    def fail(self, index: int, layer: int, decoding: bool) -> None:
        """A forward fails midway: nothing of it may show later."""
        life = self.pick(index)
        tokens_then = TEXT[:1] if decoding else TEXT[:23]
        with failing_layer(self.model, layer), pytest.raises((InjectedError, BudgetError)):
            if decoding:
                self.engine.decode([life.session], tokens_then)
            else:
                life.session.append(tokens_then)
        assert life.session.ids == life.ids
        if not decoding and life.session.cycle.due:
            life.line.select_again()

    @precondition(lambda self: self.lives)
    @rule(index=st.integers(0, 2))
    def save_and_open(self, index: int) -> None:
        """The opened session replaces the saved one, so that pages live in files from then on."""
        life = self.pick(index)
        path = Path(self.directory.name) / "one.mem"
        life.session.save(path)
        before = (life.session.pages.resident, life.session.pages.prefetched, life.session.stats()["cycles"])
        due = life.session.cycle.due
        life.session.close()
        life.session = self.engine.open(path)
        after = (life.session.pages.resident, life.session.pages.prefetched, life.session.stats()["cycles"])
        assert due or before == after

    @precondition(lambda self: len(self.lives) > 1)
    @rule(index=st.integers(0, 2))
    def close(self, index: int) -> None:
        life = self.pick(index)
        life.judge()
        life.session.close()
        self.lives.remove(life)

    @precondition(lambda self: getattr(self, "fixed", None) is not None)
    @rule(pages=st.frozensets(st.integers(0, 15), max_size=5))
    def want_other_pages(self, pages: frozenset[int]) -> None:
        self.fixed.pages = pages
        for life in self.lives:
            life.line.pages = pages

    # ---- what must hold after each

    @invariant()
    def all_is_consistent(self) -> None:
        if not hasattr(self, "lives"):
            return
        counted["rules"] += 1
        self.engine.check()
        for life in self.lives:
            assert life.session.ids == life.ids
            if self.fixed and not life.session.cycle.due:
                selected, first_open = life.line.window
                born = range(first_open, life.session.pages.num_pages)
                assert set(life.session.pages.resident) == selected | set(born)


def run(histories: int, rules: int, phases: Collection[Phase] = tuple(Phase)) -> None:
    run_state_machine_as_test(
        Lives,
        settings=settings(
            database=None,
            max_examples=histories, stateful_step_count=rules, deadline=None, phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_random_lives() -> None:
    run(90, 30, (Phase.generate,))  # the module's own program shrinks
    assert counted["steps"] > 2000 and counted["rules"] > 1000, counted


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]))
    print(counted)
