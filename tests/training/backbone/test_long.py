"""The long forward equals the dense one."""

from __future__ import annotations

import pytest
import torch
from test_forward import TINY, tiny_parameters

from flashmem.training.backbone.forward import Backbone, buffers, hidden_layers
from flashmem.training.backbone.long import LongForward, entries_mask


@pytest.fixture(scope="module")
def net() -> Backbone:
    return Backbone(TINY, tiny_parameters() | buffers(TINY), compute=torch.float32)


@pytest.mark.parametrize("length", [256, 300])
@pytest.mark.parametrize("topk", [None, 6])
def test_tiles_equal_the_dense_forward(net: Backbone, length: int, topk: int | None) -> None:
    ids = torch.randint(0, TINY.vocab, (length,), generator=torch.Generator().manual_seed(3))
    padded = torch.nn.functional.pad(ids, (0, -length % 128))
    rows = torch.tensor([0, 3, 77, length - 1])
    with torch.no_grad():
        expected, _ = net.forward(padded[None], rows, topk=topk)
    actual = LongForward(net, attention="tiles").logits(ids, rows, topk=topk)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_hidden_layers_are_the_same_in_both(net: Backbone) -> None:
    ids = torch.randint(0, TINY.vocab, (128,), generator=torch.Generator().manual_seed(4))
    rows = torch.arange(128)
    with torch.no_grad():
        expected, _ = net.forward(ids[None], rows, visible_BL=hidden_layers(TINY, [1], 1, ids.device))
    actual = LongForward(net, attention="tiles").logits(ids, rows, visible=[1])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_block_mask_is_causality() -> None:
    S, E, ratio = 1152, 288, 4
    mask = entries_mask(S, E, ratio, torch.device("cpu"))
    dense = torch.zeros(S, -(-E // 128) * 128, dtype=torch.bool)
    for row in range(S // 128):
        block = slice(row * 128, row * 128 + 128)
        for column in mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist():
            dense[block, column * 128 : column * 128 + 128] = True
        for column in mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist():
            q, kv = torch.arange(S)[block, None], torch.arange(column * 128, column * 128 + 128)
            dense[block, column * 128 : column * 128 + 128] |= kv < (q + 1) // ratio
    expected = torch.arange(dense.shape[1]) < (torch.arange(S)[:, None] + 1) // ratio
    assert torch.equal(dense, expected)
