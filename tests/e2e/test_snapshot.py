"""A session that resumes from a snapshot goes on as the session did, or as another policy would have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flashmem import Engine, LSAConfig
from flashmem.backbone import random_model
from flashmem.policy import AllPages, RecencyPolicy


def make_engine(**config: Any) -> Engine:
    values = {"page_chunks": 4, "tau": 8, "prefill_chunk": 60, "policy": "native", "keep": 0.4} | config
    return Engine(random_model("CHC", seed=1, eos_token_id=None), config=LSAConfig(**values))


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("length", [1, 15, 16, 130, 203])  # around a chunk, a page and a prefill chunk
def test_a_resumed_session_goes_on_as_the_session_does(length: int) -> None:
    engine = make_engine()
    session = engine.session()
    session.append(tokens(length))
    snapshot = session.snapshot()
    resumed = engine.resume(snapshot)
    assert resumed.cycle.selection == session.cycle.selection
    expected = session.generate(max_new_tokens=20)  # writes over the snapshot's last page, were it not a copy
    assert resumed.generate(max_new_tokens=20) == expected
    assert engine.resume(snapshot).generate(tokens(9, seed=1), max_new_tokens=9) == engine.resume(snapshot).generate(
        tokens(9, seed=1), max_new_tokens=9
    )
    engine.check()


def test_snapshots_share_the_pages_of_an_opened_memory(tmp_path: Path) -> None:
    engine = make_engine()
    with engine.session() as session:
        session.append(tokens(150))
        session.save(tmp_path / "book.mem")
        session.append(tokens(40, seed=1))
        expected = session.generate(max_new_tokens=20)
    with engine.open(tmp_path / "book.mem") as opened:
        opened.append(tokens(40, seed=1))
        snapshot = opened.snapshot()
    assert snapshot.records.num_records == 12  # 190 tokens are 47 chunks in pages of 4
    assert snapshot.records._more.num_records == 12 - 150 // 16  # type: ignore[attr-defined]
    with engine.resume(snapshot) as resumed:
        again = engine.resume(resumed.snapshot())
        assert resumed.generate(max_new_tokens=20) == expected
    assert again.generate(max_new_tokens=20) == expected
    engine.check()


def test_a_policy_of_its_own_selects_at_once() -> None:
    engine = make_engine()
    session = engine.session()
    session.append(tokens(150))
    snapshot = session.snapshot()
    narrow = engine.resume(snapshot, policy=RecencyPolicy(pages=4))
    assert narrow.pages.resident == (0, 7, 8, 9)  # 37 chunks in 10 pages: the sink and the newest
    wide = engine.resume(snapshot, policy=AllPages())
    assert wide.pages.resident == tuple(range(10))

    plain = make_engine(policy="all", keep=None)
    exact = plain.session()
    exact.append(tokens(150))
    assert wide.generate(max_new_tokens=20) == exact.generate(max_new_tokens=20)
    assert len(narrow.generate(max_new_tokens=20)) == 20
    engine.check()


def test_rescue_is_the_sessions_own_and_brings_the_native_scorer() -> None:
    model = random_model("CHC", seed=1, eos_token_id=None)
    probe = Engine(model)
    indexer = probe.indexer
    probe.close()
    engine = Engine(model, indexer=indexer, config=LSAConfig(page_chunks=4, tau=64, keep=0.3))
    assert "native" not in engine.scorers
    session = engine.session()
    session.append(tokens(200))
    snapshot = session.snapshot()
    resumed = engine.resume(snapshot, rescue=True)
    resumed.generate(max_new_tokens=20)
    assert resumed.stats()["looks"] > 0
    session.generate(max_new_tokens=20)
    assert session.stats()["looks"] == 0
    engine.check()
