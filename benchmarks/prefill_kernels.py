"""The prefill forms of level 2 and of attention: fused against their references, checked, then timed.

python -m benchmarks.prefill_kernels --out results/prefill_kernels.json

At the sizes of the shipped model and of V4-Flash, one layer, a chunk of tokens after a long history. Level 2 is right
where each query's worst pick is no further behind the best that it left out than its arithmetic explains, in standard
deviations of the scores; attention where its error against float32 is about the reference's. Tiles other than those
that a kernel chooses are timed beside it. Exit status 1 if a check fails.

Shape letters: S = queries, N = chunks, H = heads, D = head_dim, I = index_head_dim, K = picks.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import common
from flashmem.backbone.fused_prefill import STORED_TILE
from flashmem.backbone.steps import KEY_TILE
from flashmem.bench import kernel_cases
from flashmem.bench.kernel_cases import PAGE_CHUNKS
from flashmem.bench.kernel_timing import copy_bytes_per_second, elapsed, relative_error, tiles_name
from flashmem.kernels.index_rows import decode_index_rows, encode_index_rows
from flashmem.kernels.kv_codec import KVFormatSpec, decode_rows, encode_rows, exact_spec
from flashmem.kernels.paged import PagedRows, interleaved_form
from flashmem.kernels.score_chunks import fused as score
from flashmem.kernels.select_chunks import fused as select
from flashmem.kernels.select_chunks import lightning_scores, topk_history
from flashmem.kernels.sparse_attention import EntrySource, attend_prefill, attend_prefill_rows
from flashmem.kernels.sparse_attention import fused as attention

JUDGED = 64
"""Queries that are compared with float32."""
TILE_QUERIES = 1024
"""Queries of a launch whose tiles are compared."""
MOST_BEHIND = {"fp8": 5e-3, "bf16": 1e-4, "fp32": 1e-4}
"""Standard deviations of the scores, by format of the keys: float16 queries lose 2^-11 of each product of fp8 keys;
exact keys lose the order of the sums."""
MOST_DIFFERENCE = 2e-2
ATTENTION_TILES = (
    (64, 32, 8), (64, 16, 8), (64, 64, 8), (32, 32, 4), (16, 32, 4), (16, 64, 4), (16, 32, 8),
)  # fmt: skip
"""Heads, keys and warps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """One layer of a model, and the formats of what it reads."""

    index_heads: int
    index_head_dim: int
    topk: int
    heads: int
    head_dim: int
    rope_dim: int
    window: int
    kv_format: Any


MODELS = {
    "shipped": Sizes(
        index_heads=16, index_head_dim=64, topk=64, heads=8, head_dim=128, rope_dim=32, window=64, kv_format="bf16"
    ),
    "v4-flash": Sizes(
        index_heads=64, index_head_dim=128, topk=512, heads=64, head_dim=512, rope_dim=64, window=128, kv_format="fp8"
    ),
}
TINY = {
    "tiny": Sizes(
        index_heads=3, index_head_dim=16, topk=5, heads=2, head_dim=128, rope_dim=32, window=4, kv_format="fp8"
    ),
    "tiny, exact": Sizes(
        index_heads=3, index_head_dim=16, topk=5, heads=2, head_dim=16, rope_dim=4, window=4, kv_format="fp32"
    ),
}
"""For Triton's interpreter."""


class Bench:
    """Where rows go, and the device and the numbers of queries and chunks of all of them."""

    def __init__(self, device: torch.device, queries: int, chunks: int, on_row: Callable[[dict[str, Any]], None]):
        self.device, self.queries, self.chunks, self.on_row = device, queries, chunks, on_row
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.failed: list[dict[str, Any]] = []
        self.copy_rate = copy_bytes_per_second(device) if device.type == "cuda" else None
        self._draw = torch.Generator(device).manual_seed(0)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self._draw)

    def check(self, passed: bool, **row: Any) -> None:
        row = {**row, "passed": passed}
        if not passed:
            self.failed.append(row)
        self.on_row(row)

    def time(self, row: Mapping[str, Any], calls: Mapping[str, Callable[[], object]], times: int = 5) -> None:
        """A row with the milliseconds of each call, a median; nothing where there is no device to time."""
        if self.device.type != "cuda":
            return
        found = {}
        for name, call in calls.items():
            call()
            found[name] = round(1e3 * statistics.median(elapsed(call) for _ in range(times)), 4)
        self.on_row({**row, **found})


# ---- level 2


