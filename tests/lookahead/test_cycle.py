"""When level 1 runs, when the page table flips, and what a budget refuses. Pages have 16 tokens here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmem import BudgetError, Engine, FlashmemError, LSAConfig, Selection, Session
from support.stock import FixedPages, InjectedError, failing_layer, make_model, tokens

TEXT = tokens(400, seed=3)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("odd-heads")


@contextmanager
def engine_of(model: Any, policy: Any, **options: Any) -> Iterator[Engine]:
    engine = Engine(model, config=LSAConfig(policy=policy, **{"page_chunks": 4, "recency_pages": 1, **options}))
    try:
        yield engine
        engine.check()
    finally:
        engine.close()


def decode(session: Session, ids: list[int]) -> torch.Tensor:
    return torch.stack([session.engine.decode([session], [token])[0] for token in ids])


# ---- the clock


def test_level_1_runs_once_at_the_end_of_every_append(model: Any) -> None:
    policy = FixedPages(frozenset({1}))
    with engine_of(model, policy, prefill_chunk=20) as engine:
        session = engine.session()
        session.append(TEXT[:70])  # four prefill chunks
        assert [(view.num_chunks, view.num_pages) for view in policy.views] == [(17, 5)]
        assert session.pages.resident == (0, 1, 4)
        session.append(TEXT[:1])
        session.append(TEXT[:21])
        session.append([])
        assert [view.num_chunks for view in policy.views] == [17, 17, 23]
        assert session.pages.resident == (0, 1, 5)
        session.generate(max_new_tokens=3)
        assert len(policy.views) == session.stats()["cycles"] == 3


def test_generate_with_a_prompt_settles_before_the_first_step(model: Any) -> None:
    policy = FixedPages()
    with engine_of(model, policy) as engine:
        session = engine.session()
        stream = session.stream(TEXT[:40], max_new_tokens=2)
        assert not policy.views
        next(stream)
        assert [view.num_chunks for view in policy.views] == [10]


@pytest.mark.parametrize("tau", [1, 4, 7])
def test_flips_exactly_every_tau_steps(model: Any, tau: int) -> None:
    with engine_of(model, FixedPages(), tau=tau) as engine:
        session = engine.session()
        session.append(TEXT[:30])
        first, flips = session.pages.traffic.flips, []
        for token in TEXT[: 3 * tau + 1]:
            engine.decode([session], [token])
            flips.append(session.pages.traffic.flips - first)
            session.check()
        assert flips == [step // tau for step in range(3 * tau + 1)]
        session.append(TEXT[:2])  # an append starts a new window
        decode(session, TEXT[:tau])
        assert session.pages.traffic.flips - first == 4
        decode(session, TEXT[:1])
        assert session.pages.traffic.flips - first == 5


def test_each_session_has_its_own_clock(model: Any) -> None:
    with engine_of(model, FixedPages(), tau=4) as engine:
        a, b = engine.session(), engine.session()
        a.append(TEXT[:20])
        decode(a, TEXT[:2])
        b.append(TEXT[:50])
        seen = []
        for token in TEXT[:6]:
            engine.decode([a, b], [token, token])
            seen.append((a.cycle.steps, b.cycle.steps))
        assert seen == [(3, 1), (4, 2), (1, 3), (2, 4), (3, 1), (4, 2)]


def test_lead_selects_early_and_flips_at_the_boundary(model: Any) -> None:
    """The selection is made, and copied, `lead` steps before; what is resident changes at the boundary alone.

    It is the selection for the tokens there were when it was made; pages that were open then, or born since, stay too.
    """
    policy = Alternating([frozenset({1}), frozenset({2})])
    with engine_of(model, policy, tau=8, lead=6) as engine:
        session = engine.session()
        session.append(TEXT[:91])  # pages 0..5, the last one open
        before = session.pages.resident
        assert before == (0, 1, 5)
        for step, token in enumerate(TEXT[:8]):
            moved = session.pages.traffic.pages_to_device
            engine.decode([session], [token])
            assert len(policy.views) == (1 if step < 2 else 2)
            assert session.pages.traffic.pages_to_device - moved == (1 if step == 2 else 0)  # page 2, early
            born = (6,) if session.pages.num_pages > 6 else ()
            assert session.pages.resident == (*before, *born) and session.pages.traffic.flips == 1
            engine.check()
        assert policy.views[1].num_chunks == 93 // 4
        engine.decode([session], [TEXT[8]])
        assert session.pages.traffic.flips == 2
        # recency was page 5 when the selection was made; page 6 was born since
        assert session.pages.resident == (0, 2, 5, 6)
        assert session.cycle.selection.pages == (0, 2, 5)


def test_lead_changes_no_pages_where_none_are_born(model: Any) -> None:
    """Same policy, same page count at selection and boundary: the same pages, the same logits."""
    results = []
    for lead in (0, 3):
        with engine_of(
            model, Alternating([frozenset({1}), frozenset({2}), frozenset({3})]), tau=4, lead=lead
        ) as engine:
            session = engine.session()
            session.append(TEXT[:100])  # page 6 is open until token 112
            logits = decode(session, TEXT[:11])
            results.append((logits, session.pages.resident, session.pages.traffic.pages_to_device))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]


def test_an_append_calls_an_early_selection_off(model: Any) -> None:
    policy = Alternating([frozenset({1}), frozenset({2}), frozenset({3})])
    with engine_of(model, policy, tau=4, lead=2, prefill_chunk=10) as engine:
        session = engine.session()
        session.append(TEXT[:100])
        decode(session, TEXT[:3])
        assert len(policy.views) == 2  # page 2 is on its way
        session.append(TEXT[:25])
        engine.check()
        assert session.pages.resident == (0, 3, 7) and session.cycle.steps == 0
        decode(session, TEXT[:5])


class Alternating(FixedPages):
    """Selects one set of pages after the other, then the last one for ever."""

    def __init__(self, turns: list[frozenset[int]]) -> None:
        super().__init__()
        self.turns = turns

    def select(self, view: Any) -> Selection:
        self.pages = self.turns[min(len(self.views), len(self.turns) - 1)]
        return super().select(view)


def test_a_session_that_only_decodes_is_not_blind(model: Any) -> None:
    """Without any append, everything is born in a window; from the first boundary on, the policy decides."""
    policy = FixedPages()
    with engine_of(model, policy, tau=40) as engine:
        session = engine.session()
        decode(session, TEXT[:40])
        assert session.pages.resident == (0, 1, 2) and not policy.views
        decode(session, TEXT[:1])
        assert session.pages.resident == (0, 2) and [view.num_chunks for view in policy.views] == [10]


def test_level_1_sees_every_chunk_and_the_newest_hidden_state(model: Any) -> None:
    """The logits that the policy gets are the indexer's over the whole history, resident or not."""
    policy = FixedPages()
    policy.scorer = "memory"
    with engine_of(model, policy, tau=5) as engine:
        session = engine.session()
        session.append(TEXT[:150])
        hidden: dict[int, torch.Tensor] = {}
        for layer in engine.layout.target_layers:
            norm = model.model.layers[layer].input_layernorm
            norm.register_forward_hook(lambda m, a, out, layer=layer: hidden.__setitem__(layer, out[0, -1:]))
        decode(session, TEXT[:6])
        view = policy.views[1]
        assert view.num_chunks == len(view.logits_N) == 155 // 4
        decode(session, TEXT[6:10])
        rows = {csa: session.pages.index_rows(engine.geometry.csa_layers[csa]) for csa in engine.indexer.target_layers}
        at = {csa: hidden[engine.geometry.csa_layers[csa]] for csa in engine.indexer.target_layers}
        with torch.no_grad():
            wanted = engine.indexer.chunk_logits(at, rows, torch.tensor([159]))
        decode(session, TEXT[10:11])
        torch.testing.assert_close(policy.views[2].logits_N, wanted[: 160 // 4], rtol=0, atol=1e-5)


# ---- saving and opening


@pytest.mark.parametrize("steps", [0, 3, 20, 39])
@pytest.mark.parametrize("policy", ["random", "lsa"])
def test_an_opened_memory_goes_on_as_the_session_would(model: Any, policy: str, steps: int, tmp_path: Path) -> None:
    """Also from the middle of a window in which pages were born."""
    with engine_of(model, policy, keep=0.3, tau=40) as engine:
        session = engine.session()
        session.append(TEXT[:200])
        for token in TEXT[200 : 200 + steps]:
            engine.decode([session], [token])
        session.save(tmp_path / "book")
        opened = engine.open(tmp_path / "book")
        assert opened.pages.resident == session.pages.resident and opened.ids == session.ids
        engine.check()
        assert torch.equal(opened.next_logits, session.next_logits)
        for token in TEXT[:45]:
            rows = [engine.decode([one], [token]) for one in (session, opened)]
            assert torch.equal(*rows)
            assert opened.pages.resident == session.pages.resident
        assert opened.stats()["cycles"] == session.stats()["cycles"]
        opened.append(TEXT[:30])
        session.append(TEXT[:30])
        assert torch.equal(opened.next_logits, session.next_logits)


def test_a_memory_saved_after_a_failed_append_settles_when_it_goes_on(model: Any, tmp_path: Path) -> None:
    policy = FixedPages(frozenset({2}))
    with engine_of(model, policy, prefill_chunk=50) as engine:
        session = engine.session()
        with failing_layer(model, 0, after=2), pytest.raises(InjectedError):
            session.append(TEXT[:150])
        session.save(tmp_path / "book")
        opened = engine.open(tmp_path / "book")
        assert torch.equal(decode(opened, TEXT[:3]), decode(session, TEXT[:3]))
        assert opened.pages.resident == session.pages.resident == (0, 2, 6)


def test_another_policy_selects_anew(model: Any, tmp_path: Path) -> None:
    with engine_of(model, "random", keep=0.3) as engine:
        session = engine.session()
        session.append(TEXT[:200])
        session.save(tmp_path / "book")
    with engine_of(model, FixedPages(frozenset({5}))) as engine:
        opened = engine.open(tmp_path / "book")
        assert opened.pages.resident == (0, 5, 12)
        decode(opened, TEXT[:3])


# ---- budgets


def record_bytes(model: Any) -> int:
    with engine_of(model, "all") as engine:
        return engine.layout.record_bytes


def test_a_pool_too_small_to_work_in_is_refused(model: Any) -> None:
    size = record_bytes(model)
    with (
        pytest.raises(BudgetError, match=r"device pool: [\d,]+ bytes needed, [\d,]+ available") as caught,
        engine_of(model, "lsa", device_budget_bytes=4 * size, tau=16, prefill_chunk=16),
    ):
        pass
    # sink, recency, one page of choice; a window opens one page and fills another
    assert (caught.value.needed, caught.value.available) == (5 * size, 4 * size)
    assert f"{5 * size:,}" in str(caught.value) and f"{4 * size:,}" in str(caught.value)
    with engine_of(model, "lsa", device_budget_bytes=caught.value.needed, tau=16, prefill_chunk=16) as engine:
        session = engine.session()
        session.append(TEXT[:300])
        decode(session, TEXT[:50])
    with pytest.raises(BudgetError), engine_of(model, "lsa", device_budget_bytes=size - 1):
        pass


def test_keeping_everything_needs_a_pool_for_everything(model: Any) -> None:
    size = record_bytes(model)
    with engine_of(model, "all", device_budget_bytes=10 * size, tau=16, prefill_chunk=16) as engine:
        session = engine.session()
        session.append(TEXT[:100])
        session.generate(max_new_tokens=2)
        before, pages = list(session.ids), session.pages.resident
        with pytest.raises(BudgetError) as caught:
            session.append(TEXT[:100])
        assert caught.value.needed > caught.value.available
        assert session.ids == before and session.pages.resident == pages
        session.append(TEXT[:20])
        with pytest.raises(BudgetError):
            for _ in range(60):
                engine.decode([session], [1])
        engine.check()
        assert session.state.position > 100
        twin = engine.store.pool
        assert twin.allocated_bytes == 10 * size


@pytest.mark.parametrize("lead", [0, 5, 16])
@pytest.mark.parametrize("policy", ["lsa", "random", "native"])
def test_a_tight_pool_is_enough_for_any_length(model: Any, policy: str, lead: int) -> None:
    """The share promised at the start holds: full selections, long appends, windows that open pages, two sessions."""
    size, sessions = record_bytes(model), 2
    slots = 8 * (2 if lead else 1) + 3
    keep = None if policy == "lsa" else 0.25  # of at most 30 pages
    options = {"keep": keep, "threshold": 0.01, "tau": 17, "lead": lead, "prefill_chunk": 20, "recency_pages": 5}
    budget = {"device_budget_bytes": sessions * slots * size, "max_sessions": sessions}
    with engine_of(model, policy, **options, **budget) as engine:
        both = [engine.session() for _ in range(sessions)]
        with pytest.raises(FlashmemError, match="max_sessions=2"):
            engine.session()
        for length, steps in ((200, 20), (3, 40), (60, 5), (90, 30)):
            for session in both:
                session.append(TEXT[:length])
                engine.check()
            for token in TEXT[:steps]:
                engine.decode(both, [token, token + 1])
            engine.check()
        assert engine.store.pool.allocated_bytes == sessions * slots * size
        if policy == "lsa":
            assert both[0].stats()["truncated"] > 0  # it would have liked more
        both[0].close()
        engine.session().append(TEXT[:50])


@pytest.mark.parametrize(("tau", "lead"), [(64, 63), (17, 16), (40, 1)])
def test_a_share_has_room_for_what_is_born_in_long_leads(tau: int, lead: int) -> None:
    """Pages of 16 tokens are born all the time; full selections, old and new, are on the device beside them."""
    model = make_model("tiny")
    options = {"threshold": 0.001, "tau": tau, "lead": lead, "prefill_chunk": 4, "floor_pages": 1}
    size = record_bytes(model)
    slots = 2 * 6 + -(-(tau + lead) // 16) + 1
    with engine_of(model, "lsa", **options, device_budget_bytes=slots * size) as engine:
        session = engine.session()
        session.append(TEXT[:170])
        most = 0
        for token in TEXT[: 3 * tau + 20]:
            engine.decode([session], [token])
            most = max(most, len(session.pages.placed_pages()))
        assert session.cycle.share.capacity == 6 and session.stats()["truncated"] > 0
        assert most > 6 or lead == 1


def test_a_full_host_refuses_before_work(model: Any, tmp_path: Path) -> None:
    size = record_bytes(model)
    with engine_of(model, "random", keep=0.3, host_budget_bytes=5 * size, prefill_chunk=20) as engine:
        session = engine.session()
        session.append(TEXT[:70])  # four complete pages
        session.generate(max_new_tokens=2)
        before, stats = list(session.ids), session.stats()
        with pytest.raises(BudgetError, match=f"host: {4 * size:,} bytes needed, {size:,} available"):
            session.append(TEXT[:60])
        assert session.ids == before and session.stats() == stats
        with pytest.raises(BudgetError, match="host") as caught:
            for _ in range(40):
                engine.decode([session], [1])
        assert session.state.position == 95 and caught.value.needed == size  # the next token completes page 5
        engine.check()
        session.save(tmp_path / "book")  # what is there can still be saved, and read elsewhere
        wanted = session.next_logits
    with engine_of(model, "random", keep=0.3) as engine:
        opened = engine.open(tmp_path / "book")
        assert torch.equal(opened.next_logits, wanted)
        decode(opened, TEXT[:20])


def test_disk_takes_what_the_host_cannot(model: Any, tmp_path: Path) -> None:
    size = record_bytes(model)
    tiers = {"host_budget_bytes": 2 * size, "disk_path": str(tmp_path), "disk_budget_bytes": 6 * size}
    with engine_of(model, "random", keep=0.3, **tiers) as engine:
        session = engine.session()
        session.append(TEXT[:100])
        held = session.stats()["tiers"]
        assert held["host"] == {"pages": 2, "bytes": 2 * size} and held["disk"] == {"pages": 4, "bytes": 4 * size}
        with pytest.raises(BudgetError, match=f"{3 * size:,} bytes needed, {2 * size:,} available"):
            session.append(TEXT[:50])
        session.close()
        assert engine.store.host.used_records() == engine.store.disk.used_records() == []
        engine.session().append(TEXT[:120])


def test_a_batch_over_budget_changes_no_session(model: Any) -> None:
    """Both rows need a host record and there is one: the first row does not keep it."""
    size = record_bytes(model)
    with engine_of(model, "random", keep=0.5, host_budget_bytes=4 * size) as engine:
        a, b = engine.session(), engine.session()
        a.append(TEXT[:31])
        b.append(TEXT[:47])
        for batch in ([a, b], [b, a]):
            with pytest.raises(BudgetError, match=f"host: {size:,} bytes needed, 0 available"):
                engine.decode(batch, [1, 1])
            assert engine.store.host.available == 1 and (a.ids, b.ids) == (TEXT[:31], TEXT[:47])
            engine.check()
        decode(a, TEXT[:3])
        with pytest.raises(BudgetError):
            decode(b, TEXT[:1])
        a.close()
        decode(b, TEXT[:3])
