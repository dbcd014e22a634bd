from collections.abc import Callable

import pytest
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding, apply_rotary_pos_emb

from flashmem.config import ModelGeometry, RopeConfig
from flashmem.indexer import MAX_POSITION, PUBLISHED_ROPE, apply_rope, rope_frequencies, rotate_interleaved

YARN = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 65_536,
    "beta_fast": 32,
    "beta_slow": 1,
}
FLASH = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "max_position_embeddings": 1_048_576}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": YARN},
        FLASH,
        FLASH | {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"original_max_position_embeddings": 256, "factor": 4.0}},
    ],
)
def test_equals_the_backbone(changes: dict, tiny_config: Callable) -> None:
    config = tiny_config(**changes)
    rope = ModelGeometry.from_mapping(config.to_dict()).compress_rope
    rotary = DeepseekV4RotaryEmbedding(config)
    assert torch.equal(rope_frequencies(rope), rotary.compress_inv_freq)

    x = torch.randn(2, 3, 5, config.index_head_dim, generator=torch.Generator().manual_seed(0))  # [B, S, H, I]
    positions = torch.tensor([[0, 1, 4095], [77, 70_001, 1_048_575]])
    cos, sin = rotary(x, position_ids=positions, layer_type="compress")
    expected = apply_rotary_pos_emb(x.transpose(1, 2), cos, sin).transpose(1, 2)
    assert torch.equal(apply_rope(x, positions, rope), expected)


def test_the_published_ramp_runs_from_pair_15_to_pair_25() -> None:
    plain = rope_frequencies(RopeConfig(theta=160_000.0, dim=64))
    ratio = plain / rope_frequencies(PUBLISHED_ROPE)
    ramp = ((torch.arange(32) - 15) / 10).clamp(0, 1)
    torch.testing.assert_close(1 / ratio, (1 - ramp) + ramp / 16)


def test_only_the_last_channels_turn_in_adjacent_pairs() -> None:
    x = torch.arange(1.0, 7.0).expand(1, 1, 6)
    cos, sin = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)  # a quarter turn
    assert rotate_interleaved(x, cos, sin).tolist() == [[[1.0, 2.0, -4.0, 3.0, -6.0, 5.0]]]


def test_keeps_the_dtype_and_rotates_in_float32() -> None:
    x = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = apply_rope(x, torch.tensor([123_456]), PUBLISHED_ROPE)
    assert turned.dtype is torch.bfloat16
    assert torch.equal(turned, apply_rope(x.float(), torch.tensor([123_456]), PUBLISHED_ROPE).bfloat16())


def test_positions_up_to_two_to_the_24_and_no_further() -> None:
    x = torch.ones(1, 1, 64)
    last = apply_rope(x, torch.tensor([MAX_POSITION]), PUBLISHED_ROPE)
    assert not torch.equal(last, apply_rope(x, torch.tensor([MAX_POSITION - 1]), PUBLISHED_ROPE))  # no clamp
    for bad in (-1, MAX_POSITION + 1):
        with pytest.raises(ValueError, match=r"positions must lie in 0\.\.16777216, got"):
            apply_rope(x, torch.tensor([bad]), PUBLISHED_ROPE)
    with pytest.raises(ValueError, match="integers"):
        apply_rope(x, torch.tensor([1.0]), PUBLISHED_ROPE)
    assert apply_rope(torch.ones(0, 2, 64), torch.empty(0, dtype=torch.int64), PUBLISHED_ROPE).shape == (0, 2, 64)


def test_frequencies_first_used_in_inference_mode_serve_training() -> None:
    rope = RopeConfig(theta=777.0, dim=8)
    with torch.inference_mode():
        apply_rope(torch.ones(1, 1, 8), torch.tensor([3]), rope)
    x = torch.ones(1, 1, 8, requires_grad=True)
    apply_rope(x, torch.tensor([3]), rope).square().sum().backward()
    torch.testing.assert_close(x.grad, torch.full((1, 1, 8), 2.0))  # a rotation keeps the norm