def level_2(bench: Bench, name: str, sizes: Sizes) -> None:
    queries, chunks, k = bench.queries, bench.chunks, sizes.topk
    q = bench.randn(queries, sizes.index_heads, sizes.index_head_dim).to(bench.dtype)
    w = bench.randn(queries, sizes.index_heads) * (sizes.index_heads * sizes.index_head_dim) ** -0.5
    visible = chunks - queries // 4 + torch.arange(1, queries + 1, device=bench.device) // 4
    drawn = bench.randn(chunks, sizes.index_head_dim)
    keys = encode_index_rows(drawn) if sizes.kv_format == "fp8" else drawn.to(bench.dtype)
    wide = decode_index_rows(keys) if sizes.kv_format == "fp8" else keys.float()
    stored = [(first, keys[first : first + STORED_TILE]) for first in range(0, chunks, STORED_TILE)]
    decoded = [(first, wide[first : first + KEY_TILE].to(bench.dtype)) for first in range(0, chunks, KEY_TILE)]
    precision: Any = "fp32" if bench.dtype is torch.float32 else None

    def fused() -> torch.Tensor:
        return topk_history(q, w, visible, stored, k, precision=precision, impl="fused")

    def reference() -> torch.Tensor:
        return topk_history(q, w, visible, decoded, k)

    found, wanted = fused(), reference()
    at = torch.linspace(0, queries - 1, min(queries, JUDGED), device=bench.device).long()
    scores = lightning_scores(q[at].float(), w[at], wide)
    scores = scores.masked_fill(torch.arange(chunks, device=bench.device) >= visible[at, None], float("-inf"))
    least = scores.topk(k, dim=1).values[:, -1:]
    behind = (least - scores.gather(1, found[at].clamp_min(0))).clamp_min(0) / scores[scores.isfinite()].std()
    limit = MOST_BEHIND[sizes.kv_format]
    distinct = all(len(set(row)) == k for row in found[at].tolist())
    within = bool(((found[at] >= 0) & (found[at] < visible[at, None])).all())
    bench.check(
        float(behind.max()) <= limit and distinct and within,
        check="level 2", model=name, behind=float(behind.max()), limit=limit, distinct=distinct, visible=within,
        same_picks_share=float((found.sort(1).values == wanted.sort(1).values).float().mean()),
    )  # fmt: skip
    flops = 2 * queries * chunks * sizes.index_heads * sizes.index_head_dim
    row = {"time": "level 2", "model": name, "queries": queries, "chunks": chunks, "k": k, "flops": flops}
    bench.time(row, {"fused_ms": fused, "reference_ms": reference})
    _tiles_of_scores(bench, name, sizes, q, w, keys, visible)


def _tiles_of_scores(
    bench: Bench, name: str, sizes: Sizes, q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor
) -> None:
    if bench.device.type != "cuda":
        return
    precision: Any = "fp16" if sizes.kv_format == "fp8" else "bf16"
    some_q, some_w = score.prepare_queries(q[None, :TILE_QUERIES, None], w[None, :TILE_QUERIES, None], precision)
    part, seen = keys[:STORED_TILE], visible[:TILE_QUERIES].to(torch.int32)
    ranks = score.score_queries(some_q, some_w, part, seen)
    row: dict[str, Any] = {"time": "parts of level 2", "model": name, "queries": len(seen), "chunks": len(part)}
    bench.time(row, {
        "score_ms": lambda: score.score_queries(some_q, some_w, part, seen),
        "topk_ms": lambda: select.topk_ranks(ranks, sizes.topk, ordered=False),
    })  # fmt: skip
    for choice in kernel_cases.QUERY_TILES[precision]:
        again = score.score_queries(some_q, some_w, part, seen, tiles=choice)
        same = bool((again.view(torch.int32) == ranks.view(torch.int32)).all())
        row = {"time": "tiles of scores", "model": name, "tiles": tiles_name(choice), "same_bits": same}
        bench.time(row, {"ms": partial(score.score_queries, some_q, some_w, part, seen, tiles=choice)})


# ---- attention


