"""The fused top-k and level 2 over rows read in place, against the definition: same picks, same order, same ties."""

import pytest
import torch

from flashmem.kernels.select_chunks import lightning_scores, select_resident, topk_chunks
from support.paged_cases import draw, interleaved_index_rows, pooled_exact_keys, pooled_index_rows


@pytest.mark.parametrize(
    ("count", "k"), [(1, 1), (7, 3), (64, 64), (65, 200), (1000, 33), (4096, 512), (4097, 5), (9000, 1024)]
)
def test_picks_are_those_of_the_definition(count: int, k: int, triton_device: torch.device) -> None:
    scores = draw(2, count, seed=count).mul(4).round()  # many ties
    ids = torch.arange(count).expand(2, count) * 3 + 5
    ids = ids.masked_fill(draw(2, count, seed=1) < -1, -1)
    ids[1, count // 2 :] = -1
    scores = scores.masked_fill(ids < 0, float("nan")).to(triton_device)
    ids = ids.to(triton_device)
    found, valid = topk_chunks(scores, ids, k, impl="fused")
    wanted, wanted_valid = topk_chunks(scores, ids, k)
    assert torch.equal(valid, wanted_valid) and torch.equal(found, wanted)


def test_special_scores_keep_their_order(triton_device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[0.0, -0.0, 1e-45, -1e-45, inf, -inf, 3e38, -3e38, nan, 1.0, -1.0, 0.0]]).to(triton_device)
    ids = torch.arange(12).view(1, -1).to(triton_device)
    for k in (1, 5, 12):
        assert torch.equal(topk_chunks(scores, ids, k, impl="fused")[0], topk_chunks(scores, ids, k)[0])


def test_equal_scores_go_to_the_lower_id(triton_device: torch.device) -> None:
    scores = torch.zeros(1, 9000, device=triton_device)
    ids = torch.arange(9000, device=triton_device).view(1, -1)
    assert topk_chunks(scores, ids, 100, impl="fused")[0].tolist() == [list(range(100))]


def test_nothing_to_pick(triton_device: torch.device) -> None:
    none = torch.full((2, 70), -1, device=triton_device)
    _, valid = topk_chunks(torch.zeros(2, 70, device=triton_device), none, 5, impl="fused")
    assert not valid.any()
    empty = torch.zeros(2, 0, device=triton_device)
    assert topk_chunks(empty, empty.long(), 5, impl="fused")[0].shape == (2, 0)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("heads", [3, 64])
def test_level_2_reads_pages_in_place(ordered: bool, heads: int, triton_device: torch.device) -> None:
    keys = pooled_index_rows([50, 0, 9, 128], 32, triton_device)
    q, w = draw(4, heads, 32, seed=1).to(triton_device), draw(4, heads, seed=2).to(triton_device)
    found = select_resident(q, w, keys, 20, ordered=ordered, precision="fp32", impl="fused")
    wanted = select_resident(q, w, keys, 20, ordered=ordered)
    assert found.shape == (4, 20) and torch.equal(found, wanted)
    assert (found >= 0).sum(1).tolist() == [20, 0, 9, 20]


def test_level_2_is_scores_and_top_k_of_gathered_keys(triton_device: torch.device) -> None:
    """What a decode step does now."""
    keys = pooled_exact_keys([50, 30], 16, torch.float32, triton_device)
    q, w = draw(2, 16, 16, seed=1).to(triton_device), draw(2, 16, seed=2).to(triton_device)
    gathered = keys.read().view(torch.float32)
    ids = torch.arange(50, device=triton_device).masked_fill(~keys.valid(), -1)
    picks, valid = topk_chunks(lightning_scores(q, w, gathered), ids, 12)
    assert torch.equal(select_resident(q, w, keys, 12, impl="fused"), picks.masked_fill(~valid, -1))


def test_rows_of_target_layers_need_no_pages(triton_device: torch.device) -> None:
    keys = interleaved_index_rows([50, 3], 32, triton_device)
    q, w = draw(2, 8, 32, seed=1).to(triton_device), draw(2, 8, seed=2).to(triton_device)
    found = select_resident(q, w, keys, 7, precision="fp32", impl="fused")
    assert torch.equal(found, select_resident(q, w, keys, 7))


def test_relu_ties_go_to_the_lower_chunk(triton_device: torch.device) -> None:
    keys = pooled_exact_keys([40], 16, torch.float32, triton_device)
    q, w = torch.zeros(1, 4, 16, device=triton_device), torch.ones(1, 4, device=triton_device)
    assert select_resident(q, w, keys, 5, impl="fused").tolist() == [[0, 1, 2, 3, 4]]


def test_too_many_picks_and_wrong_shapes_are_refused(triton_device: torch.device) -> None:
    scores = torch.zeros(1, 2000, device=triton_device)
    with pytest.raises(ValueError, match="1025 picks; the fused kernel takes at most 1024"):
        topk_chunks(scores, scores.long(), 1025, impl="fused")
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        topk_chunks(scores, scores.long(), 5, impl="fast")  # type: ignore[arg-type]
    keys = interleaved_index_rows([5], 16, triton_device)
    with pytest.raises(ValueError, match="do not fit"):
        select_resident(torch.zeros(2, 4, 16), torch.zeros(2, 4), keys, 3)
