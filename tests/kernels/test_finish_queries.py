"""Projections become queries in the kernel that prepares them for the product, as in the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

from flashmem.kernels.index_rows import hadamard
from flashmem.kernels.score_chunks import QueryFinish, finish_queries
from flashmem.kernels.select_chunks import select_resident
from support.paged_cases import draw, pooled_exact_keys, pooled_index_rows

HALF_STEPS = {"fp8": 2**-4, "fp8x2": 2**-8, "fp16": 2**-11, "bf16": 2**-8, "fp32": 2**-22}


def tables(sessions: int, pairs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """As the model gives them: [B, S, pairs] with one token each."""
    angles = draw(sessions, 1, pairs, seed=5) * 9
    return angles.cos().to(device), angles.sin().to(device)


def projections(
    sessions: int, heads: int, channels: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """For one layer, a few sessions and one token of each."""
    q, w = draw(1, sessions, 1, heads, channels, seed=1), draw(1, sessions, 1, heads, seed=2)
    return q.to(device, dtype), (w + 3 * w.sign()).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_definition_is_that_of_the_modules(tokens: int, dtype: torch.dtype) -> None:
    q, w = draw(3, tokens, 7, 32, seed=1).to(dtype), draw(3, tokens, 7, seed=2).to(dtype)
    angles = draw(3, tokens, 6, seed=5) * 9
    rope = angles.cos().to(dtype), angles.sin().to(dtype)
    turned = apply_rotary_pos_emb(q, *rope, unsqueeze_dim=2)
    found, weights = finish_queries(q, w, QueryFinish(rope, weight_scale=0.0123))
    assert found.dtype is dtype and torch.equal(found, turned) and torch.equal(weights, w.float() * 0.0123)
    assert torch.equal(finish_queries(q, w, QueryFinish(rope, hadamard=True))[0], hadamard(turned))


@given(
    sessions=st.integers(1, 3),
    heads=st.integers(1, 64),
    half_channels=st.integers(8, 64),
    power_of_two=st.booleans(),
    rope_share=st.floats(0, 1),
    rotated=st.booleans(),
    precision=st.sampled_from(sorted(HALF_STEPS)),
)
@settings(max_examples=25)  # on a device each is compiled
def test_queries_are_finished_as_defined(
    sessions: int, heads: int, half_channels: int, power_of_two: bool, rope_share: float, rotated: bool,
    precision: str, triton_device: torch.device,
) -> None:  # fmt: skip
    from flashmem.kernels.score_chunks.fused import prepare_queries

    channels = 2 * (1 << (half_channels.bit_length() - 1) if power_of_two else half_channels)
    q, w = projections(sessions, heads, channels, triton_device)
    rope = tables(sessions, round(rope_share * (channels // 2)), triton_device)
    finish = QueryFinish(rope, rotated, weight_scale=0.0123)
    wanted_q, wanted_w = finish_queries(q, w, finish)
    prepared, weights = prepare_queries(q, w, precision, finish)
    scales = (2 * weights / wanted_w)[..., None]
    restored = prepared.float().sum(dim=3) * scales
    smallest = wanted_q.abs().amax(-1, keepdim=True) * (2**-18 if precision.startswith("fp8") else 2**-20)
    assert ((restored - wanted_q).abs() <= wanted_q.abs() * HALF_STEPS[precision] + smallest).all()
    if precision in ("bf16", "fp32"):
        torch.testing.assert_close(2 * weights, wanted_w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rotated", [False, True])
def test_the_rotary_embedding_rounds_to_the_dtype_of_the_projection(rotated: bool, triton_device: torch.device) -> None:
    """A few values may differ on a device, by how it multiplies and adds; without the rounding most would."""
    from flashmem.kernels.score_chunks.fused import prepare_queries

    q, w = projections(3, 16, 64, triton_device, torch.bfloat16)
    rope = tuple(table.to(torch.bfloat16) for table in tables(3, 32, triton_device))
    finish = QueryFinish(rope, rotated, weight_scale=0.0123)
    wanted_q, wanted_w = finish_queries(q, w, finish)
    prepared, weights = prepare_queries(q, w, "fp32", finish)
    difference = (prepared[:, :, :, 0] - wanted_q.float()).abs()
    assert (difference > 1e-6 * wanted_q.abs().amax()).float().mean() < 0.1
    assert difference.max() <= 2**-7 * wanted_q.abs().amax()
    torch.testing.assert_close(2 * weights, wanted_w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("heads", [3, 16])
def test_level_2_takes_projections(heads: int, triton_device: torch.device) -> None:
    q, w = (x[0, :, 0] for x in projections(4, heads, 32, triton_device))
    rope = tables(4, 8, triton_device)
    for keys, rotated in (
        (pooled_index_rows([50, 0, 9, 128], 32, triton_device), True),
        (pooled_exact_keys([50, 0, 9, 128], 32, torch.float32, triton_device), False),
    ):
        finish = QueryFinish(rope, rotated, weight_scale=0.0123)
        wanted = select_resident(*finish_queries(q, w, finish), keys, 20, precision="fp32", impl="fused")
        for impl in ("reference", "fused"):
            found = select_resident(q, w, keys, 20, finish=finish, precision="fp32", impl=impl)
            assert torch.equal(found, wanted)


def test_queries_may_share_a_table(triton_device: torch.device) -> None:
    from flashmem.kernels.score_chunks.fused import prepare_queries

    q, w = projections(6, 5, 32, triton_device)
    cos, sin = tables(2, 8, triton_device)
    repeated = QueryFinish((cos.repeat_interleave(3, 0), sin.repeat_interleave(3, 0)), hadamard=True)
    for wanted, found in zip(
        prepare_queries(q, w, "fp16", repeated),
        prepare_queries(q, w, "fp16", QueryFinish((cos, sin), hadamard=True)),
        strict=True,
    ):
        assert torch.equal(wanted, found)


def test_a_head_does_not_reach_its_neighbour(triton_device: torch.device) -> None:
    from flashmem.kernels.score_chunks.fused import prepare_queries

    q, w = projections(2, 6, 24, triton_device)
    q[0, 1, 0, 2] = float("nan")
    finish = QueryFinish(tables(2, 5, triton_device), hadamard=True)
    prepared = prepare_queries(q, w, "fp32", finish)[0][0, :, 0, 0]
    assert prepared[1, 2].isnan().all()
    prepared[1, 2] = 0
    assert prepared.isfinite().all()


def test_what_does_not_fit_is_refused(triton_device: torch.device) -> None:
    from flashmem.kernels.score_chunks.fused import prepare_queries

    q, w = projections(3, 4, 16, triton_device)
    for rope in (tables(2, 4, triton_device), tables(3, 9, triton_device)):
        for call in (finish_queries, lambda q, w, finish: prepare_queries(q, w, "fp32", finish)):
            with pytest.raises(ValueError, match="do not fit 3 queries of 16 channels"):
                call(q, w, QueryFinish(rope))
    with pytest.raises(ValueError, match="got 15"):
        prepare_queries(q[..., :15], w, "fp32", QueryFinish(tables(3, 4, triton_device)))
    with pytest.raises(ValueError, match="q must be"):
        finish_queries(q, w[..., :3])
