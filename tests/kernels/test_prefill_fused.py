"""Level 2 and attention of a prefill on the fused kernels, against their definitions."""

from __future__ import annotations

import pytest
import torch

from flashmem.kernels.index_rows import encode_index_rows
from flashmem.kernels.kv_codec import KVFormatSpec, encode_rows
from flashmem.kernels.paged import PagedRows, interleaved_form
from flashmem.kernels.score_chunks import QueryFinish
from flashmem.kernels.select_chunks import fused, topk_history
from flashmem.kernels.sparse_attention import EntrySource, attend_prefill, attend_prefill_rows
from support.paged_cases import POISON, draw

SEEN = [0, 1, 3, 0, 40, 77, 77, 12, 76, 5, 30]


def cut(keys: torch.Tensor, *sizes: int) -> list[tuple[int, torch.Tensor]]:
    """Tiles of these sizes, each among NaN bytes."""
    tiles, first = [], 0
    for size in sizes:
        bytes_NE = keys[first : first + size].view(torch.uint8)
        around = torch.full((size + 4, bytes_NE.shape[1]), POISON, dtype=torch.uint8, device=keys.device)
        around[2:-2] = bytes_NE
        tiles.append((first, around[2:-2].view(keys.dtype)))
        first += size
    assert first == len(keys)
    return tiles


