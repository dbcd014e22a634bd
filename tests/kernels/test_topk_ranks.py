"""Property tests of the search for the smallest picked rank: any unsigned ranks, any ties, any count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmem.kernels.select_pages import select_pages

TOP = 2**32 - 1


def picks(ranks_BN: torch.Tensor, k: int, device: torch.device, *, ordered: bool) -> torch.Tensor:
    from flashmem.kernels.select_chunks.fused import topk_ranks

    return topk_ranks(ranks_BN.to(torch.uint32).to(device), k, ordered=ordered).cpu()


def truth(ranks_BN: torch.Tensor, k: int, *, ordered: bool) -> torch.Tensor:
    """By a stable sort of int64 ranks [B, N]."""
    order = ranks_BN.sort(dim=1, descending=True, stable=True)
    found, above = order.indices[:, :k], order.values[:, :k] > 0
    if ordered:
        return found.masked_fill(~above, -1)
    found = found.masked_fill(~above, ranks_BN.shape[1]).sort(dim=1).values
    return found.masked_fill(found == ranks_BN.shape[1], -1)


def check(ranks_BN: torch.Tensor, k: int, device: torch.device) -> None:
    for ordered in (False, True):
        assert torch.equal(picks(ranks_BN, k, device, ordered=ordered), truth(ranks_BN, k, ordered=ordered))


@given(
    ranks=st.lists(
        st.one_of(st.integers(0, 3), st.integers(TOP - 3, TOP), st.integers(0, TOP), st.sampled_from((0, 2**31))),
        min_size=1,
        max_size=80,
    ),
    k=st.integers(1, 90),
)
def test_any_ranks(ranks: list[int], k: int, triton_device: torch.device) -> None:
    check(torch.tensor([ranks]), k, triton_device)


@given(base=st.integers(0, TOP - 7), width=st.integers(1, 7), count=st.integers(1, 300), data=st.data())
@settings(max_examples=20)
def test_common_prefixes(base: int, width: int, count: int, data: st.DataObject, triton_device: torch.device) -> None:
    """Ranks that differ in their last bits only."""
    generator = torch.Generator().manual_seed(base)
    ranks = base + torch.randint(0, width + 1, (2, count), generator=generator)
    check(ranks, data.draw(st.integers(1, count)), triton_device)


@pytest.mark.parametrize("rank", [0, 1, 2, 2**31, TOP - 1, TOP])
@pytest.mark.parametrize("k", [1, 64, 130])
def test_all_equal(rank: int, k: int, triton_device: torch.device) -> None:
    check(torch.full((1, 130), rank), k, triton_device)


def spread(kind: str, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    uniform = torch.randint(0, TOP + 1, (2, count), generator=generator)
    if kind == "full range":
        return uniform
    if kind == "powers of two":
        return 1 << (uniform % 33).clamp(max=31)
    if kind == "mostly zero":
        return uniform.masked_fill(uniform % 50 > 0, 0)
    if kind == "ends":
        return torch.where(uniform % 2 > 0, TOP, 1)
    return torch.arange(count).expand(2, count) + (TOP - count)  # "rising": the last are the best


@pytest.mark.parametrize("kind", ["full range", "powers of two", "mostly zero", "ends", "rising"])
@pytest.mark.parametrize(("count", "k"), [(1023, 512), (4096, 1), (8192, 1024), (8193, 512)])
def test_blocks_and_rounds(kind: str, count: int, k: int, triton_device: torch.device) -> None:
    """Rows that one program takes, and one that is cut."""
    check(spread(kind, count), k, triton_device)


def test_a_row_that_is_cut_twice(triton_device: torch.device) -> None:
    check(spread("mostly zero", 40_000), 1024, triton_device)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["full range", "powers of two", "mostly zero", "ends", "rising"])
@pytest.mark.parametrize(("count", "k"), [(6144, 512), (24_576, 512), (262_144, 512), (500_001, 1024)])
def test_long_rows_twice_the_same(kind: str, count: int, k: int, triton_device: torch.device) -> None:
    check(spread(kind, count), k, triton_device)
    once, twice = (picks(spread(kind, count), k, triton_device, ordered=False) for _ in range(2))
    assert torch.equal(once, twice)


@settings(max_examples=25)
@given(
    pages=st.integers(1, 70),
    limits=st.tuples(st.integers(0, 80), st.integers(0, 80)),
    sink=st.integers(0, 4),
    recency=st.integers(0, 6),
    seed=st.integers(0, 999),
)
def test_pages_above_the_threshold_come_first(
    pages: int, limits: tuple[int, int], sink: int, recency: int, seed: int, triton_device: torch.device
) -> None:
    """Few distinct scores, infinite ones too; any limits; sink and recency that leave no choice."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([float("-inf"), -1.0, 0.0, 2.0, float("inf")])
    scores = values[torch.randint(0, 5, (3, pages), generator=generator)].to(triton_device)
    above = torch.randint(0, 2, (3, pages), generator=generator, dtype=torch.int32).to(triton_device)
    live = torch.randint(0, pages + 1, (3,), generator=generator, dtype=torch.int32).to(triton_device)
    least, most = (torch.full((3,), n, dtype=torch.int32, device=triton_device) for n in sorted(limits))
    found, wanted = (
        select_pages(scores, live, least, most, sink=sink, recency=recency, above_BP=above, impl=impl)
        for impl in ("fused", "reference")
    )
    for name in ("pages_BP", "counts_B", "above_B"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