def attend(bench: Bench, name: str, sizes: Sizes) -> None:
    """Windows alone, with all HCA entries that a query sees, and with its picks."""
    queries, chunks, dim, device = bench.queries, bench.chunks, sizes.head_dim, bench.device
    first = 4 * chunks - queries
    q = bench.randn(queries, sizes.heads, dim).to(bench.dtype)
    window_kv, sinks = bench.randn(queries + sizes.window - 1, dim).to(bench.dtype), bench.randn(sizes.heads)
    exact = exact_spec(bench.dtype, dim)
    dense = bench.randn(max(1, chunks // 32), dim).to(bench.dtype)
    visible = (torch.arange(first, first + queries, device=device) + 1) // 128
    hca = PagedRows(interleaved_form(exact.data_bytes, 0), [[encode_rows(exact, dense)]], [len(dense)])
    spec = KVFormatSpec(sizes.kv_format, dim, sizes.rope_dim)
    form, pages = spec.planar(PAGE_CHUNKS), -(-chunks // PAGE_CHUNKS)
    pool = torch.zeros(pages, form.page_bytes, dtype=torch.uint8, device=device)
    if sizes.kv_format == "fp8":
        kernel_cases.fill_entries(spec, form, pool, kernel_cases.generator(device, 5))
    else:
        rows = encode_rows(spec, bench.randn(pages * PAGE_CHUNKS, dim).to(bench.dtype))
        pool[:, : PAGE_CHUNKS * spec.data_bytes] = rows.view(pages, -1)
    csa = PagedRows(form, [[pool]], [pages * PAGE_CHUNKS])
    picks = torch.stack([torch.randperm(chunks, device=device, generator=bench._draw)[: sizes.topk] for _ in q])
    decoded, index = decode_rows(spec, csa.read()[0], bench.dtype), torch.arange(len(dense), device=device)
    kinds: dict[str, tuple[Any, Any, int]] = {
        "window": (None, None, 0),
        "hca": (
            lambda lo, hi: (dense, index < visible[lo:hi, None]),
            lambda lo, hi: EntrySource(hca.shared_by(hi - lo, visible[lo:hi].to(torch.int32)), exact),
            len(dense),
        ),
        "csa": (
            lambda lo, hi: (decoded[picks[lo:hi]], picks[lo:hi] >= 0),
            lambda lo, hi: EntrySource(csa.shared_by(hi - lo), spec, picks[lo:hi]),
            sizes.topk,
        ),
    }
    for kind, (sets, source, per_query) in kinds.items():
        args = (first, sizes.window, sinks, dim**-0.5)

        def reference(sets: Any = sets, args: Any = args, per_query: int = per_query) -> torch.Tensor:
            return attend_prefill(q, window_kv, *args, sets, per_query)

        def fused(source: Any = source, args: Any = args) -> torch.Tensor:
            return attend_prefill_rows(q, window_kv, *args, source)

        most = min(queries, JUDGED)
        ahead = queries - most
        wide_sets = None if sets is None else _widened(sets, ahead)
        wide_window = window_kv[-(most + sizes.window - 1) :].float()
        wide = attend_prefill(q[-most:].float(), wide_window, first + ahead, *args[1:], wide_sets, per_query)
        found, wanted = fused(), reference()
        errors = [relative_error(x[-most:].float(), wide.double()) for x in (found, wanted)]
        difference = relative_error(found.float(), wanted.double())
        bench.check(
            errors[0] <= 1.5 * errors[1] + 1e-5 and difference <= MOST_DIFFERENCE and bool(found.isfinite().all()),
            check="attention", model=name, kind=kind, fused_error=errors[0], reference_error=errors[1],
            difference=difference,
        )  # fmt: skip
        row = {"time": "attention", "model": name, "kind": kind, "queries": queries, "entries": per_query}
        bench.time(row, {"fused_ms": fused, "reference_ms": reference})
        if bench.device.type == "cuda":
            _tiles_of_attention(bench, {"model": name, "kind": kind}, sizes, fused)


def _widened(sets: Callable[[int, int], Any], ahead: int) -> Callable[[int, int], Any]:
    """Entries of queries from `ahead` on, in float32."""

    def entries(lo: int, hi: int) -> Any:
        values, valid = sets(ahead + lo, ahead + hi)
        return values.float(), valid

    return entries


def _tiles_of_attention(bench: Bench, about: dict[str, Any], sizes: Sizes, fused: Callable[[], object]) -> None:
    for heads, keys, warps in ATTENTION_TILES:
        if heads <= max(16, sizes.heads):
            tiles = attention.Tiles(heads, keys, 1, warps)
            with patch.object(attention, "default_tiles", return_value=tiles):
                row = {"time": "tiles of attention", **about, "heads": heads, "keys": keys, "warps": warps}
                bench.time(row, {"ms": fused}, times=3)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="queries")
    parser.add_argument("--chunks", type=int, default=65_536, help="of the history")
    parser.add_argument("--tiny", action="store_true", help="try the program in Triton's interpreter")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    started, device = common.machine(), torch.device("cpu" if args.tiny else "cuda")
    rows: list[dict[str, Any]] = []
    bench = Bench(device, 3 if args.tiny else args.tokens, 40 if args.tiny else args.chunks, rows.append)
    result: dict[str, Any] = {"complete": False, "copy_bytes_per_second": bench.copy_rate, "rows": rows}
    for name, sizes in (TINY if args.tiny else MODELS).items():
        for part in (level_2, attend):
            part(bench, name, sizes)
            common.log(f"{name}: {part.__name__}, {len(bench.failed)} checks failed")
            common.write_result(args.out, "prefill_kernels", result, started)
    common.write_result(args.out, "prefill_kernels", result | {"complete": True, "failed": bench.failed}, started)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
