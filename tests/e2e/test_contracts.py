"""Contracts 1 and 2 on the whole engine, against the unmodified transformers model; and what a failed forward leaves.

Contract 1: with everything resident, the stock model. Contract 2: with any selection, the stock model whose Lightning
Indexers see -inf for what is not resident. All in fp32, logits within 1e-4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    7: [0, 1, 3, 4, 6, 7, 8, 13, 14, 15, 16, 17, 31, 32, 33, 63, 128, 131],
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


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chunk", LENGTHS)
def test_every_length_of_a_prompt(model: Any, text_logits: torch.Tensor, chunk: int) -> None:
    check_lengths(model, text_logits, range(301), chunk)


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


@settings(max_examples=10, phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=histories())
def test_any_selection_is_stock_without_what_is_not_resident(
    model: Any, stock: Stock, history: dict[str, Any]
) -> None:
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
