"""Norm and rotary embedding in one launch say what the modules of transformers say."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from flashmem.kernels.norm_rope import norm_rope
from support.paged_cases import draw

EPS = 1e-3  # large enough to be seen


def tables(sessions: int, pairs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """As the model gives them: [B, S, pairs] with one token each."""
    angles = draw(sessions, 1, pairs, seed=5) * 9
    return angles.cos().to(device), angles.sin().to(device)


def weighted(channels: int, device: torch.device) -> stock.DeepseekV4RMSNorm:
    norm = stock.DeepseekV4RMSNorm(channels, eps=EPS).to(device)
    norm.weight.data.copy_(draw(channels, seed=3))
    return norm


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize(
    ("sessions", "heads", "channels", "pairs"),
    [(1, 1, 512, 32), (3, 5, 32, 4), (8, 2, 70, 35), (2, 3, 33, 2), (1, 64, 128, 32)],
)
@torch.no_grad()
def test_norms_and_rotations(
    impl: str, sessions: int, heads: int, channels: int, pairs: int, triton_device: torch.device
) -> None:
    x = draw(sessions, 1, heads, channels, seed=1).to(triton_device)
    rope = cos, sin = tables(sessions, pairs, triton_device)
    turn, back = (lambda y, s=s: stock.apply_rotary_pos_emb(y, cos, s, unsqueeze_dim=2) for s in (sin, -sin))
    plain, norm = stock.DeepseekV4UnweightedRMSNorm(eps=EPS), weighted(channels, triton_device)
    for wanted, settings in (
        (norm(x), {"eps": EPS, "weight_D": norm.weight}),
        (plain(x), {"eps": EPS}),
        (turn(norm(x)), {"eps": EPS, "weight_D": norm.weight, "rope": rope}),
        (turn(plain(x)), {"eps": EPS, "rope": rope}),
        (turn(x), {"rope": rope}),
        (back(x), {"rope": rope, "inverse": True}),
    ):
        found = norm_rope(x, impl=impl, **settings)
        assert found.shape == x.shape
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "fused"])
@torch.no_grad()
def test_steps_round_as_in_the_modules(impl: str, triton_device: torch.device) -> None:
    """In bfloat16 few values differ, by how a sum is ordered; with another order of roundings many do."""
    if impl == "fused" and triton_device.type == "cpu":
        pytest.skip("Triton's interpreter rounds to bfloat16 in its own way")
    x, norm = draw(4, 1, 16, 512, seed=1).to(triton_device, torch.bfloat16), weighted(512, triton_device)
    rope = cos, sin = tuple(table.to(torch.bfloat16) for table in tables(4, 32, triton_device))
    for module, settings in (
        (lambda x: norm(x.float()).to(x.dtype), {"eps": EPS, "weight_D": norm.weight}),  # before 5.20 it rounds twice
        (stock.DeepseekV4UnweightedRMSNorm(eps=EPS), {"eps": EPS}),
    ):
        wanted = stock.apply_rotary_pos_emb(module(x), cos, sin, unsqueeze_dim=2)
        found = norm_rope(x, rope=rope, impl=impl, **settings)
        assert found.dtype is torch.bfloat16 and (found != wanted).float().mean() < 0.01
        torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-6)


def test_tables_may_be_shared_and_rows_spaced(triton_device: torch.device) -> None:
    x = draw(6, 64, seed=1).to(triton_device)[:, :48]
    rope = cos, sin = tables(1, 8, triton_device)
    wanted = norm_rope(x, eps=EPS, rope=(cos.expand(6, -1, -1), sin.expand(6, -1, -1)))
    torch.testing.assert_close(norm_rope(x, eps=EPS, rope=rope, impl="fused"), wanted, rtol=1e-5, atol=1e-5)
    assert norm_rope(x[:0], eps=EPS, rope=rope, impl="fused").shape == (0, 48)


def test_a_row_does_not_reach_its_neighbour(triton_device: torch.device) -> None:
    x, rope = draw(3, 40, seed=1).to(triton_device), tables(3, 3, triton_device)
    x[1] = float("nan")
    found = norm_rope(x, eps=EPS, rope=rope, impl="fused")
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    x, rope = torch.zeros(6, 8), (torch.zeros(4, 2), torch.zeros(4, 2))
    for message, settings in (
        ("needs an eps", {}),
        ("needs an eps", {"weight_D": torch.ones(8), "rope": rope}),
        (r"weight must be \[8\], got \(7,\)", {"eps": EPS, "weight_D": torch.ones(7)}),
        ("do not fit 6 rows of 8 channels", {"rope": rope}),
        ("do not fit 6 rows", {"rope": (torch.zeros(3, 5), torch.zeros(3, 5))}),
        ("do not fit 6 rows", {"rope": (torch.zeros(3, 2), torch.zeros(3, 1))}),
        ("unknown impl 'fast'", {"eps": EPS, "impl": "fast"}),
    ):
        with pytest.raises(ValueError, match=message):
            norm_rope(x, **settings)


def test_too_many_channels_are_refused(triton_device: torch.device) -> None:
    with pytest.raises(ValueError, match="20000 channels"):
        norm_rope(torch.zeros(1, 20_000, device=triton_device), eps=EPS, impl="fused")
