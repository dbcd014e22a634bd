"""The benchmark of training steps at tiny sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from benchmarks.training_step import Shape

from benchmarks import training_step

TINY = {"hidden_size": 32, "q_rank": 16, "num_heads": 4, "head_dim": 64, "layers": (1, 4)}
SHAPE = Shape(chunks=300, queries=4, batch=6, sampled=40, positives=10, page_chunks=8)


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training_step.SIZES, "tiny", TINY)


def test_rows_say_what_a_step_did() -> None:
    result = training_step.run(["tiny"], SHAPE, device="cpu", steps=2, observe=[1, 3], budgets=[1 << 12], square=64)
    json.dumps(result)
    rows = result["rows"]
    assert len(rows) == 2 * 5 and all(row["pairs_per_second"] > 0 and row["peak_bytes"] is None for row in rows)
    work = {(row["system"], row["queries"], row["chunks_per_query"]) for row in rows}
    assert work == {("published", 6, 40), ("published, all chunks", 4, 300), ("ours", 4, 300)}
    assert training_step.ELEMENT_BUDGET["cpu"] != 1 << 12  # put back
    for ratios in result["ratios"]:
        assert ratios["pairs_per_second_ratio"] > 0 and ratios["peak_memory_ratio"] is None
        ours, same = (next(r for r in rows if (r["system"], r["dtype"]) == (system, ratios["dtype"]))
                      for system in ("ours", "published, all chunks"))  # fmt: skip
        expected = ours["pairs_per_second"] / same["pairs_per_second"]
        assert ratios["same_work_time_ratio"] == pytest.approx(expected, abs=1e-3)


def test_a_wrong_score_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    training_step.check("tiny", SHAPE, "cpu")
    right = training_step.PublishedStep.logits
    monkeypatch.setattr(training_step.PublishedStep, "logits", lambda *args: 1.01 * right(*args))
    with pytest.raises(AssertionError):
        training_step.check("tiny", SHAPE, "cpu")


@pytest.mark.parametrize("ours", [True, False])
def test_steps_train(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    update = training_step.update

    def keep(loss: torch.Tensor, *rest: Any) -> None:
        losses.append(float(loss.detach()))
        update(loss, *rest)

    monkeypatch.setattr(training_step, "update", keep)
    if ours:
        step = training_step.our_step("tiny", SHAPE, "cpu", torch.bfloat16, 2)
    else:
        step = training_step.published_step("tiny", SHAPE, "cpu", torch.bfloat16, batch=6, sampled=40)
    for _ in range(30):
        step()
    assert sum(losses[-5:]) < 0.99 * sum(losses[:5])
