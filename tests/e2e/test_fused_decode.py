"""Decoding on the fused kernels says what decoding on the reference says; in Triton's interpreter without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashmem import Engine, LSAConfig, Session
from flashmem.backbone import random_model
from support.stock import FixedPages, InjectedError, failing_layer, make_model, tokens

pytestmark = pytest.mark.usefixtures("triton_device")

KEPT = frozenset({1, 4, 6})


class Pair:
    """An engine on the reference and one on the fused kernels; whatever is done is done to both, and compared."""

    def __init__(self, name: str, device: torch.device, **options: Any) -> None:
        settings = {"page_chunks": 4, "tau": 5, "recency_pages": 1, "prefill_chunk": 64} | options
        self.engines = [
            Engine(make_model(name).to(device), config=LSAConfig(**settings, kernels=kernels))
            for kernels in ("reference", "fused")
        ]
        self.reference, self.fused = self.engines

    def open(self, length: int) -> tuple[Session, ...]:
        sessions = tuple(engine.session() for engine in self.engines)
        for session in sessions:
            session.append(tokens(length, seed=length))
        return sessions

    def decode(self, pairs: list[tuple[Session, ...]]) -> None:
        """Greedy tokens of the reference, one of each session."""
        chosen = [int(pair[0].next_logits.argmax()) for pair in pairs]
        logits = [engine.decode([pair[i] for pair in pairs], chosen) for i, engine in enumerate(self.engines)]
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
        for reference, fused in pairs:
            assert fused.pages.resident == reference.pages.resident

    def close(self) -> None:
        for engine in self.engines:
            engine.check()
            engine.close()


@pytest.mark.parametrize(
    ("name", "kv_format", "lengths"),
    [
        ("yarn", "fp8", (1, 31, 124)),
        ("odd-heads", "auto", (31, 124)),
        pytest.param("four-csa", "fp8", (124,), marks=pytest.mark.slow),
        pytest.param("hash-moe", "auto", (1, 31), marks=pytest.mark.slow),
    ],
)
def test_a_ragged_batch(name: str, kv_format: str, lengths: tuple[int, ...], triton_device: torch.device) -> None:
    """Beside a chunk, a page, the window and an HCA block; the steps pass a chunk and a flip."""
    pair = Pair(name, triton_device, policy=FixedPages(KEPT), kv_format=kv_format)
    try:
        pairs = [pair.open(length) for length in lengths]
        for _ in range(6):
            pair.decode(pairs)
    finally:
        pair.close()


def test_sessions_join_and_leave(triton_device: torch.device) -> None:
    """Rows move, the pool grows, pages come and go, a step fails and is repeated."""
    pair = Pair("yarn", triton_device, policy="native", keep=0.3, tau=3)
    try:
        a, b = pair.open(122), pair.open(30)
        pair.decode([a, b])
        with failing_layer(pair.fused.backbone.model, 3), pytest.raises(InjectedError):
            pair.fused.decode([b[1]], [7])
        c = pair.open(61)
        pair.decode([c, b, a])
        for session in b:
            session.close()
        for session in c:
            session.append(tokens(40, seed=5))
        for _ in range(4):
            pair.decode([a, c])
    finally:
        pair.close()


def test_observed_picks_come_from_the_reference(triton_device: torch.device) -> None:
    pair = Pair("yarn", triton_device, policy="all")
    try:
        seen: list[int] = []
        pair.fused.on_picks = lambda layer, picks: seen.append(layer)
        pairs = [pair.open(30)]
        pair.decode(pairs)
        assert seen == [1, 3]
        pair.fused.on_picks = None
        pair.decode(pairs)
        assert seen == [1, 3]
    finally:
        pair.close()


class Captured(TorchDispatchMode):
    """What a CUDA graph cannot hold is an error: values read back, shapes that depend on values, new host data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "item", "_pin_memory")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.FORBIDDEN), f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype is torch.bool for index in args[1]), "a mask as an index"
        return func(*args, **(kwargs or {}))


def test_a_step_can_be_captured_and_padded(triton_device: torch.device) -> None:
    """Two sessions in four places: the same logits, and nothing in the step waits for the device."""
    pair = Pair("yarn", triton_device, policy="all", kv_format="fp8")
    try:
        pairs, backbone = [pair.open(length) for length in (3, 127)], pair.fused.backbone
        chosen = [int(reference.next_logits.argmax()) for reference, _ in pairs]
        wanted = pair.reference.decode([reference for reference, _ in pairs], chosen)
        sessions, ids = [fused for _, fused in pairs], torch.tensor([*chosen, 0, 0], device=triton_device)
        with torch.no_grad(), backbone.capturable_experts():
            step = pair.fused._begin_decode(sessions, size=4)
            backbone.decode(step.again(), ids)  # twice is once
            with Captured():
                logits = backbone.decode(step, ids)
        pair.fused._end_decode(sessions, step)
        for session, token in zip(sessions, chosen, strict=True):
            session.ids.append(token)
        torch.testing.assert_close(logits[:2], wanted, rtol=0, atol=1e-4)
        assert bool(logits.isfinite().all())
    finally:
        pair.close()


def test_graphs_need_cuda(triton_device: torch.device) -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs kernels='fused'"):
        LSAConfig(cuda_graphs=True)
    if triton_device.type == "cpu":
        with pytest.raises(ValueError, match="all layers on one CUDA device, got"):
            Engine(make_model("tiny"), config=LSAConfig(kernels="fused", cuda_graphs=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"index_topk": 1025}, "at most 1024 index_topk"),
        ({"index_n_heads": 257}, "at most 256 index heads"),
        ({"index_head_dim": 24}, "power of two of index channels"),
    ],
)
def test_models_beyond_the_limits_are_refused(sizes: dict[str, int], message: str, triton_device: torch.device) -> None:
    model = random_model("C", **sizes).to(triton_device)
    with pytest.raises(ValueError, match=message):
        Engine(model, config=LSAConfig(kernels="fused"))
    Engine(model).close()  # given back as it was


def test_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="needs all layers on CUDA devices, got one on cpu"):
        Engine(make_model("tiny"), config=LSAConfig(kernels="fused"))


def test_a_memory_does_not_depend_on_kernels(tmp_path: Path, triton_device: torch.device) -> None:
    pair = Pair("tiny", triton_device, policy="native", keep=0.5)
    try:
        (reference, _) = pair.open(70)
        reference.save(tmp_path / "a.mem")
        opened = pair.fused.open(tmp_path / "a.mem")
        assert opened.cycle.selection == reference.cycle.selection
        pair.decode([(reference, opened)])
    finally:
        pair.close()
