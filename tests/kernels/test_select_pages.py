"""Page selection on the device against its definition and against the policies whose rule it is."""

import pytest
import torch

from flashmem.kernels.select_pages import PagePicks, select_pages
from flashmem.policy import BudgetPolicy, ThresholdPolicy, always_kept
from flashmem.policy.scores import page_maxima, page_scores
from flashmem.types import PageView
from support.paged_cases import draw


def int32(*values: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def same(a: PagePicks, b: PagePicks) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("pages_BP", "counts_B", "above_B"))


@pytest.mark.parametrize("pages", [1, 2, 63, 64, 300])
@pytest.mark.parametrize(("least", "most"), [(0, 0), (3, 9), (2, 2), (0, 1000)])
@pytest.mark.parametrize("with_above", [False, True])
def test_fused_is_the_definition(
    pages: int, least: int, most: int, with_above: bool, triton_device: torch.device
) -> None:
    num_pages = int32(pages, pages // 2, 0, 1, max(1, pages - 1), device=triton_device)
    scores = draw(5, pages, seed=pages).mul(2).round()
    scores[torch.arange(pages) >= num_pages.cpu()[:, None]] = float("nan")
    above = (draw(5, pages, seed=1) > 0.5).int().to(triton_device) if with_above else None
    limits = [torch.full((5,), limit, dtype=torch.int32, device=triton_device) for limit in (least, most)]
    args = (scores.to(triton_device), num_pages, *limits)
    wanted = select_pages(*args, sink=1, recency=2, above_BP=above)
    assert same(select_pages(*args, sink=1, recency=2, above_BP=above, impl="fused"), wanted)


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize(("floor", "ceiling"), [(0, None), (4, 6), (10, 20)])
def test_it_selects_what_the_threshold_policy_selects(
    impl: str, floor: int, ceiling: int | None, triton_device: torch.device
) -> None:
    for seed in range(4):
        view = _view(pages=40, seed=seed)
        policy = ThresholdPolicy(threshold=0.6, floor_pages=floor, ceiling_pages=ceiling)
        wanted = policy.select(view)
        assert view.logits_N is not None
        scores, best = (f(view.logits_N, view.page_chunks, view.num_pages)[None] for f in (page_scores, page_maxima))
        above = (best > torch.logit(torch.tensor(policy.threshold))).int()
        found = select_pages(
            scores.to(triton_device),
            int32(view.num_pages, device=triton_device),
            int32(floor, device=triton_device),
            int32(view.num_pages if ceiling is None else ceiling, device=triton_device),
            sink=1,
            recency=2,
            above_BP=above.to(triton_device),
            impl=impl,
        )
        count = int(found.counts_B[0])
        assert tuple(found.pages_BP[0, :count].tolist()) == wanted.pages
        assert found.pages_BP[0, count:].eq(-1).all()
        assert int(found.above_B[0]) == round(wanted.eligible_share * (view.num_pages - len(view.always)))
        assert wanted.truncated == (ceiling is not None and int(found.above_B[0]) > ceiling)


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_it_selects_what_the_budget_policy_selects(impl: str, triton_device: torch.device) -> None:
    view, policy = _view(pages=40, seed=9), BudgetPolicy(pages=12)
    assert view.logits_N is not None
    scores = page_scores(view.logits_N, view.page_chunks, view.num_pages)[None].to(triton_device)
    room = int32(policy.room(view), device=triton_device)
    found = select_pages(scores, int32(40, device=triton_device), room, room, sink=1, recency=2, impl=impl)
    assert tuple(found.pages_BP[0, : int(found.counts_B[0])].tolist()) == policy.select(view).pages


def test_equal_scores_go_to_the_lower_page(triton_device: torch.device) -> None:
    scores, two = torch.zeros(1, 9, device=triton_device), int32(2, device=triton_device)
    found = select_pages(scores, int32(9, device=triton_device), two, two, sink=1, recency=1, impl="fused")
    assert found.pages_BP.tolist() == [[0, 1, 2, 8, -1, -1, -1, -1, -1]]


def test_no_sessions(triton_device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int32, device=triton_device)
    found = select_pages(torch.zeros(0, 5, device=triton_device), none, none, none, sink=1, recency=1, impl="fused")
    assert found.pages_BP.shape == (0, 5)


def test_wrong_shapes_are_refused(triton_device: torch.device) -> None:
    scores, one = torch.zeros(1, 5), int32(1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="least_B must be int32"):
        select_pages(scores, one, one.long(), one, sink=0, recency=0)
    with pytest.raises(ValueError, match="above_BP must be int32"):
        select_pages(scores, one, one, one, sink=0, recency=0, above_BP=scores > 0)
    with pytest.raises(ValueError, match="unknown impl"):
        select_pages(scores, one, one, one, sink=0, recency=0, impl="fast")  # type: ignore[arg-type]


def _view(pages: int, seed: int) -> PageView:
    chunks = pages * 4 - 3
    return PageView(
        num_pages=pages,
        page_chunks=4,
        num_chunks=chunks,
        always=always_kept(pages, 1, 2),
        logits_N=draw(chunks, seed=seed).mul(2).round().div(2),
    )
