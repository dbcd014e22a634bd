"""Long prefills beside the stock model: same logits first, then lengths up to a limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashmem import LSAConfig
from flashmem.backbone import random_model
from flashmem.bench import prefill

CONFIG = LSAConfig(policy="native", keep=0.3, page_chunks=4, prefill_chunk=64)
OURS = prefill.OURS["reference"]
ROOMY = prefill.Limits(peak_bytes=1 << 40, seconds=1e6, our_seconds=1e6)


def run(limits: prefill.Limits = ROOMY, lengths: tuple[int, ...] = (300,)) -> dict[str, Any]:
    model = random_model("WCHC", vocab_size=300)
    result = prefill.run(model, config=CONFIG, indexer=None, first=100, lengths=lengths, limits=limits)
    assert type(model.model.layers[0].self_attn).__name__ == "DeepseekV4Attention"  # given back
    return result


def test_paths_agree_and_are_compared_at_the_longest_length() -> None:
    result = run()
    assert max(result["errors_at_first"].values()) < 1e-3
    assert [(row["path"], row["tokens"]) for row in result["rows"]] == [
        (prefill.WHOLE, 100), (prefill.WHOLE, 200), (prefill.PIECES, 100), (prefill.PIECES, 200), (OURS, 200),
        (OURS, 300),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["seconds"] > 0 and row["peak_bytes"] >= 0
    assert [(ratio["path"], ratio["tokens"]) for ratio in result["ratios"]] == [
        (prefill.WHOLE, 200),
        (prefill.PIECES, 200),
    ]
    assert all(ratio["seconds_ratio"] > 0 for ratio in result["ratios"])


def test_limits_end_a_path_and_say_so() -> None:
    limits = prefill.Limits(peak_bytes=1 << 40, seconds=1e-6, our_seconds=0.0)
    result = run(limits, (400,))
    whole, ours = result["rows"][:2], result["rows"][-1]
    assert "seconds" in whole[0] and "not tried" in whole[1]["failed"]
    assert ours["tokens"] == 400 and ours["failed"] == "64 of 400 tokens after 0 s"


def test_wrong_logits_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = prefill._in_pieces
    monkeypatch.setattr(prefill, "_in_pieces", lambda *arguments: right(*arguments) + 1)
    pieces = [row for row in run()["rows"] if row["path"] == prefill.PIECES]
    assert len(pieces) == 1 and "not timed" in pieces[0]["failed"]
    monkeypatch.setattr(prefill, "_ours", lambda model, *arguments: torch.zeros(300))
    with pytest.raises(AssertionError, match="differ from the stock"):
        run()
