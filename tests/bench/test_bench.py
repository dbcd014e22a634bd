"""The benches themselves, on a CPU: what they claim to hold equal is equal, and their arithmetic is the store's."""

from __future__ import annotations

import pytest
import torch

from bench.bench_cases import FLASH, small_geometry, small_skeleton
from flashmem import Engine
from flashmem.backbone import skeleton_model
from flashmem.bench import decode, definitions, peers, report, swap, synthetic
from flashmem.bench.skeleton import MODES, ChurnPolicy, Skeleton, plan
from flashmem.config import ModelGeometry
from flashmem.store import SessionPages
from flashmem.types import PageView

CPU = torch.device("cpu")
PLENTY = {"device_budget_bytes": 8 << 20, "host_budget_bytes": 1 << 30}


# ---- the skeleton


def test_a_skeleton_has_the_geometry_and_few_experts() -> None:
    geometry = small_geometry()
    model = skeleton_model(geometry, num_experts=3, dtype=torch.bfloat16, device="cpu", seed=1)
    found = ModelGeometry.from_mapping(model.config.to_dict())
    assert found.num_experts == 3 and found.num_experts_per_token == 3  # of eight, and of the six that are picked
    for name in ("layer_kinds", "hidden_size", "head_dim", "index_heads", "hc_mult", "sliding_window", "o_groups"):
        assert getattr(found, name) == getattr(geometry, name), name
    assert found.compress_rope.dim == geometry.compress_rope.dim
    again = skeleton_model(geometry, num_experts=3, dtype=torch.bfloat16, device="cpu", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.model.embed_tokens.weight.dtype is torch.bfloat16 and torch.get_default_dtype() is torch.float32


def test_experts_out_of_range_are_refused() -> None:
    for experts in (0, 9):
        with pytest.raises(ValueError, match=r"experts must lie in 1\.\.8"):
            skeleton_model(small_geometry(), num_experts=experts, dtype=torch.float32, device="meta")


def test_weights_are_counted_without_being_made() -> None:
    skeleton = small_skeleton()
    model = skeleton.model()
    assert skeleton.weight_bytes() == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    flash = [
        Skeleton(geometry=FLASH, device=CPU, experts=experts).weight_bytes() for experts in (8, 12)
    ]  # six are picked
    an_expert = 3 * FLASH.hidden_size * FLASH.moe_intermediate_size
    router = FLASH.hidden_size + 1
    assert 0 <= flash[1] - flash[0] - 2 * 4 * FLASH.num_layers * an_expert <= 8 * 4 * FLASH.num_layers * router


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lead", [0, 2])
def test_the_plan_holds_what_a_session_takes(mode: str, lead: int) -> None:
    """A pool of exactly the planned slots is enough, and what lies beside it is no more than planned."""
    skeleton = small_skeleton(lead=lead)
    memory = skeleton.session_memory(mode, 1024, 12)  # type: ignore[arg-type]
    engine = Engine(skeleton.model(), config=skeleton.config(mode, 1024, 1, memory))  # type: ignore[arg-type]
    assert engine.layout.record_bytes == memory.record_bytes
    assert engine.store.pool.num_slots == memory.slots
    session = engine.session()
    synthetic.fill(engine, session, 1024)
    for _ in range(12):
        engine.decode([session], [3])
    engine.check()
    held = session.report().all_in.device
    beside = sum(size for name, size in held.items() if name not in ("pages", "slack"))
    rows = session.pages.index_row_bytes - held["index_rows"]
    assert beside + rows <= memory.beside_bytes
    assert len(session.pages.resident) >= memory.selected_pages
    engine.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_history_is_written_in_pieces_as_large_as_the_slots_allow(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Fewer pieces than a prefill of the same tokens, in no more slots than were promised; homes hold every page."""
    skeleton = small_skeleton(fill_tokens=64)
    memory = skeleton.session_memory(mode, 2048, 12)  # type: ignore[arg-type]
    engine = Engine(skeleton.model(), config=skeleton.config(mode, 2048, 2, memory))  # type: ignore[arg-type]
    written: list[list[int]] = []
    commit = SessionPages.commit

    def noted(pages: SessionPages, count: int) -> None:
        written[-1].append(count)
        commit(pages, count)

    for seed in (1, 2):
        session = engine.session()
        written.append([])
        with monkeypatch.context() as patch:
            patch.setattr(SessionPages, "commit", noted)
            synthetic.fill(engine, session, 2048, seed=seed)
        assert session.pages.num_chunks == sum(written[-1]) == 512
        assert len(session.pages.resident) <= memory.selected_pages
    assert len(written[0]) < 2048 // 64 / 2 and written[0] == written[1]
    engine.check()
    first, second = (dict(session.pages.export_pages()) for session in engine.sessions)
    assert len(first) == 128 and not any(torch.equal(first[page], second[page]) for page in first)
    engine.close()


def test_lsa_fits_more_sessions_into_the_same_bytes() -> None:
    skeleton = Skeleton(geometry=FLASH, device=CPU)
    result = plan(skeleton, [1 << 18, 1 << 20], 128, 30 << 30, 1 << 40)
    for full, lsa in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        assert (full["mode"], lsa["mode"]) == MODES and full["context_tokens"] == lsa["context_tokens"]
        assert lsa["device_bytes"] < full["device_bytes"] and lsa["sessions_fit"] > full["sessions_fit"]
        assert full["selected_pages"] == full["pages"] and full["host_bytes"] == lsa["host_bytes"]
    assert plan(skeleton, [1 << 18], 128, 30 << 30, 0)["rows"][0]["sessions_fit"] == 0


def test_churn_replaces_its_share() -> None:
    policy = ChurnPolicy(pages=20, churn=0.25)
    previous: tuple[int, ...] = ()
    for cycle in range(5):
        view = PageView(
            num_pages=100, page_chunks=4, num_chunks=400, always=(0, 98, 99), logits_N=torch.zeros(400),
            previous=previous, cycle=cycle, seed=0,
        )  # fmt: skip
        chosen = policy.select(view).pages
        assert len(chosen) == 20 and {0, 98, 99} <= set(chosen)
        if cycle:
            assert len(set(chosen) - set(previous)) == round(0.25 * 17)
        previous = chosen
    with pytest.raises(ValueError, match="churn"):
        ChurnPolicy(pages=3, churn=2)


# ---- measurements


def test_decode_measures_both_modes_at_the_same_batches() -> None:
    rows = decode.run_decode(small_skeleton(), contexts=[512], batches=[1, 2], windows=2, **PLENTY)
    assert [(row["mode"], row["batch"]) for row in rows] == [("full", 1), ("full", 2), ("lsa", 1), ("lsa", 2)]
    for row in rows:
        assert row["mean_step_ms"] > 0 and row["tokens_per_second"] > 0
        if row["mode"] == "full":
            assert row["resident_pages"] == row["pages"] and row["pages_moved_per_window"] == 0
        else:
            assert row["resident_pages"] < row["pages"] and row["pages_moved_per_window"] > 0
            assert row["mean_step_time_ratio"] > 0


def test_a_batch_that_does_not_fit_is_a_row_that_says_so() -> None:
    skeleton = small_skeleton()
    one = skeleton.session_memory("full", 512, 100).device_bytes
    rows = decode.run_decode(
        skeleton, contexts=[512], batches=[1, 50], windows=1, device_budget_bytes=2 * one, host_budget_bytes=1 << 30
    )
    full = [row for row in rows if row["mode"] == "full"]
    assert "failed" not in full[0] and full[1]["failed"] == "2 sessions fit"


def test_capacity_tells_ratios_only_of_what_was_run() -> None:
    skeleton = small_skeleton(keep=0.1)
    steps = decode.warm_steps(skeleton.tau) + skeleton.tau
    one = skeleton.session_memory("full", 4096, steps).device_bytes
    budgets = {"device_budget_bytes": 2 * one, "host_budget_bytes": 1 << 30}
    full, lsa = decode.run_capacity(skeleton, contexts=[4096], windows=1, max_sessions=64, **budgets)
    assert full["batch"] == full["sessions_fit"] == 2 and lsa["batch"] == lsa["sessions_fit"] > 2
    assert lsa["sessions_ratio"] == round(lsa["sessions_fit"] / 2, 3) and lsa["throughput_ratio"] > 0
    full, lsa = decode.run_capacity(skeleton, contexts=[4096], windows=1, max_sessions=1, **budgets)
    assert not lsa["all_opened"] and "throughput_ratio" not in lsa and lsa["throughput_of_opened_ratio"] > 0
    budgets["device_budget_bytes"] = one // 2
    full, lsa = decode.run_capacity(skeleton, contexts=[4096], windows=1, max_sessions=1, **budgets)
    assert full["failed"] == "no session fits" and "sessions_ratio" not in lsa


def test_swap_checks_and_measures_both_ways() -> None:
    case = swap.SwapCase(geometry=small_geometry(), context_tokens=4096, page_chunks=16)
    result = swap.run(case, device=CPU, churns=(0.01, 1.0), rounds=2)
    assert result["page_copies"] == "one by one" and not result["pinned"]
    assert [(row["direction"], row["pages"]) for row in result["rows"]] == [
        ("in", 1),
        ("out", 1),
        ("in", 7),
        ("out", 7),
    ]
    assert all(row["bytes"] == row["pages"] * result["record_bytes"] for row in result["rows"])
    assert result["rows"][0]["over_gather_ratio"] > 0 and "over_gather_ratio" not in result["rows"][1]


def test_swap_sees_bytes_that_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashmem.store.copies.LoopedCopies.to_device", lambda *arguments: None)
    case = swap.SwapCase(geometry=small_geometry(), context_tokens=4096, page_chunks=16)
    with pytest.raises(AssertionError, match="a swap in changed bytes"):
        swap.run(case, device=CPU, churns=(1.0,), rounds=1)


def test_definitions_are_checked_and_timed() -> None:
    rows = definitions.run(device=CPU, chunks=[128], rounds=1)
    assert {row["chunks"] for row in rows} == {128} and len(rows) == 5
    with pytest.raises(AssertionError, match="relative error"):
        definitions.close(torch.full((3,), float("nan")), torch.ones(3), 1.0)


def test_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.MODULES, "vllm", "no_such_module_here")
    assert peers.state("vllm") == "peer absent"
    with pytest.raises(ValueError, match="no peer 'x'"):
        peers.state("x")


def test_quartiles_lie_between_the_extremes() -> None:
    for seconds in ([0.003], [0.001, 0.009], [0.001, 0.002, 0.009]):
        values = list(report.spread(seconds).values())
        assert values == sorted(values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_benches_run_on_a_device(dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    skeleton = small_skeleton(device=device, dtype=dtype)
    rows = decode.run_decode(skeleton, contexts=[1024], batches=[1, 2], windows=1, **PLENTY)
    assert len(rows) == 4 and not any("failed" in row for row in rows)
    case = swap.SwapCase(geometry=small_geometry(), context_tokens=65_536, page_chunks=16)
    assert swap.run(case, device=device, rounds=2)["pinned"]
