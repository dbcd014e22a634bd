"""Contracts 1 and 2 on the whole engine, against the unmodified transformers model; and what a failed forward leaves.

Contract 1: with everything resident, the stock model. Contract 2: with any selection, the stock model whose Lightning
Indexers see -inf for what is not resident. All in fp32, logits within 1e-4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flashmem import Engine, LSAConfig, Session
from support.stock import GEOMETRIES, FixedPages, InjectedError, Stock, Timeline, failing_layer, make_model, tokens

PAGE_TOKENS = 16  # page_chunks=4; the geometries' sliding window is 32, an HCA block 128
TEXT = tokens(340, seed=1)
LENGTHS = {  # by tokens per prefill forward, none a multiple of 4 or 128
    7: [0, 1, 3, 4, 6, 7, 8, 13, 14, 15, 16, 17, 31, 32, 33, 63, 128, 131, 257, 300],
    50: [2, 5, 48, 50, 64, 100, 101, 125, 127, 143, 145, 150, 255, 257],
    129: [47, 49, 65, 124, 126, 129, 130, 132, 144, 256, 258, 259, 299, 300],
}
AFTER = 5
"""Decoded tokens after each prompt: more than a chunk."""


@contextmanager
def engine_of(model: Any, **options: Any) -> Iterator[Engine]:
    """An engine that has consistent tiers at the end, and gives the model back also when a test fails."""
    engine = Engine(model, config=LSAConfig(**{"policy": "all", "page_chunks": 4, **options}))
    try:
        yield engine
        engine.check()
    finally:
        engine.close()


def close_to(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def decode(session: Session, ids: Iterable[int]) -> torch.Tensor:
    return torch.cat([session.engine.decode([session], [token]) for token in ids])


@pytest.fixture(scope="module", params=GEOMETRIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def stock(name: str) -> Stock:
    return Stock(name)


@pytest.fixture(scope="module")
def text_logits(stock: Stock) -> torch.Tensor:
    return stock.logits(TEXT)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return make_model(name)


# ---- contract 1


def check_lengths(model: Any, wanted: torch.Tensor, lengths: Iterable[int], chunk: int) -> None:
    with engine_of(model, prefill_chunk=chunk, tau=3) as engine:
        for length in lengths:
            with engine.session() as session:
                session.append(TEXT[:length])
                if length:
                    close_to(session.next_logits, wanted[length - 1])
                close_to(decode(session, TEXT[length : length + AFTER]), wanted[length : length + AFTER])
                session.check()


@pytest.mark.parametrize("chunk", LENGTHS)
def test_every_boundary_of_a_prompt(model: Any, text_logits: torch.Tensor, chunk: int) -> None:
    check_lengths(model, text_logits, LENGTHS[chunk], chunk)


def chunk_of(length: int) -> int:
    """Small prefill chunks for short prompts only, since they cost most."""
    return 7 if length < 60 else 50 if length % 2 else 129


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chunk", LENGTHS)
def test_every_length_of_a_prompt(model: Any, text_logits: torch.Tensor, chunk: int) -> None:
    """0..300, each with one of the chunk sizes; then all sessions decode as one batch."""
    lengths = [length for length in range(301) if chunk_of(length) == chunk]
    with engine_of(model, prefill_chunk=chunk, tau=3) as engine:
        sessions = [engine.session() for _ in lengths]
        for length, session in zip(lengths, sessions, strict=True):
            session.append(TEXT[:length])
            if length:
                close_to(session.next_logits, text_logits[length - 1])
        for step in range(AFTER):
            places = [length + step for length in lengths]
            close_to(engine.decode(sessions, [TEXT[place] for place in places]), text_logits[places])


@pytest.mark.parametrize("length", [3, 61])
def test_greedy_tokens_are_those_of_generate(model: Any, stock: Stock, length: int) -> None:
    prompt = torch.tensor([TEXT[:length]])
    wanted = stock.model.generate(prompt, max_new_tokens=20, do_sample=False)[0, length:].tolist()
    with engine_of(model, prefill_chunk=50, tau=7) as engine:
        assert engine.session().generate(TEXT[:length], max_new_tokens=20) == wanted


def test_turns(model: Any, stock: Stock) -> None:
    """Append, generate, append, generate: every token is what stock would say after all that came before."""
    with engine_of(model, prefill_chunk=29, tau=5) as engine:
        session = engine.session()
        for turn, length in enumerate((2, 70, 1, 64, 21)):
            start = len(session.ids) + length
            new = session.generate(tokens(length, seed=turn), max_new_tokens=(9, 1, 6, 12, 3)[turn])
            assert session.ids[start:] == new
            assert new == stock.logits(session.ids)[start - 1 : -1].argmax(-1).tolist()
            engine.check()
        first = len(session.ids)
        decode(session, [session.ids[-1]])  # decided by generate, not run yet
        close_to(decode(session, TEXT[:3]), stock.logits(session.ids)[first:])


def test_generate_goes_on_where_it_stopped(model: Any, stock: Stock) -> None:
    with engine_of(model, tau=4) as engine:
        session = engine.session()
        first = session.generate(TEXT[:33], max_new_tokens=6)
        assert session.state.position == 33 + 5  # the last token has not run
        more = session.generate(max_new_tokens=6)
        wanted = stock.logits([*TEXT[:33], *first, *more])[32:-1]
        assert first + more == wanted.argmax(-1).tolist()


# ---- contract 2


@st.composite
def histories(draw: st.DrawFn) -> dict[str, Any]:
    tau = draw(st.sampled_from([1, 3, 7, 16]))
    turns = st.lists(st.tuples(st.integers(0, 150), st.integers(1, 20)), min_size=1, max_size=2)
    return {
        "pages": draw(st.frozensets(st.integers(0, 16), max_size=6)),
        "tau": tau,
        "lead": draw(st.integers(0, min(tau - 1, 4))),
        "sink_pages": draw(st.integers(0, 2)),
        "recency_pages": draw(st.integers(1, 3)),
        "prefill_chunk": draw(st.sampled_from([7, 50, 129])),
        "turns": draw(turns),
    }


@settings(
    max_examples=10,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(history=histories())
def test_any_selection_is_stock_without_what_is_not_resident(model: Any, stock: Stock, history: dict[str, Any]) -> None:
    options = dict(history)
    turns, pages = options.pop("turns"), options.pop("pages")
    timeline = Timeline(4, pages, options["tau"], options["lead"], options["sink_pages"], options["recency_pages"])
    with engine_of(model, policy=FixedPages(pages), **options) as engine:
        session, rest, rows, got = engine.session(), iter(TEXT), [], []
        for appended, decoded in turns:
            if new := list(itertools.islice(rest, appended)):
                session.append(new)
                timeline.append(appended)
                rows.append(timeline.position - 1)
                got.append(session.next_logits[None])
            rows += range(timeline.position, timeline.position + decoded)
            got.append(decode(session, itertools.islice(rest, decoded)))
            timeline.decode(decoded)
    wanted = stock.logits(TEXT[: timeline.position], timeline.allowed())
    close_to(torch.cat(got), wanted[rows])


@pytest.mark.parametrize("kept", [frozenset(), frozenset({3, 7})])
def test_a_selection_changes_what_the_model_says(stock: Stock, kept: frozenset[int]) -> None:
    """So that the test above cannot pass on an oracle that masks nothing."""
    timeline = Timeline(4, kept, recency=1)
    timeline.append(300)
    timeline.decode(20)
    masked, plain = stock.logits(TEXT[:320], timeline.allowed()), stock.logits(TEXT[:320])
    close_to(masked[:300], plain[:300])
    assert (masked - plain)[300:].abs().max() > 1e-2


def test_chunks_born_in_a_window_are_attendable_at_once(model: Any, stock: Stock) -> None:
    """One window of 70 steps over nothing but a sink and the newest page: four pages fill up in it."""
    timeline = Timeline(4, frozenset(), tau=70, recency=1)
    with engine_of(model, policy=FixedPages(), recency_pages=1, tau=70) as engine:
        session = engine.session()
        session.append(TEXT[:100])
        got = decode(session, TEXT[100:170])
        assert session.pages.resident == (0, *range(100 // PAGE_TOKENS, 170 // PAGE_TOKENS + 1))
    timeline.append(100)
    timeline.decode(70)
    close_to(got, stock.logits(TEXT[:170], timeline.allowed())[100:])


# ---- tiers, and forwards that fail midway (one geometry)


@pytest.fixture(scope="module")
def plain_stock() -> Stock:
    return Stock("hash-moe")


@pytest.fixture(scope="module")
def plain_model() -> Any:
    return make_model("hash-moe")


@pytest.mark.parametrize("kv_format", ["fp32", "fp8"])
def test_tiers_do_not_change_results(plain_model: Any, kv_format: str, tmp_path: Path) -> None:
    """Pages on disk give the logits that pages in host memory give."""
    options = {"policy": FixedPages(frozenset({2, 5})), "kv_format": kv_format, "tau": 6, "prefill_chunk": 50}
    with engine_of(plain_model, **options) as engine:
        session = engine.session()
        session.append(TEXT[:200])
        wanted, size = decode(session, TEXT[200:230]), engine.layout.record_bytes
    assert wanted.isfinite().all()
    with engine_of(plain_model, **options, host_budget_bytes=3 * size, disk_path=str(tmp_path)) as engine:
        session = engine.session()
        session.append(TEXT[:200])
        assert torch.equal(decode(session, TEXT[200:230]), wanted)
        tiers = session.stats()["tiers"]
        assert tiers["host"]["pages"] == 3 and tiers["disk"]["pages"] == 230 // PAGE_TOKENS - 3


def test_fp8_stays_close(plain_model: Any, plain_stock: Stock) -> None:
    """Not exact by design: the format rounds entries, and rounded keys pick other chunks now and then."""
    wanted = plain_stock.logits(TEXT[:200])
    with engine_of(plain_model, kv_format="fp8", prefill_chunk=50) as engine:
        session = engine.session()
        session.append(TEXT[:170])
        got = torch.cat((session.next_logits[None], decode(session, TEXT[170:200])))
    error = (got - wanted[169:]).abs().mean() / wanted.abs().mean()
    assert 0 < error < 0.25


@pytest.fixture
def engine(plain_model: Any) -> Iterator[Engine]:
    with engine_of(plain_model, policy=FixedPages(frozenset({1, 4})), tau=3, prefill_chunk=400) as engine:
        yield engine


@pytest.mark.parametrize("fail_at", range(7))  # boundaries of chunk, page, HCA block and window are among them
def test_a_failed_decode_step_can_be_repeated(engine: Engine, plain_model: Any, fail_at: int) -> None:
    results = []
    for failing in (False, True):
        with engine.session() as session:
            session.append(TEXT[:122])
            results.append(decode(session, TEXT[122 : 122 + fail_at]) if fail_at else torch.empty(0, 320))
            if failing:
                with failing_layer(plain_model, fail_at % 4), pytest.raises(InjectedError):
                    engine.decode([session], [TEXT[122 + fail_at]])
                assert session.ids == TEXT[: 122 + fail_at]
                engine.check()
            results[-1] = torch.cat((results[-1], decode(session, TEXT[122 + fail_at : 134])))
            assert session.ids == TEXT[:134]
    assert torch.equal(*results)


def counts(session: Session) -> dict[str, Any]:
    """Everything that `stats` counts; the all-in bytes see that index rows grew, which is no loss."""
    return {name: value for name, value in session.stats().items() if not name.endswith("_all_in")}


def test_another_token_may_follow_a_failed_step(engine: Engine, plain_model: Any) -> None:
    results = []
    for failing in (False, True):
        with engine.session() as session:
            session.append(TEXT[:127])
            if failing:  # it would have completed a chunk, a page and an HCA block
                with failing_layer(plain_model, 3), pytest.raises(InjectedError):
                    engine.decode([session], [5])
            session.append(TEXT[127:140])
            results.append(decode(session, TEXT[140:150]))
    assert torch.equal(*results)


@pytest.mark.parametrize("observed", [1, 3])
def test_a_failed_step_leaves_no_trace_in_what_level_1_sees(plain_model: Any, observed: int, tmp_path: Path) -> None:
    views = []
    for failing in (False, True):
        with engine_of(plain_model, policy="lsa", keep=0.4, observation_window=observed) as engine:
            session = engine.session()
            session.append(TEXT[:100])
            if failing:
                with failing_layer(plain_model, 3), pytest.raises(InjectedError):
                    engine.decode([session], [5])
            views.append([session.state.observed(layer) for layer in engine.layout.target_layers])
    assert all(torch.equal(a, b) for a, b in zip(*views, strict=True))


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("length", [1, 63, 128, 200])
def test_a_failed_prefill_can_be_repeated(engine: Engine, plain_model: Any, length: int, pending: bool) -> None:
    results = []
    for layer in (None, 0, 3):
        with engine.session() as session:
            session.append(TEXT[:61])
            if pending:  # the second token is decided but has not run
                session.generate(max_new_tokens=2)
            else:
                decode(session, TEXT[61:62])
            before, stats = list(session.ids), counts(session)
            if layer is not None:
                with failing_layer(plain_model, layer), pytest.raises(InjectedError):
                    session.append(TEXT[62 : 62 + length])
                assert session.ids == before and counts(session) == stats
                engine.check()
            session.append(TEXT[62 : 62 + length])
            results.append(torch.cat((session.next_logits[None], decode(session, TEXT[:5]))))
            assert session.ids == [*before, *TEXT[62 : 62 + length], *TEXT[:5]]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("go_on", [False, True])
def test_prefill_chunks_that_ran_stay(plain_model: Any, plain_stock: Stock, pending: bool, go_on: bool) -> None:
    """The second of three chunks fails: the session stands after the first one, and may go on or be asked at once."""
    timeline = Timeline(4, frozenset({1}), tau=5)
    with engine_of(plain_model, policy=FixedPages(timeline.pages), prefill_chunk=50, tau=5) as engine:
        session = engine.session()
        session.append(TEXT[:30])
        first = session.generate(max_new_tokens=1) if pending else []
        with failing_layer(plain_model, 1, after=1), pytest.raises(InjectedError):
            session.append(TEXT[100:230])
        ran = TEXT[100 : 150 - len(first)]
        assert session.ids == [*TEXT[:30], *first, *ran] and session.state.position == 80
        engine.check()
        timeline.append(80)
        if go_on:
            session.append(TEXT[150:230])
            timeline.append(80)
        logits = [session.next_logits[None], decode(session, TEXT[:7])]  # level 1 runs first: never blind, never stale
        timeline.decode(7)
        close_to(torch.cat(logits), plain_stock.logits(session.ids, timeline.allowed())[-8:])


def test_bad_calls_change_nothing(engine: Engine) -> None:
    session = engine.session()
    session.append([])
    assert session.ids == [] and session.next_logits is None
    with pytest.raises(ValueError, match="nothing to continue from"):
        session.generate()
    session.append(TEXT[:40])
    session.generate(max_new_tokens=2)
    before = list(session.ids)
    for call in (
        lambda: session.append([1, 320]),
        lambda: session.append([-1]),
        lambda: engine.decode([session], [320]),
    ):
        with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.319, got"):
            call()
    with pytest.raises(ValueError, match="distinct"):
        engine.decode([session, session], [1, 2])
    with pytest.raises(ValueError, match="at least one"):
        engine.decode([], [])
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        session.generate(max_new_tokens=0)
    with pytest.raises(ValueError, match="no tokenizer"):
        session.append("text")
    assert session.ids == before
    session.check()
    session.close()
    for call in (lambda: session.append([1]), session.generate, lambda: engine.decode([session], [1])):
        with pytest.raises(ValueError, match="closed"):
            call()
