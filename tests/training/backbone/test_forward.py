"""Our forward pass against stock transformers, in float32 on the CPU."""

from __future__ import annotations

import pytest
import torch

from flashmem.config import ModelGeometry
from flashmem.training.backbone.forward import (
    Backbone,
    answer_loss,
    buffers,
    hidden_layers,
    initial_parameters,
    parameter_shapes,
    yarn_frequencies,
)
from flashmem.training.backbone.recipe import Sizes

TINY = Sizes(
    layers="SCHC", vocab=96, hidden=32, heads=4, head_dim=16, rope_dim=8, q_rank=16, o_rank=8, window=16,
    expert_width=16, index_heads=16, index_dim=8, index_topk=512, hca_ratio=32,
)  # fmt: skip


def tiny_parameters(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random everywhere, so that no term is silently zero."""
    generator = torch.Generator().manual_seed(seed)
    params = initial_parameters(TINY, seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in params.items()}


def stock_model(params: dict[str, torch.Tensor], index_topk: int) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV4Config(**(TINY.config() | {"index_topk": index_topk, "dtype": "float32"}))
    model = transformers.DeepseekV4ForCausalLM(config).float().eval()
    model.load_state_dict(params | buffers(TINY))
    return model


@pytest.mark.parametrize("topk", [None, 6])
def test_logits_equal_stock(topk: int | None) -> None:
    params = tiny_parameters()
    ids = torch.randint(0, TINY.vocab, (2, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = stock_model(params, topk or 512)(ids).logits.flatten(0, 1)
        actual, _ = Backbone(TINY, params | buffers(TINY), compute=torch.float32).forward(ids, topk=topk)
    assert (actual - expected).norm() / expected.norm() < 1e-5


def test_stock_names_and_shapes() -> None:
    state = stock_model(tiny_parameters(), 512).state_dict()
    mine = parameter_shapes(TINY) | {name: tuple(value.shape) for name, value in buffers(TINY).items()}
    assert mine == {name: tuple(value.shape) for name, value in state.items()}


def test_geometry_reads_the_config() -> None:
    geometry = ModelGeometry.from_mapping(Sizes().config())
    assert geometry.csa_layers == (2, 4, 6) and geometry.compress_rope.factor == 16 and geometry.index_topk == 64


def test_skipped_positions_keep_the_nearby_past() -> None:
    """Yarn frequencies of the last channels turn so slowly that a skip leaves them usable; all stay finite."""
    assert torch.isfinite(yarn_frequencies(Sizes())).all()
    params = tiny_parameters() | buffers(TINY)
    ids = torch.randint(0, TINY.vocab, (1, 128))
    jump = torch.arange(128)[None] + 128 * 4000 * (torch.arange(128) >= 64)
    logits, _ = Backbone(TINY, params, compute=torch.float32).forward(ids, positions_BS=jump)
    assert torch.isfinite(logits).all()


def test_hidden_entries_change_nothing_but_their_layer() -> None:
    """Hiding every CSA layer equals a model whose entries are never born; showing all equals the plain forward."""
    net = Backbone(TINY, tiny_parameters() | buffers(TINY), compute=torch.float32)
    ids = torch.randint(0, TINY.vocab, (2, 128), generator=torch.Generator().manual_seed(2))
    plain, _ = net.forward(ids)
    shown, _ = net.forward(ids, visible_BL=hidden_layers(TINY, [0, 1], 2, ids.device))
    none, _ = net.forward(ids, visible_BL=hidden_layers(TINY, [], 2, ids.device))
    torch.testing.assert_close(plain, shown)
    assert not torch.allclose(plain, none)


def test_only_the_indexer_learns_from_distillation() -> None:
    params = {name: value.requires_grad_() for name, value in tiny_parameters().items()}
    net = Backbone(TINY, params | buffers(TINY), compute=torch.float32)
    rows = torch.randint(32, 128, (2, 9))
    net.forward(torch.randint(0, TINY.vocab, (2, 128)), kl_rows_BK=rows)[1].backward()
    for name, value in params.items():
        learned = value.grad is not None and bool(value.grad.any())
        assert learned == (".indexer." in name), name


def test_any_of_the_right_tokens_counts() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, -2.0]]).repeat(2, 1)
    targets = torch.tensor([[2, 1], [2, -1]])
    loss, right = answer_loss(logits, targets, torch.ones(2))
    share = logits[0].softmax(0)
    torch.testing.assert_close(loss, -torch.stack([(share[1] + share[2]).log(), share[2].log()]))
    assert right.tolist() == [True, False]
