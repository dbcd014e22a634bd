"""The untrained indexer scores as the backbone's own Lightning Indexer does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import DeepseekV4ForCausalLM

from flashmem.indexer import MemoryIndexer
from flashmem.kernels.index_rows import encode_index_rows

YARN = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 65_536,
    "beta_fast": 32,
    "beta_slow": 1,
}


def record(model: DeepseekV4ForCausalLM, layers: tuple[int, ...], tokens: int = 61) -> dict[int, dict]:
    """Run a prompt; per transformer layer the attention's input [S, E], index keys [N, I] and scores [S, N]."""
    seen: dict[int, dict] = {layer: {} for layer in layers}
    handles = []
    for layer in layers:
        attention, out = model.model.layers[layer].self_attn, seen[layer]

        def keep_hidden(_, args: tuple, kwargs: dict, out: dict = out) -> None:
            out["hidden"] = (args[0] if args else kwargs["hidden_states"])[0].detach()

        def keep_scores(_, args: tuple, scores: torch.Tensor, out: dict = out) -> None:
            out["keys"], out["scores"] = args[1][0].detach(), scores[0].detach()

        handles.append(attention.register_forward_pre_hook(keep_hidden, with_kwargs=True))
        handles.append(attention.compressor.indexer.scorer.register_forward_hook(keep_scores))
    with torch.no_grad():
        model(torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(3)))
    for handle in handles:
        handle.remove()
    return seen


def assert_scores_match(indexer: MemoryIndexer, seen: dict[int, dict], csa_layers: tuple[int, ...]) -> None:
    for csa, scorer in indexer.layers.items():
        out = seen[csa_layers[csa]]
        positions = torch.arange(len(out["hidden"]))
        keys_BNI = out["keys"].expand(len(positions), -1, -1)
        logits = scorer.logits(out["hidden"], keys_BNI, positions)
        assert out["scores"].std() > 1e-2  # the comparison says something
        scale = float(out["scores"].abs().max())
        torch.testing.assert_close(logits, out["scores"], rtol=1e-4, atol=1e-5 * scale)
        quantised = scorer.logits(out["hidden"], encode_index_rows(keys_BNI), positions)
        assert (quantised - out["scores"]).abs().max() < 0.05 * scale


@pytest.mark.parametrize("rope", [{}, {"rope_scaling": YARN | {"original_max_position_embeddings": 64}}])
@pytest.mark.parametrize("widen", [{}, {"num_heads": 31}, {"q_rank": 33}, {"num_heads": 32, "q_rank": 40}])
def test_scores_equal_the_backbones_own(rope: dict, widen: dict, tiny_model: Callable) -> None:
    model = tiny_model(**rope)
    indexer = MemoryIndexer.native(model, **widen)
    assert indexer.target_layers == (0, 1, 2) and indexer.config.query_dtype == "fp32"
    assert (indexer.config.num_heads, indexer.config.q_rank) == (widen.get("num_heads", 16), widen.get("q_rank", 20))
    assert_scores_match(indexer, record(model, (1, 3, 4)), (1, 3, 4))


def test_chosen_layers(model: DeepseekV4ForCausalLM) -> None:
    indexer = MemoryIndexer.native(model, layers=(1,))
    assert_scores_match(indexer, record(model, (3,)), (1, 3, 4))
    for layers in ((3,), (-1, 0)):
        with pytest.raises(ValueError, match=r"CSA indices must lie in 0\.\.2, got"):
            MemoryIndexer.native(model, layers=layers)


def test_widened_parts_can_learn(model: DeepseekV4ForCausalLM) -> None:
    indexer = MemoryIndexer.native(model, num_heads=20, q_rank=24)
    out = record(model, (1,))[1]
    positions = torch.arange(len(out["hidden"]))
    indexer.layers[0].logits(out["hidden"], out["keys"].expand(61, -1, -1), positions).square().sum().backward()
    scorer = indexer.layers[0]
    for fresh in (scorer.wq_a.weight.grad[20:], scorer.weights_proj.weight.grad[16:]):
        assert fresh.abs().amax(dim=1).min() > 0


def test_shares_no_memory_with_the_model_and_repeats(model: DeepseekV4ForCausalLM) -> None:
    before = model.model.layers[1].self_attn.q_a_proj.weight.clone()
    indexer = MemoryIndexer.native(model, num_heads=20)
    assert indexer.fingerprint() == MemoryIndexer.native(model, num_heads=20).fingerprint()
    assert indexer.fingerprint() != MemoryIndexer.native(model, num_heads=20, seed=1).fingerprint()
    with torch.no_grad():
        for parameter in indexer.parameters():
            parameter.zero_()
    assert torch.equal(model.model.layers[1].self_attn.q_a_proj.weight, before)


def test_narrowing_is_refused(model: DeepseekV4ForCausalLM) -> None:
    for narrow in ({"num_heads": 8}, {"q_rank": 19}):
        with pytest.raises(ValueError, match="widened, not narrowed"):
            MemoryIndexer.native(model, **narrow)


def test_bf16_backbones_round_their_queries(tiny_model: Callable) -> None:
    indexer = MemoryIndexer.native(tiny_model().to(torch.bfloat16))
    assert indexer.config.query_dtype == "bf16"
    assert {p.dtype for p in indexer.parameters()} == {torch.float32}


class Float8Linear(nn.Module):
    """A linear layer as block-quantised checkpoints hold it."""

    def __init__(self, weight: torch.Tensor, block: tuple[int, int] | None) -> None:
        super().__init__()
        self.block_size = block
        rows, columns = weight.shape
        if block is None:
            scale = weight.abs().max() / 448
            full = scale
        else:
            tall, wide = -(-rows // block[0]), -(-columns // block[1])
            scale = torch.stack(
                [
                    torch.stack([part.abs().max() / 448 for part in band.split(block[1], 1)])
                    for band in weight.split(block[0], 0)
                ]
            )
            assert scale.shape == (tall, wide)
            full = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        self.weight = nn.Parameter((weight / full).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)


@pytest.mark.parametrize("block", [None, (16, 32), (128, 128)])
def test_float8_backbones_are_dequantised(block: tuple[int, int] | None, tiny_model: Callable) -> None:
    model = tiny_model()
    exact = MemoryIndexer.native(model)
    attention = model.model.layers[1].self_attn
    attention.q_a_proj = Float8Linear(attention.q_a_proj.weight.detach(), block)
    attention.compressor.indexer.q_b_proj = Float8Linear(attention.compressor.indexer.q_b_proj.weight.detach(), block)
    indexer = MemoryIndexer.native(model)
    assert indexer.config.query_dtype == "bf16"
    for name in ("wq_a", "wq_b"):
        one, other = (getattr(x.layers[0], name).weight.detach() for x in (exact, indexer))
        assert 0 < (one - other).abs().max() < 0.04 * one.abs().max()


def test_weights_that_cannot_be_read_are_refused(tiny_model: Callable) -> None:
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.q_a_proj.weight = nn.Parameter(torch.zeros(20, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"are torch.int8; native needs"):
        MemoryIndexer.native(model)
    attention.q_a_proj = nn.Linear(48, 20, bias=False, device="meta")
    with pytest.raises(ValueError, match="meta device"):
        MemoryIndexer.native(model)
    del attention.compressor.indexer.scorer
    attention.q_a_proj = nn.Linear(48, 20, bias=False)
    with pytest.raises(ValueError, match=r"has no compressor\.indexer\.scorer\.weights_proj"):
        MemoryIndexer.native(model)
