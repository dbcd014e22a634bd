"""Prefill on the fused kernels says what prefill on the reference says; in Triton's interpreter without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashmem import Engine, LSAConfig, Session
from flashmem.backbone import fused_prefill, random_model
from flashmem.kernels import sparse_attention
from support.stock import TINY, FixedPages, InjectedError, failing_layer, make_model, tokens

pytestmark = pytest.mark.usefixtures("triton_device")


def engines(device: torch.device, layers: str = "CH", **options: Any) -> tuple[Engine, Engine]:
    """Few index heads: the interpreter takes its time over each, and equal scores are no harm here."""
    settings = {"page_chunks": 4, "tau": 5, "sink_pages": 0, "recency_pages": 1, "prefill_chunk": 13} | options
    reference, fused = (
        Engine(
            random_model(**TINY | {"layers": layers, "index_n_heads": 4}).to(device),
            config=LSAConfig(**settings, prefill_kernels=kernels),
        )
        for kernels in ("reference", "fused")
    )
    return reference, fused


def same(sessions: tuple[Session, ...]) -> None:
    reference, fused = (session.next_logits for session in sessions)
    assert reference is not None and fused is not None
    torch.testing.assert_close(fused, reference, rtol=0, atol=1e-4)
    assert sessions[0].pages.resident == sessions[1].pages.resident


@pytest.mark.parametrize(
    ("layers", "options", "tile"),
    [
        ("CH", {"policy": "all"}, 5),
        pytest.param("C", {"kv_format": "fp8", "history_budget_bytes": 1 << 20}, 65_536, marks=pytest.mark.slow),
        pytest.param("CHWC", {"kv_format": "fp8"}, 5, marks=pytest.mark.slow),
        pytest.param("CC", {"history_budget_bytes": 1 << 20}, 5, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_appends(
    layers: str, options: dict[str, Any], tile: int, monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    """Within a chunk and over many; tiles end within pages, and gathers are cut. A policy that keeps only the newest
    page leaves the others on the host; appends of two chunks hold the history, if asked to."""
    monkeypatch.setattr(fused_prefill, "STORED_TILE", tile)
    monkeypatch.setattr(sparse_attention, "GATHERED_BYTES", 1 << 11)
    pair = engines(triton_device, layers, **{"policy": FixedPages()} | options)
    sessions = tuple(engine.session() for engine in pair)
    try:
        for seed, length in enumerate((1, 3, 15, 6)):
            for session in sessions:
                session.append(tokens(length, seed=seed))
            same(sessions)
        assert len(sessions[1].pages.resident) == (2 if "policy" in options else 1)
    finally:
        for engine in pair:
            engine.check()
            engine.close()


def test_a_failed_prefill_changes_nothing(triton_device: torch.device) -> None:
    pair = engines(triton_device, policy="all", prefill_chunk=3)
    sessions = tuple(engine.session() for engine in pair)
    for session in sessions:
        session.append(tokens(4))
    with failing_layer(pair[1].backbone.model, 1), pytest.raises(InjectedError):
        sessions[1].append(tokens(4, seed=1))
    for session in sessions:
        session.append(tokens(4, seed=1))
    same(sessions)


def test_observed_picks_come_from_the_reference(triton_device: torch.device) -> None:
    _, engine = engines(triton_device, policy="all")
    seen: list[int] = []
    engine.on_prefill_picks = lambda layer, picks: seen.append(layer)
    engine.session().append(tokens(9))
    assert seen == [0]


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, triton_device: torch.device) -> None:
    from triton import knobs

    with pytest.raises(ValueError, match="prefill_kernels must be 'reference' or 'fused', got 'tiled'"):
        LSAConfig(prefill_kernels="tiled")  # type: ignore[arg-type]
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="prefill_kernels='fused' needs all layers on CUDA devices, got one on cpu"):
        Engine(make_model("tiny"), config=LSAConfig(prefill_kernels="fused"))
