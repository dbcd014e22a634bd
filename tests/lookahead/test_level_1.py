"""Level 1 on the fused kernels: the pages of the reference, all sessions in one launch; interpreted without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flashmem import Engine, LSAConfig, Session
from flashmem.indexer import MemoryIndexer
from flashmem.kernels.score_chunks import fused as score
from flashmem.lookahead import choose, level_1
from flashmem.policy import BudgetPolicy, ThresholdPolicy
from support.stock import make_model, tokens

pytestmark = pytest.mark.usefixtures("triton_device")

LENGTHS = (203, 64, 340)
POLICIES = (
    ThresholdPolicy(floor_pages=2), ThresholdPolicy(threshold=0.2, floor_pages=1, ceiling_pages=3),
    ThresholdPolicy(threshold=0.999, floor_pages=4), BudgetPolicy(keep=0.4), BudgetPolicy(pages=9, threshold=0.4),
    BudgetPolicy(pages=1),
)  # fmt: skip


def build(device: torch.device, **settings: Any) -> Engine:
    model = make_model("tiny").to(device)
    native = MemoryIndexer.native(model)
    indexer = native.derive(logit_offset=-0.3, length_offsets=((20, 0.5), (60, -0.2)))
    values = {"page_chunks": 4, "tau": 5, "prefill_chunk": 64, "kernels": "fused"} | settings
    return Engine(model, indexer=indexer, config=LSAConfig(**values))


@pytest.fixture(scope="module")
def engine(triton_device: torch.device) -> Iterator[Engine]:
    engine = build(triton_device)
    for length in LENGTHS:
        engine.session().append(tokens(length, seed=length))
    yield engine
    engine.close()


def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sessions of every launch that scores pages."""
    seen: list[int] = []
    before = score.score_page_reductions

    def counted(q: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        seen.append(q.shape[1])
        return before(q, *arguments, **more)

    monkeypatch.setattr(score, "score_page_reductions", counted)
    return seen


def check_like_the_reference(sessions: list[Session]) -> None:
    cycles = [session.cycle for session in sessions]
    for found, cycle in zip(choose(cycles), cycles, strict=True):
        wanted = cycle.choose_by_logits()
        assert found.selection == wanted.selection
        assert found.view.logits_N is None and found.scores_P is not None


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_pages_are_those_of_the_reference(engine: Engine, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = launches(monkeypatch)
    for session in engine.sessions:
        session.select_by(policy)
    check_like_the_reference(engine.sessions)
    assert seen == [3]


def test_sessions_of_different_rules_and_tokens_observed(triton_device: torch.device) -> None:
    engine = build(triton_device, observation_window=6, ensemble="mean")
    for length, policy in ((203, POLICIES[0]), (64, POLICIES[4]), (5, POLICIES[3]), (203, POLICIES[3])):
        session = engine.session()
        session.append(tokens(length, seed=length))
        session.select_by(policy)
    check_like_the_reference(engine.sessions)
    engine.close()


def test_equal_pages_go_by_number(engine: Engine) -> None:
    session = engine.session()
    session.append(tokens(320))
    for layer in engine.layout.target_layers:
        session.pages.index_rows(layer).zero_()
    for policy in POLICIES:
        session.select_by(policy)
        check_like_the_reference([session])
    session.select_by(BudgetPolicy(pages=7))
    assert choose([session.cycle])[0].selection.pages == (0, 1, 2, 3, 4, 18, 19)
    session.close()


def test_broken_keys_are_an_error(engine: Engine) -> None:
    session = engine.session()
    session.append(tokens(100))
    session.pages.index_rows(engine.layout.target_layers[0])[7] = 0xFF
    with pytest.raises(ValueError, match="NaN"):
        choose([session.cycle])
    session.close()


def test_what_needs_logits_gets_them(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rescue, policies of one's own, and histories too long for the kernel."""

    class Own:
        name, scorer = "own", "memory"

        def select(self, view: Any) -> Any:
            assert view.logits_N is not None
            return BudgetPolicy(pages=5).select(view)

    engine = build(triton_device, rescue=True)
    session = engine.session()
    session.append(tokens(200))
    seen = launches(monkeypatch)
    assert choose([session.cycle])[0].view.logits_N is not None
    session.select_by(Own(), rescue=False)
    assert choose([session.cycle])[0].view.logits_N is not None
    session.select_by(BudgetPolicy(pages=5))
    monkeypatch.setattr(level_1, "MOST_PAGES", 12)
    assert choose([session.cycle])[0].view.logits_N is not None and not seen
    monkeypatch.setattr(level_1, "MOST_PAGES", 13)
    assert choose([session.cycle])[0].view.logits_N is None and seen == [1]
    engine.close()


@pytest.mark.parametrize("lead", [0, 2])
def test_due_sessions_are_scored_together(
    triton_device: torch.device, lead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions whose windows end in one step share a launch, and the device's share cuts as on the reference."""
    probe = build(triton_device)
    budget = (60 if lead else 34) * probe.layout.record_bytes
    probe.close()
    settings = {"lead": lead, "threshold": 0.2, "max_sessions": 2, "device_budget_bytes": budget}
    engines = [build(triton_device, kernels=kernels, **settings) for kernels in ("reference", "fused")]
    sessions = [[engine.session() for _ in range(2)] for engine in engines]
    for pair in sessions:
        for seed, session in enumerate(pair):
            session.append(tokens(300, seed=seed))
    assert all(session.cycle.stats.truncated for session in sessions[0])
    seen = launches(monkeypatch)
    for step in range(11):
        for engine, pair in zip(engines, sessions, strict=True):
            engine.decode(pair, [step, step + 1])
    assert seen == [2, 2]
    for reference, fused in zip(*sessions, strict=True):
        assert fused.cycle.selection == reference.cycle.selection
        assert fused.pages.resident == reference.pages.resident and fused.cycle.stats == reference.cycle.stats
    for engine in engines:
        engine.check()
        engine.close()
