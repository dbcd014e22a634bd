"""A prefill that holds its history on the device reads what one does that holds nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flashmem import Engine, LSAConfig
from support.stock import FixedPages, InjectedError, failing_layer, make_model, tokens

SETTINGS: dict[str, Any] = {"policy": FixedPages(), "page_chunks": 4, "prefill_chunk": 13, "recency_pages": 1}


def logits(budget: int | None, lengths: tuple[int, ...], **options: Any) -> list[torch.Tensor]:
    """After each append."""
    engine = Engine(make_model("tiny"), config=LSAConfig(**SETTINGS | options, history_budget_bytes=budget))
    try:
        session, found = engine.session(), []
        for seed, length in enumerate(lengths):
            session.append(tokens(length, seed=seed))
            assert session.pages.held_rows() is None and session.next_logits is not None
            found.append(session.next_logits)
        engine.check()
        return found
    finally:
        engine.close()


@pytest.mark.parametrize("kv_format", ["auto", "fp8"])
@pytest.mark.parametrize("budget", [None, 1 << 12, 1 << 14, 1 << 24])
def test_any_budget(budget: int | None, kv_format: str) -> None:
    lengths = (61, 3, 40, 150)
    for found, wanted in zip(
        logits(budget, lengths, kv_format=kv_format), logits(0, lengths, kv_format=kv_format), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_memory_is_brought_in(tmp_path: Path) -> None:
    """What was saved before, and what a failed forward in between wrote, on two engines."""
    found = []
    for budget in (0, 1 << 24):
        engine = Engine(make_model("tiny"), config=LSAConfig(**SETTINGS, history_budget_bytes=budget))
        with engine.session() as session:
            session.append(tokens(150))
            session.save(tmp_path / "memory")
        session = engine.open(tmp_path / "memory")
        with failing_layer(engine.backbone.model, 1), pytest.raises(InjectedError):
            session.append(tokens(40, seed=1))
        assert session.pages.held_rows() is None
        session.append(tokens(40, seed=2))
        assert session.next_logits is not None
        found.append(session.next_logits)
        engine.check()
        engine.close()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_a_budget_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="history_budget_bytes must not be negative, got -1"):
        LSAConfig(history_budget_bytes=-1)
