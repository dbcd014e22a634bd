"""The parts of a step: nothing is lost between them, and measuring leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.bench_cases import small_skeleton
from flashmem import Engine
from flashmem.backbone import steps
from flashmem.backbone.steps import DecodeStep
from flashmem.bench import profile, synthetic

PLENTY = {"device_budget_bytes": 8 << 20, "host_budget_bytes": 1 << 30}


def run(batches: list[int], modes: list[Any], windows: int = 2, **settings: Any) -> list[dict[str, Any]]:
    skeleton = small_skeleton(**settings)
    return profile.run_profile(skeleton, context=256, modes=modes, batches=batches, windows=windows, **PLENTY)


def test_parts_add_up_to_the_step() -> None:
    rows = run([1, 2, 500], ["full", "lsa"])
    assert [(row["mode"], row["batch"]) for row in rows if "failed" not in row] == [
        ("full", 1), ("full", 2), ("lsa", 1), ("lsa", 2),
    ]  # fmt: skip
    assert sum("failed" in row for row in rows) == 2
    for row in rows:
        if "failed" in row:
            assert [line["part"] for line in profile.parts(row)] == [row["failed"]]
            continue
        assert sum(row["components_ms"].values()) + row["host_gap_ms"] == pytest.approx(row["step_ms"], abs=1e-2)
        extra = row["first_step_of_window_ms"] - row["step_ms"]
        assert sum(row["boundary_ms"].values()) == pytest.approx(extra, abs=1e-2)
        names = {
            profile.STREAMS,
            "MoE: experts",
            "lm head",
            "level 2: scores",
            "level 2: top-k",
            "put rows",
            profile.OTHER,
        }
        names |= {"attention: CSA and window", "attention: HCA and window", "attention: window only"}
        assert names <= row["components_ms"].keys()
        assert "level 1: scores" in row["boundary_ms"]
        assert (row["boundary_ms"].get("swaps", 0.0) > 0) == (row["mode"] == "lsa")  # all resident: nothing moves
        assert len(list(profile.parts(row))) == len(row["components_ms"]) + len(row["boundary_ms"]) + 3


def test_bytes_are_those_of_weights_and_resident_pages() -> None:
    skeleton = small_skeleton(keep=0.3)
    memory = skeleton.session_memory("lsa", 256, 40)
    engine = Engine(skeleton.model(), config=skeleton.config("lsa", 256, 1, memory))
    session = engine.session()
    synthetic.fill(engine, session, 256)
    sizes, model, g = profile.component_bytes(engine, [session]), engine.backbone.model, engine.geometry
    assert sizes["lm head"] == model.lm_head.weight.nbytes
    assert sizes["MoE: experts"] == sum(p.nbytes for n, p in model.named_parameters() if "mlp.experts" in n)
    weights = sum(size for name, size in sizes.items() if not name.startswith(("attention: C", "attention: H")))
    assert weights < sum(p.nbytes for p in model.parameters()) * 1.2
    chunks = len(session.pages.resident) * 4
    assert sizes["level 2: scores"] == len(g.csa_layers) * chunks * (g.index_head_dim + 4 + 4)
    token = (16 + 2 * 4) * 64 * 4
    assert sizes["attention: window only"] == token
    assert sizes["attention: HCA and window"] == token + 2 * engine.layout.kv_spec.entry_bytes
    assert sizes["attention: CSA and window"] == 2 * (token + 8 * engine.layout.kv_spec.entry_bytes)
    engine.close()


@pytest.mark.usefixtures("triton_device")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the device is profiled")
def test_fused_steps_have_the_same_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "warm_steps", lambda tau: 1)  # the interpreter takes seconds for a step
    (row,) = run([1], ["lsa"], windows=1, kernels="fused", tau=2)
    names = {"level 2: scores", "level 2: top-k", "put rows", "compressor: encode", "compressor: pooling"}
    names |= {"attention: CSA and window", "attention: HCA and window", profile.STREAMS}
    assert names <= row["components_ms"].keys() and row["components_ms"][profile.STREAMS] > 0
    assert row["kernels"] == "fused"


def test_marks_belong_to_the_innermost_component(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10))
    monkeypatch.setattr(profile.time, "perf_counter", lambda: float(next(clock)))
    marks = profile.Marks(torch.device("cpu"), fine=True)
    marks.start()
    marks.enter("a")
    marks.enter("b")
    marks.leave()
    marks.leave()
    marks.stop()
    assert marks.seconds() == ({profile.OTHER: 2.0, "a": 2.0, "b": 1.0}, {profile.OTHER: 2, "a": 2, "b": 1})
    marks.start()
    marks.enter("a")
    with pytest.raises(AssertionError, match="left open"):
        marks.stop()


def test_a_profile_leaves_the_engine_as_it_was() -> None:
    skeleton = small_skeleton()
    memory = skeleton.session_memory("lsa", 256, 40)
    engine = Engine(skeleton.model(), config=skeleton.config("lsa", 256, 1, memory))
    session = engine.session()
    synthetic.fill(engine, session, 256)
    before = steps.attend, DecodeStep.attend, type(engine.backbone).decode
    profile.profile(engine, [session], 1)
    assert (steps.attend, DecodeStep.attend, type(engine.backbone).decode) == before
    assert not any(module._forward_hooks for module in engine.backbone.model.modules())
    engine.check()
    engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("graphs", [False, True])
def test_parts_of_a_step_on_a_device(graphs: bool) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    (row,) = run([2], ["lsa"], kernels="fused", cuda_graphs=graphs, device=device, dtype=torch.bfloat16)
    assert sum(row["components_ms"].values()) + row["host_gap_ms"] == pytest.approx(row["step_ms"], abs=1e-2)
    assert row["limits_ms"]["lm head"] > 0 and row["device_ms"] > 0 and row["components_ms"][profile.STREAMS] > 0
