"""Fused decoding and its CUDA graphs on a device, at sizes beyond the interpreter's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashmem import Engine, LSAConfig, Session
from flashmem.accounting import shipped_model
from flashmem.backbone import random_model
from flashmem.prose import text

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 16, "head_dim": 128, "q_lora_rank": 128, "index_n_heads": 32,
    "index_head_dim": 64, "index_topk": 512, "sliding_window": 128, "o_lora_rank": 64,
}  # fmt: skip
"""Top-k as large as what is resident in long tests: over hundreds of steps some pick would be decided by rounding."""


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def engines(layers: str, dtype: torch.dtype = torch.float32, topk: int = 512, **options: Any) -> list[Engine]:
    """On the reference, fused, and fused with graphs; the same weights, and sums of experts in the same order."""
    made = []
    for choice in ({}, {"kernels": "fused"}, {"kernels": "fused", "cuda_graphs": True}):
        model = random_model(layers, seed=3, **SIZES | {"index_topk": topk}).to(dtype).cuda()
        model.set_experts_implementation("batched_mm")
        made.append(Engine(model, config=LSAConfig(**options, **choice)))
    return made


def open_all(all_engines: list[Engine], length: int) -> list[Session]:
    sessions = [engine.session() for engine in all_engines]
    for session in sessions:
        session.append(tokens(length, seed=length))
    return sessions


def decode_all(all_engines: list[Engine], rows: list[list[Session]], chosen: list[int]) -> list[torch.Tensor]:
    return [engine.decode([row[i] for row in rows], chosen) for i, engine in enumerate(all_engines)]


def close_all(all_engines: list[Engine]) -> None:
    for engine in all_engines:
        engine.check()
        engine.close()


@pytest.mark.parametrize("kv_format", ["auto", "fp8"])
@pytest.mark.parametrize("budget", [None, 48 << 20])
def test_graphs_and_kernels_say_what_the_reference_says(kv_format: str, budget: int | None) -> None:
    """200 steps: windows flip every 16, sessions join and leave, one grows past HCA blocks; buckets of 1 to 8."""
    options = {"policy": "native", "keep": 0.4, "page_chunks": 16, "tau": 16, "lead": 4, "kv_format": kv_format}
    if budget is not None:
        options |= {"device_budget_bytes": budget, "max_sessions": 6}
    every = engines("WCHCHC", **options)
    waiting = [1500, 3, 127, 640, 2048, 31, 1000, 255]
    live = [open_all(every, waiting.pop(0))]
    sizes = set()
    for step in range(200):
        if waiting and step % 20 == 5:
            live.insert(step % 2, open_all(every, waiting.pop(0)))
        if len(live) > 4 or (step % 50 == 49 and len(live) > 1):
            for session in live.pop(step % 3 % len(live)):
                session.close()
        chosen = [int(row[0].next_logits.argmax()) for row in live]
        reference, fused, graphs = decode_all(every, live, chosen)
        torch.testing.assert_close(graphs, fused, rtol=0, atol=1e-4)
        torch.testing.assert_close(fused, reference, rtol=0, atol=1e-4)
        assert all(row[0].pages.resident == row[i].pages.resident for row in live for i in (1, 2))
        sizes.add(len(live))
        if step % 40 == 0:
            for engine in every:
                engine.check()
    assert len(sizes) >= 3
    close_all(every)


@pytest.mark.parametrize("kv_format", ["auto", "fp8"])
def test_picks_are_those_of_the_reference(kv_format: str) -> None:
    every = engines("WCHC", topk=64, policy="all", page_chunks=16, kv_format=kv_format)
    rows = [open_all(every, length) for length in (900, 2046)]
    for _ in range(12):
        reference, fused, graphs = decode_all(every, rows, [int(row[0].next_logits.argmax()) for row in rows])
        torch.testing.assert_close(fused, reference, rtol=0, atol=1e-4)
        torch.testing.assert_close(graphs, fused, rtol=0, atol=1e-4)
    close_all(every)


def test_a_failed_step_is_repeated_by_a_graph() -> None:
    every = engines("WCHC", policy="all", page_chunks=16)
    rows = [open_all(every, length) for length in (100, 126)]
    for step in range(12):
        chosen = [int(row[0].next_logits.argmax()) for row in rows]
        if step % 3 == 1:
            every[2]._begin_decode([row[2] for row in rows], size=2)  # and nothing comes of it
            every[2]._roll_back([row[2] for row in rows])
        reference, _, graphs = decode_all(every, rows, chosen)
        torch.testing.assert_close(graphs, reference, rtol=0, atol=1e-4)
    close_all(every)


def test_bf16_runs_and_stays_close() -> None:
    """A random bf16 model flips picks and routes: only gross errors show here."""
    every = engines("WCHC", torch.bfloat16, policy="all", page_chunks=16, kv_format="fp8")
    rows = [open_all(every, length) for length in (300, 1000)]
    gaps = []
    for step in range(40):
        reference, fused, graphs = (x.log_softmax(-1) for x in decode_all(every, rows, [step % 250, (7 * step) % 250]))
        assert bool(fused.isfinite().all()) and bool(graphs.isfinite().all())
        gaps += [(reference.exp() * (reference - other)).sum(-1).mean() for other in (fused, graphs)]
    assert torch.stack(gaps).median() < 0.1
    close_all(every)


def test_the_shipped_model_says_the_same() -> None:
    """float32, 12 % of the pages: the same tokens, with and without graphs."""
    directory = shipped_model()
    assert directory is not None
    said = []
    for choice in ({}, {"kernels": "fused"}, {"kernels": "fused", "cuda_graphs": True}):
        engine = Engine.from_pretrained(
            directory, dtype="float32", device="cuda",
            config=LSAConfig(keep=0.12, page_chunks=8, recency_pages=8, **choice),
        )  # fmt: skip
        with engine.session() as session:
            session.append(text(24_000, seed=4))
            said.append(list(session.stream(" What was", max_new_tokens=160)))
        engine.check()
        engine.close()
    assert said[0] == said[1] == said[2]