def whole_numbers(*shape: int, seed: int) -> torch.Tensor:
    """Sums of products of these are exact, and often equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def both(
    q: torch.Tensor, w: torch.Tensor, seen: list[int], tiles: list[tuple[int, torch.Tensor]], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    visible = torch.tensor(seen, device=q.device)
    found, wanted = (
        topk_history(q, w, visible, tiles, k, precision="fp32", impl=impl) for impl in ("fused", "reference")
    )
    return found, wanted.sort(dim=1).values


def ascending(picks: torch.Tensor) -> torch.Tensor:
    return picks.sort(dim=1).values


@pytest.mark.parametrize(
    ("heads", "dim", "k", "sizes"),
    [(3, 12, 5, (77,)), (16, 8, 64, (64, 13)), (17, 32, 1, (1, 70, 6)), (64, 16, 77, (40, 37)), (130, 8, 20, (77,))],
    ids=str,
)
def test_picks_with_ties_in_tiles_and_blocks(
    heads: int, dim: int, k: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    """Queries that see nothing, a part, or all; blocks of three queries at most."""
    monkeypatch.setattr(fused, "RANK_BYTES", 3 * 4 * max(sizes))
    q, w = whole_numbers(len(SEEN), heads, dim, seed=1), whole_numbers(len(SEEN), heads, seed=2)
    keys = whole_numbers(77, dim, seed=3)
    q, w, keys = (x.to(triton_device) for x in (q, w, keys))
    found, wanted = both(q, w, SEEN, cut(keys, *sizes), k)
    assert torch.equal(ascending(found), wanted)


def test_more_picks_than_chunks(triton_device: torch.device) -> None:
    q, w, keys = (x.to(triton_device) for x in (draw(3, 4, 8), draw(3, 4, seed=1), draw(6, 8, seed=2)))
    found, wanted = both(q, w, [6, 0, 2], cut(keys, 4, 2), 10)
    assert found.shape == (3, 10) and torch.equal(ascending(found), wanted)


def test_index_rows_and_unfinished_queries(triton_device: torch.device) -> None:
    """Tables per query, the rotation into the basis of the rows, and the scale of each row."""
    queries, heads, dim = 9, 5, 16
    q, w, keys = draw(queries, heads, dim), draw(queries, heads, seed=1), 5 * draw(50, dim, seed=2)
    angles = draw(1, queries, 4, seed=3)
    q, w, cos, sin, rows = (x.to(triton_device) for x in (q, w, angles.cos(), angles.sin(), encode_index_rows(keys)))
    finish, visible = QueryFinish((cos, sin), hadamard=True, weight_scale=0.3), torch.arange(42, 51, device=q.device)
    found, wanted = (
        topk_history(q, w, visible, cut(rows, 20, 30), 7, finish=finish, precision="fp32", impl=impl)
        for impl in ("fused", "reference")
    )
    assert torch.equal(ascending(found), ascending(wanted))


def test_what_it_cannot_score_is_refused(triton_device: torch.device) -> None:
    q, w, keys = (x.to(triton_device) for x in (draw(2, 4, 8), draw(2, 4), draw(6, 8)))
    seen = torch.tensor([6, 6], device=q.device)
    with pytest.raises(ValueError, match="one layer, token and term"):
        topk_history(q, w, seen, [(0, encode_index_rows(keys))], 2, precision="fp8x2", impl="fused")
    with pytest.raises(ValueError, match="would round 32-bit keys"):
        topk_history(q, w, seen, [(0, keys)], 2, precision="bf16", impl="fused")
    with pytest.raises(ValueError, match="unknown impl 'tiled'"):
        topk_history(q, w, seen, [(0, keys)], 2, impl="tiled")  # type: ignore[arg-type]


WINDOW = 8


def attention(first_query: int, queries: int, device: torch.device, dim: int = 24) -> dict[str, object]:
    past = min(first_query, WINDOW - 1)
    return {
        "q_SHD": draw(queries, 3, dim).to(device),
        "window_kv": draw(past + queries, dim, seed=1).to(device),
        "first_query": first_query,
        "window": WINDOW,
        "sinks_H": draw(3, seed=2).to(device),
        "scale": dim**-0.5,
    }


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first_query", [0, 3, 7, 8, 30])
@pytest.mark.parametrize("queries", [1, 13])
def test_windows(first_query: int, queries: int, triton_device: torch.device) -> None:
    case = attention(first_query, queries, triton_device)
    same(attend_prefill_rows(**case), attend_prefill(**case))  # type: ignore[arg-type]


@pytest.mark.parametrize("first_query", [0, 5, 21])
def test_every_visible_entry(first_query: int, triton_device: torch.device) -> None:
    """HCA: a query sees the entries of the windows that ended before it."""
    case = attention(first_query, 14, triton_device)
    visible = (torch.arange(first_query, first_query + 14, device=triton_device) + 1) // 4
    entries = draw(int(visible[-1]), 24, seed=4).to(triton_device)
    index = torch.arange(len(entries), device=triton_device)
    wanted = attend_prefill(**case, entries=lambda lo, hi: (entries, index < visible[lo:hi, None]))  # type: ignore[arg-type]
    rows = PagedRows(interleaved_form(24 * 4, 0), [[entries.view(torch.uint8)]], [len(entries)])
    spec = KVFormatSpec("fp32", 24, 0)

    def source(lo: int, hi: int) -> EntrySource:
        return EntrySource(rows.shared_by(hi - lo, visible[lo:hi].to(torch.int32)), spec)

    same(attend_prefill_rows(**case, entries=source), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_format", ["fp32", "fp8"])
@pytest.mark.parametrize("bytes_per_query", [0, 1 << 26])  # in one launch, and in tiles of four
def test_picked_entries(kv_format: str, bytes_per_query: int, triton_device: torch.device) -> None:
    spec = KVFormatSpec(kv_format, 24, 8)  # type: ignore[arg-type]
    case = attention(5, 14, triton_device)
    stored = encode_rows(spec, draw(30, 24, seed=5)).to(triton_device)
    rows = PagedRows(interleaved_form(spec.data_bytes, spec.scale_bytes), [[stored]], [30])
    one = EntrySource(rows, spec).key_set(torch.float32)[0][0]
    picks = torch.stack([torch.randperm(30)[:6] for _ in range(14)]).to(triton_device)
    picks[picks > 20] = -1
    picks[4] = -1
    wanted = attend_prefill(
        **case,
        entries=lambda lo, hi: (one[picks[lo:hi].clamp_min(0)], picks[lo:hi] >= 0),  # type: ignore[arg-type]
    )
    found = attend_prefill_rows(
        **case, entries=lambda lo, hi: EntrySource(rows.shared_by(hi - lo), spec, picks[lo:hi]),  # type: ignore[arg-type]
        bytes_per_query=bytes_per_query,
    )  # fmt: skip
    same(found, wanted)


def test_a_window_that_does_not_fit_is_refused(triton_device: torch.device) -> None:
    case = attention(5, 3, triton_device)
    with pytest.raises(ValueError, match=r"need 6 tokens before them in torch\.float32, got 5"):
        attend_prefill_rows(**case | {"first_query": 6})  # type: ignore[arg-type]
