"""Batches of sessions of different lengths, pages and cycle phases say what every session says alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flashmem import Engine, LSAConfig, Session
from support.stock import FixedPages, InjectedError, Stock, Timeline, failing_layer, make_model, tokens

KEPT = frozenset({1, 4, 6})
TAU = 5
PROMPTS = (1, 3, 31, 33, 64, 126, 150, 255)  # beside chunk, page (16), window (32) and HCA block (128)


@pytest.fixture(scope="module")
def stock() -> Stock:
    return Stock("yarn")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("yarn")


@pytest.fixture
def engine(model: Any) -> Iterator[Engine]:
    config = LSAConfig(policy=FixedPages(KEPT), page_chunks=4, tau=TAU, prefill_chunk=50, recency_pages=1)
    engine = Engine(model, config=config)
    yield engine
    engine.close()


class Follower:
    """A session fed with a fixed text, and the stock model's logits for it."""

    def __init__(self, engine: Engine, stock: Stock, length: int, steps: int) -> None:
        self.text, self.session = tokens(length + steps, seed=length), engine.session()
        timeline = Timeline(4, KEPT, TAU, recency=1)
        timeline.append(length)
        timeline.decode(steps)
        self.wanted = stock.logits(self.text, timeline.allowed())
        self.session.append(self.text[:length])

    @property
    def at(self) -> int:
        return self.session.state.position


def decode(engine: Engine, batch: list[Follower]) -> None:
    logits = engine.decode([f.session for f in batch], [f.text[f.at] for f in batch])
    wanted = torch.stack([f.wanted[f.at - 1] for f in batch])
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    for follower, row in zip(batch, logits, strict=True):
        assert torch.equal(follower.session.next_logits, row)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_batch_is_each_session_alone(engine: Engine, stock: Stock, size: int) -> None:
    followers = [Follower(engine, stock, length, 24) for length in PROMPTS[-size:]]
    for _ in range(24):
        decode(engine, followers)
    engine.check()


def test_sessions_join_and_leave_while_others_decode(engine: Engine, stock: Stock) -> None:
    """A new session every third step, of another length each; each leaves after 12 to 19 steps."""
    waiting, live, done, sizes = list(enumerate(PROMPTS)), [], 0, set()
    while waiting or live:
        if waiting and (not live or sum(f.at for f in live) % 3 == 0):
            index, length = waiting.pop(0)
            live.insert(index % 2, Follower(engine, stock, length, 12 + index))  # rows move
        decode(engine, live)
        sizes.add(len(live))
        for follower in [f for f in live if f.at == len(f.text)]:
            follower.session.close()
            live.remove(follower)
            done += 1
        engine.check()
    assert done == len(PROMPTS) and len(sizes) > 2


def test_turns_of_different_sessions_interleave(engine: Engine, stock: Stock) -> None:
    """One session reads a prompt while the other is in the middle of a window; then they decode together."""
    texts = [tokens(120, seed=i) for i in (1, 2)]
    a, b = engine.session(), engine.session()
    lines = [Timeline(4, KEPT, TAU, recency=1) for _ in texts]
    a.append(texts[0][:50])
    lines[0].append(50)
    logits: list[list[torch.Tensor]] = [[], []]
    for token in texts[0][50:53]:
        logits[0].append(engine.decode([a], [token])[0])
    lines[0].decode(3)
    b.append(texts[1][:90])
    lines[1].append(90)
    for step in range(10):
        rows = engine.decode([b, a], [texts[1][90 + step], texts[0][53 + step]])
        logits[1].append(rows[0])
        logits[0].append(rows[1])
    for line in lines:
        line.decode(10)
    for text, line, rows in zip(texts, lines, logits, strict=True):
        wanted = stock.logits(text[: line.position], line.allowed())[-len(rows) :]
        torch.testing.assert_close(torch.stack(rows), wanted, rtol=0, atol=1e-4)
    engine.check()


def test_a_failed_batch_can_be_repeated_or_split(engine: Engine, stock: Stock, model: Any) -> None:
    followers = [Follower(engine, stock, length, 8) for length in (3, 31, 127)]
    for _ in range(4):
        decode(engine, followers)
    for batches in ([followers], [followers[:1], followers[1:]], [followers[::-1]]):
        with failing_layer(model, 2), pytest.raises(InjectedError):
            engine.decode([f.session for f in followers], [f.text[f.at] for f in followers])
        engine.check()
        for batch in batches:
            decode(engine, batch)


def test_generate_in_batches_is_generate_alone(engine: Engine) -> None:
    prompts = [tokens(length, seed=length) for length in (2, 40, 129)]
    alone = []
    for prompt in prompts:
        with engine.session() as session:
            alone.append(session.generate(prompt, max_new_tokens=10))
    sessions: list[Session] = [engine.session() for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.append(prompt)
    together = engine.generate(sessions, max_new_tokens=6)
    more = engine.generate(sessions, max_new_tokens=4)
    assert [a + b for a, b in zip(together, more, strict=True)] == alone
    assert [s.ids for s in sessions] == [p + a for p, a in zip(prompts, alone, strict=True)]


def test_sampling_depends_on_the_seed_alone(engine: Engine) -> None:
    def sample(seed: int) -> list[int]:
        with engine.session() as session:
            return session.generate(tokens(20), max_new_tokens=8, temperature=1.0, top_p=0.9, seed=seed)

    assert sample(1) == sample(1) != sample(2)
    with engine.session() as session, pytest.raises(ValueError, match="temperature"):
        session.generate(tokens(3), temperature=-1.0)
