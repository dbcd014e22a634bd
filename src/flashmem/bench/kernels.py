"""The fused kernels on a CUDA device: ceilings, then every kernel against float64, then times.

Rows are appended to DIR/rows.jsonl as they come, so that a run which is cut keeps what it has. Every row names its
bytes, its floating-point operations, and the share of the copy bandwidth that this run measured; `floor_us` is the
larger of bytes over that bandwidth and operations over the rate of their precision. A variant whose check failed is
not timed. Other columns: `kernel_timing`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

from ..kernels.index_rows import decode_index_rows, encode_index_rows
from ..kernels.kv_codec import KVFormatSpec, PlanarForm, decode_rows, encode_rows, get_planar
from ..kernels.paged import PagedRows
from ..kernels.pool_in_place import pool_in_place
from ..kernels.score_chunks import fused as score
from ..kernels.score_chunks import score_pages
from ..kernels.select_chunks import fused as select
from ..kernels.select_chunks import lightning_scores, topk_chunks
from ..kernels.select_pages import select_pages
from ..kernels.sparse_attention import EntrySource, attend
from ..kernels.sparse_attention import fused as attention
from . import kernel_cases, kernel_resources, report
from .kernel_cases import (
    BATCHES,
    PAGE_CHUNKS,
    RESIDENT_CHUNKS,
    TEMPERATURE,
    THRESHOLD,
    PoolCase,
    ScoreCase,
    page_scores_fused,
)
from .kernel_peers import run_deep_gemm
from .kernel_timing import Run, copy_bytes_per_second, elapsed, relative_error, tiles_name, time_peer
from .peers import state as peer_state

SCALE = kernel_cases.HEAD_DIM**-0.5
PRECISIONS: tuple[Any, ...] = ("fp8", "fp8x2", "fp16")
ROTATED_BYTES = 300 << 20
"""Inputs of a warm measurement together, several times the second-level cache."""
HEADLINE = ScoreCase(262_144, 8)
OTHER_SCORES = (
    ScoreCase(262_144, 8, layers=1), ScoreCase(262_144, 1), ScoreCase(65_536, 1), ScoreCase(65_536, 8),
    ScoreCase(65_536, 32), ScoreCase(131_072, 8), ScoreCase(262_144, 32), ScoreCase(262_144, 8, planar=False),
)  # fmt: skip
PRODUCT_SIZE = 8192
PEER_CHUNKS = (65_536, 262_144)
POOL_CHUNKS = 8192
RAGGED = (1, 0, 63, 1000, 4097)
TOPK_COUNTS = (1, 63, 512, 4096, 4097, 24_576, 262_144)
PAGES = 4096
ENCODED = (8, 64, 65_536)
POOLING = (8, 64)

# relative errors in the norm, against float64 on the same stored bytes; fp8: on the rounded queries
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-2, "fp8": 2e-3, "fp8x2": 2e-3, "attend": 5e-3}


# ---- ceilings


def run_ceilings(run: Run) -> None:
    run.copy_bytes_per_second = copy_bytes_per_second(run.device)
    size = PRODUCT_SIZE
    a, b = (torch.randn(size, size, device=run.device) for _ in range(2))
    one = torch.ones((), device=run.device)
    products: dict[str, Callable[[], object]] = {
        "bf16": lambda: x @ y,
        "fp8": lambda: torch._scaled_mm(x8, y8.t(), one, one, out_dtype=torch.bfloat16),
    }
    x, y, x8, y8 = a.bfloat16(), b.bfloat16(), a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    for name, product in products.items():
        for _ in range(3):
            product()
        seconds = statistics.median(elapsed(product) for _ in range(10))
        run.flops_per_second[name] = 2 * size**3 / seconds
    run.flops_per_second["fp16"] = run.flops_per_second["bf16"]
    run.flops_per_second["fp8x2"] = run.flops_per_second["fp8"] / 2
    run.flops_per_second["fp32"] = run.flops_per_second["bf16"] / 14  # datasheet: 67 of 990 TFLOP/s
    run.add(
        "ceilings",
        copy_gb_per_s=round(run.copy_bytes_per_second / 1e9, 1),
        **{f"{name}_tflop_per_s": round(rate / 1e12, 1) for name, rate in run.flops_per_second.items()},
    )


# ---- checks


def run_checks(run: Run) -> None:
    """Every kernel in the dtypes of a device, on ragged batches and odd sizes."""
    for heads in (1, 17, 64, 128, 256):
        for dim in (64, 96, 128):
            _check_scores(run, heads, dim, layers=1, planar=heads % 2 == 0)
    for planar in (True, False):
        _check_scores(run, 128, 128, layers=3, planar=planar)
    _check_exact_keys(run)
    for kv_format in ("fp8", "bf16", "fp32"):
        for dtype in (torch.bfloat16, torch.float32):
            _check_attention(run, kv_format, dtype)
    _check_topk(run)
    _check_encoders(run)


def _ragged(counts: Sequence[int], layers: int, dim: int, planar: bool, device: torch.device) -> PagedRows:
    """Rows of sessions of any lengths, NaN bytes behind them."""
    form = kernel_cases.index_form(planar, dim)
    regions: list[list[torch.Tensor]] = []
    for layer in range(layers):
        regions.append([])
        for b, count in enumerate(counts):
            pages = -(-count // form.page_chunks) + 1
            region = torch.full((pages, form.page_bytes), 0xFF, dtype=torch.uint8, device=device)
            kernel_cases.fill_index_rows(form, region, kernel_cases.generator(device, 10 * layer + b), count)
            regions[-1].append(region)
    return PagedRows(form, regions, counts)


def _logits64(q: torch.Tensor, w: torch.Tensor, keys: PagedRows) -> torch.Tensor:
    """Logits [L, B, N] in float64, a session at a time; NaN where there is no chunk."""
    layers = []
    for layer in range(keys.num_layers):
        rows = keys.read(layer)
        out = torch.full(rows.shape[:2], float("nan"), dtype=torch.float64, device=rows.device)
        for b, count in enumerate(keys.counts_B.tolist()):
            decoded = decode_index_rows(rows[b, :count]).double()
            out[b, :count] = (decoded @ q[layer, b, 0].double().T).relu() @ w[layer, b, 0].double()
        layers.append(out)
    return torch.stack(layers)


def _check_scores(run: Run, heads: int, dim: int, *, layers: int, planar: bool) -> None:
    counts = list(RAGGED)
    keys = _ragged(counts, layers, dim, planar, run.device)
    draw = kernel_cases.generator(run.device, heads * dim)
    q = kernel_cases.randn(layers, len(counts), 1, heads, dim, device=run.device, draw=draw)
    w = kernel_cases.randn(layers, len(counts), 1, heads, device=run.device, draw=draw)
    valid = keys.valid()
    wanted = _logits64(q, w, keys).amax(0)
    for precision in (*PRECISIONS, "fp32"):
        name = f"logits {precision} heads={heads} dim={dim} layers={layers} {'planar' if planar else 'interleaved'}"
        prepared = score.prepare_queries(q, w, precision)
        _poison(run.device)
        found = score.score_logits(*prepared, keys, mean=False)
        extra = {"error_of_unrounded": relative_error(found[valid], wanted[valid])}
        # what the kernel must compute: the sum of the rounded terms, with the weights it was given
        rounded = prepared[0].float().sum(3)
        target = _logits64(rounded, 2 * prepared[1], keys).amax(0)
        passed = run.check(name, relative_error(found[valid], target[valid]), TOLERANCES[precision], **extra)
        run.check(f"{name}: -inf past the count", float((~found[~valid].isneginf()).sum()), 0)
        if passed:
            _check_page_reductions(run, name, prepared, keys, found)


def _check_page_reductions(
    run: Run, name: str, prepared: tuple[torch.Tensor, torch.Tensor], keys: PagedRows, logits: torch.Tensor
) -> None:
    """Against float64 reductions of the kernel's own logits."""
    for page_chunks in (4, 64, 256):
        _poison(run.device)
        best, total, above = score.score_page_reductions(
            *prepared, keys, page_chunks=page_chunks, temperature=TEMPERATURE, threshold=THRESHOLD, mean=False
        )
        missing = -logits.shape[1] % page_chunks
        padded = F.pad(logits.double(), (0, missing), value=-torch.inf).unflatten(1, (-1, page_chunks))
        wanted, highest = TEMPERATURE * torch.logsumexp(padded / TEMPERATURE, 2), padded.amax(2)
        there, near = wanted.isfinite(), 1e-5 * float(logits[logits.isfinite()].abs().max())
        counted = above >= (padded > THRESHOLD + near).sum(2)
        counted &= above <= (padded > THRESHOLD - near).sum(2)
        same = torch.equal(there, total.isfinite()) and torch.equal(there, best.isfinite()) and bool(counted.all())
        error = max(relative_error(total[there], wanted[there]), relative_error(best[there], highest[there]))
        run.check(f"pages of {page_chunks}: {name}", error if same else float("nan"), 1e-5)


def _check_exact_keys(run: Run) -> None:
    dim, draw = kernel_cases.INDEX_DIM, kernel_cases.generator(run.device, 5)
    keys = kernel_cases.randn(3, 1000, dim, device=run.device, draw=draw).bfloat16()
    form = PlanarForm(1, 2 * dim, 0)
    paged = PagedRows(form, [list(keys.view(torch.uint8))], [1000, 7, 500])
    q, w = ScoreCase(1, 3, layers=1, heads=64).queries(run.device)
    found = score.score_logits(*score.prepare_queries(q, w, "bf16"), paged, mean=False)
    products = keys.double() @ q[0, :, 0].bfloat16().double().transpose(1, 2)
    wanted = (products.relu() @ w[0, :, 0, :, None].double())[..., 0]
    valid = paged.valid()
    run.check("logits of bf16 keys", relative_error(found[valid], wanted[valid]), 1e-4)


def _check_attention(run: Run, kv_format: str, dtype: torch.dtype) -> None:
    q, sources, sinks = PoolCase(1000, 5, kv_format).attention(run.device, picks=333)
    picks = sources[1].picks_BK
    assert picks is not None
    for b, count in enumerate((333, 0, 1, 100, 64)):
        picks[b, count:] = -1
    q = q.to(dtype)
    wanted = _attention64(q, sources, sinks)
    for used, label in ((sources, "window and picks"), (sources[:1], "window alone")):
        target = wanted if len(used) == 2 else _attention64(q, used, sinks)
        tiles: list[attention.Tiles | None] = [None]
        if dtype is torch.bfloat16:
            tiles += [*kernel_cases.attend_tiles(1), *kernel_cases.attend_tiles(7)]
        for choice in tiles:
            _poison(run.device)
            found = attention.attend_rows_fused(q, used, sinks, SCALE, choice)
            name = f"attend {label} {kv_format} {dtype} {tiles_name(choice)}"
            run.check(name, relative_error(found, target), TOLERANCES["attend"] if dtype is torch.bfloat16 else 1e-5)


def _attention64(q: torch.Tensor, sources: Sequence[EntrySource], sinks: torch.Tensor) -> torch.Tensor:
    sets = [source.key_set(torch.float32) for source in sources]
    return attend(q.double(), [(kv.double(), valid) for kv, valid in sets], sinks.double(), SCALE)


def _check_topk(run: Run) -> None:
    draw = kernel_cases.generator(run.device, 3)
    for count in TOPK_COUNTS:
        scores = kernel_cases.randn(3, count, device=run.device, draw=draw)
        for name, values in (("random", scores), ("ties", scores.mul(3).round()), ("equal", torch.zeros_like(scores))):
            ids = torch.arange(count, device=run.device).expand(3, count).clone()
            ids[1, count // 2 :] = -1
            for k in (1, 512, 1024):
                wanted, there = topk_chunks(values, ids, k)
                found, valid = topk_chunks(values, ids, k, impl="fused")
                wrong = int((found != wanted).sum() + (valid != there).sum())
                run.check(f"top-{k} of {count}, {name}", wrong, 0)
    for pages in (1, 100, PAGES):
        scores = kernel_cases.randn(4, pages, device=run.device, draw=draw)
        above = (scores > 1).int()
        limits = [torch.full((4,), n, dtype=torch.int32, device=run.device) for n in (pages, 4, 200)]
        call = partial(select_pages, scores, *limits, sink=1, recency=8, above_BP=above)
        a, b = call(impl="reference"), call(impl="fused")
        wrong = int(
            (a.pages_BP != b.pages_BP).sum() + (a.counts_B != b.counts_B).sum() + (a.above_B != b.above_B).sum()
        )
        run.check(f"select pages of {pages}", wrong, 0)


def _check_encoders(run: Run) -> None:
    """The bytes of the definition; pooling within float32 rounding of it."""
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (64, 128):
            keys = _of_all_sizes(run.device, 5000, dim).to(dtype)
            wrong = int((encode_index_rows(keys, impl="fused") != encode_index_rows(keys)).sum())
            run.check(f"index rows of {dim} channels, {dtype}", wrong, 0)
        for head_dim, rope_dim in ((64, 0), (70, 4), (128, 32), (512, 64)):
            spec, kv = KVFormatSpec("fp8", head_dim, rope_dim), _of_all_sizes(run.device, 5000, head_dim).to(dtype)
            wrong = int((encode_rows(spec, kv, impl="fused") != encode_rows(spec, kv)).sum())
            run.check(f"fp8 entries of {head_dim} channels, {rope_dim} rotary, {dtype}", wrong, 0)
    for windows, tokens in kernel_cases.POOLED:
        rings = kernel_cases.full_rings(windows, tokens, 300, 192, torch.float32, run.device)
        wanted = pool_in_place(*(x.clone() for x in rings), impl="reference")
        found = pool_in_place(*rings, impl="fused")
        run.check(f"pooling of {windows * tokens} slots", relative_error(found, wanted), 1e-5)


def _of_all_sizes(device: torch.device, *shape: int) -> torch.Tensor:
    """Values over eight orders of magnitude, zeros among them."""
    draw = kernel_cases.generator(device, 7)
    x = kernel_cases.randn(*shape, device=device, draw=draw)
    x *= 10 ** (8 * torch.rand(*shape, generator=draw, device=device) - 4)
    x.view(-1)[::31] = 0
    return x


def _poison(device: torch.device) -> None:
    """Leave NaN bytes in the memory that the next allocations get."""
    sizes = (*[512] * 64, *[1 << 16] * 32, 1 << 24)
    blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for size in sizes]
    del blocks


# ---- K1


def published_scorer(q: torch.Tensor, w: torch.Tensor, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """The formula of the published scorer, one request: unpack, multiply, relu, weigh, add; then the best layer.

    q [L, H, I], w [L, H], rows per layer uint8 [N, I + 4]; chunks per page above one half.
    """
    logits = []
    for q_HI, w_H, rows_NR in zip(q, w, rows, strict=True):
        products_NH = decode_index_rows(rows_NR) @ q_HI.T
        logits.append((products_NH.relu() * w_H).sum(-1))
    return (torch.stack(logits).amax(0).sigmoid() > 0.5).unflatten(0, (-1, PAGE_CHUNKS)).sum(-1)


def run_scores(run: Run) -> None:
    best = {precision: _sweep_scores(run, HEADLINE, precision) for precision in PRECISIONS}
    for case in OTHER_SCORES:
        if run.out_of_time():
            return
        keys, (q, w) = case.keys(run.device), case.queries(run.device)
        for precision in PRECISIONS:
            for label, tiles in (("default", None), ("best of the headline", best[precision])):
                _time_scores(run, case, precision, tiles, keys, q, w, tiles_name=label)
        if case.layers == 1:
            for precision in PRECISIONS:
                prepared = score.prepare_queries(q, w, precision)
                run.time(
                    "score logits",
                    [partial(score.score_logits, *prepared, keys, mean=False, tiles=best[precision])],
                    bytes=case.key_bytes + 4 * case.batch * case.chunks, flops=case.flops, rate=precision,
                    chunks=case.chunks, batch=case.batch, layers=1, precision=precision,
                )  # fmt: skip
        del keys, q, w
        torch.cuda.empty_cache()


def _sweep_scores(run: Run, case: ScoreCase, precision: Any) -> score.Tiles | None:
    """Time all tiles of a precision; the fastest of those that agree with the default ones."""
    keys, (q, w) = case.keys(run.device), case.queries(run.device)
    wanted = page_scores_fused(q, w, keys, precision, None)
    times: dict[score.Tiles | None, float] = {}
    for tiles in (None, *(kernel_cases.SCORE_TILES[precision] if run.sweep else ())):
        if run.out_of_time():
            break
        found = page_scores_fused(q, w, keys, precision, tiles)
        if run.check(f"page scores {precision} {tiles_name(tiles)}", relative_error(found.score, wanted.score), 1e-4):
            times[tiles] = _time_scores(run, case, precision, tiles, keys, q, w, tiles_name=tiles_name(tiles))
    return min(times, key=lambda tiles: times[tiles]) if times else None


def _time_scores(
    run: Run, case: ScoreCase, precision: Any, tiles: score.Tiles | None, keys: PagedRows, q: torch.Tensor,
    w: torch.Tensor, *, tiles_name: str,
) -> float:  # fmt: skip
    return run.time(
        "score pages", [partial(page_scores_fused, q, w, keys, precision, tiles)],
        bytes=case.key_bytes, flops=case.flops, rate=precision, chunks=case.chunks, batch=case.batch,
        layers=case.layers, planar=case.planar, precision=precision, tiles=tiles_name,
    )  # fmt: skip


def run_score_peers(run: Run) -> None:
    """Beside fp8, and beside fp16, whose queries lose about as much as the published formula's keys did."""
    compiled = torch.compile(published_scorer)
    for chunks in PEER_CHUNKS:
        case = ScoreCase(chunks, 1, planar=False)
        keys, (q, w) = case.keys(run.device), case.queries(run.device)
        published = (q[:, 0, 0], w[:, 0, 0], [layer[0] for layer in keys.regions])
        tiled = partial(score_pages, page_chunks=PAGE_CHUNKS, temperature=TEMPERATURE, threshold=THRESHOLD)
        peers: dict[str, Callable[[], object]] = {
            "published formula": partial(published_scorer, *published),
            "published formula, compiled": partial(compiled, *published),
            "tiled version of this package": partial(tiled, q, w, keys),
        }
        for precision in ("fp8", "fp16"):
            ours = partial(page_scores_fused, q, w, keys, precision)
            shape = {"chunks": chunks, "batch": 1, "layers": case.layers, "precision": precision}
            for name, peer in peers.items():
                time_peer(run, "score peer", name, peer, ours, **shape)


# ---- K2


def run_selection(run: Run) -> None:
    for chunks in RESIDENT_CHUNKS:
        for batch in BATCHES:
            if run.out_of_time():
                return
            _time_selection(run, PoolCase(chunks, batch))
    for batch in BATCHES:
        _time_page_selection(run, batch)


def _time_page_selection(run: Run, batch: int) -> None:
    scores = kernel_cases.randn(batch, PAGES, device=run.device, draw=kernel_cases.generator(run.device, 1))
    above = (scores > 1).int()
    limits = [torch.full((batch,), n, dtype=torch.int32, device=run.device) for n in (PAGES, 4, PAGES // 10)]
    fused = partial(select_pages, scores, *limits, sink=1, recency=8, above_BP=above, impl="fused")
    ours = run.time(
        "select pages", [fused], bytes=scores.nbytes + above.nbytes, flops=0, rate="fp32", pages=PAGES, batch=batch
    )

    def by_sorts() -> object:
        return scores.topk(PAGES // 10, dim=1).indices.sort(dim=1)

    run.time(
        "select pages peer", [by_sorts],
        bytes=scores.nbytes, flops=0, rate="fp32", pages=PAGES, batch=batch, peer="torch.topk and sort",
        ours=ours,
    )  # fmt: skip


def _time_selection(run: Run, case: PoolCase) -> None:
    size, k = case.batch * case.chunks * (kernel_cases.INDEX_DIM + 4), kernel_cases.TOP_K
    sets = [case.keys(run.device, seed=seed) for seed in range(max(1, min(8, ROTATED_BYTES // size)))]
    q, w = ScoreCase(1, case.batch, layers=1, heads=kernel_cases.INDEX_HEADS).queries(run.device)
    flops = 2 * case.batch * case.chunks * kernel_cases.INDEX_HEADS * kernel_cases.INDEX_DIM
    shape: dict[str, Any] = {"chunks": case.chunks, "batch": case.batch, "k": k}
    for precision in PRECISIONS:
        prepared = score.prepare_queries(q, w, precision)
        run.time(
            "lightning scores", [partial(score.score_ranks, *prepared, keys) for keys in sets],
            bytes=size + 4 * case.batch * case.chunks, flops=flops, rate=precision, precision=precision, **shape,
        )  # fmt: skip
        level_2 = partial(select.select_resident_fused, q[0, :, 0], w[0, :, 0], k=k, precision=precision)
        for ordered in (True, False):
            run.time(
                "level 2", [partial(level_2, keys=keys, ordered=ordered) for keys in sets],
                bytes=size, flops=flops, rate=precision, precision=precision, ordered=ordered, **shape,
            )  # fmt: skip
    ranks = score.score_ranks(*prepared, sets[0])
    for ordered in (True, False):
        call = partial(select.topk_ranks, ranks, k, ordered=ordered)
        top = run.time("top-k", [call], bytes=ranks.nbytes, flops=0, rate="fp32", ordered=ordered, **shape)
    scores = score.score_logits(*prepared, sets[0], mean=False)
    by_topk = partial(torch.topk, scores, k, dim=1)
    peer: dict[str, Any] = {"peer": "torch.topk", "ours": top, **shape}
    run.time("top-k peer", [by_topk], bytes=scores.nbytes, flops=0, rate="fp32", **peer)
    # the peer's rows are gathered beforehand; the store gathers them in every step
    rows = sets[0].read()
    ids = torch.arange(case.chunks, device=run.device).expand(case.batch, -1)

    def by_torch() -> object:
        return topk_chunks(lightning_scores(q[0, :, 0], w[0, :, 0], decode_index_rows(rows)), ids, k)

    ours = partial(level_2, keys=sets[0], ordered=False)
    time_peer(run, "level 2 peer", "decode, torch products, torch.topk", by_torch, ours, precision=precision, **shape)


# ---- K3


def run_attention(run: Run) -> None:
    for kv_format in ("fp8", "bf16"):
        for batch in BATCHES:
            if run.out_of_time():
                return
            _time_attention(run, PoolCase(POOL_CHUNKS, batch, kv_format))


def _time_attention(run: Run, case: PoolCase) -> None:
    q, sources, sinks = case.attention(run.device)
    shape: dict[str, Any] = {
        "kv_format": case.kv_format,
        "batch": case.batch,
        "picks": kernel_cases.TOP_K,
        "window": kernel_cases.WINDOW,
    }
    cost: dict[str, Any] = {
        "bytes": kernel_cases.attention_bytes(case.batch, kernel_cases.TOP_K, case.kv_format),
        "flops": kernel_cases.attention_flops(case.batch, kernel_cases.TOP_K),
        "rate": "bf16",
    }
    wanted = _attention64(q, sources, sinks)
    shares = kernel_cases.SHARES[case.batch] if run.sweep else ()
    all_tiles = [tiles for each in shares for tiles in kernel_cases.attend_tiles(each)]
    times: dict[attention.Tiles | None, float] = {}
    for tiles in (None, *all_tiles):
        if run.out_of_time():
            return
        call = partial(attention.attend_rows_fused, q, sources, sinks, SCALE, tiles)
        name = f"attend {case.kv_format} batch={case.batch} {tiles_name(tiles)}"
        if run.check(name, relative_error(call(), wanted), TOLERANCES["attend"]):
            times[tiles] = run.time("attend", [call], **cost, **shape, tiles=tiles_name(tiles))
    if times:
        ours = partial(attention.attend_rows_fused, q, sources, sinks, SCALE, min(times, key=lambda at: times[at]))
        _time_attention_peers(run, q, sources, sinks, ours, shape)


def _time_attention_peers(
    run: Run, q: torch.Tensor, sources: Sequence[EntrySource], sinks: torch.Tensor, ours: Callable[[], object],
    shape: dict[str, Any],
) -> None:  # fmt: skip
    window, entries = sources
    rows, spec, picks = entries.rows, entries.spec, entries.picks_BK
    assert picks is not None and rows.numbers_BP is not None
    window_kv, window_valid = window.key_set(q.dtype)
    numbers, region, form, valid = rows.numbers_BP, rows.regions[0][0], rows.form, picks >= 0

    def gathered() -> torch.Tensor:
        """Bytes of the picked rows, as the store gathers them for a step."""
        slots = numbers.gather(1, picks // form.page_chunks)
        return get_planar(form, region, slots, picks % form.page_chunks)

    def decode_and_attend(rows_BKE: torch.Tensor) -> torch.Tensor:
        return attend(q, [(window_kv, window_valid), (decode_rows(spec, rows_BKE, q.dtype), valid)], sinks, SCALE)

    def decode_and_sdpa(rows_BKE: torch.Tensor) -> torch.Tensor:
        kv = torch.cat((window_kv, decode_rows(spec, rows_BKE, q.dtype)), 1)[:, None]
        return F.scaled_dot_product_attention(q[:, :, None], kv, kv, scale=SCALE, enable_gqa=True)

    peers = {
        "gather and torch products": decode_and_attend,
        "gather and SDPA (it knows no sink)": decode_and_sdpa,
        "gather and torch products, compiled": torch.compile(decode_and_attend),
    }
    for name, peer in peers.items():
        time_peer(run, "attend peer", name, lambda peer=peer: peer(gathered()), ours, **shape)  # type: ignore[misc]


# ---- K5: what a step or a prefill writes


def run_encoders(run: Run) -> None:
    spec = KVFormatSpec("fp8", kernel_cases.HEAD_DIM, kernel_cases.ROPE_DIM)
    for count in ENCODED:
        draw = kernel_cases.generator(run.device, 1)
        keys = kernel_cases.randn(count, kernel_cases.INDEX_DIM, device=run.device, draw=draw).bfloat16()
        kv = kernel_cases.randn(count, kernel_cases.HEAD_DIM, device=run.device, draw=draw).bfloat16()
        cases: dict[str, tuple[Any, int]] = {
            "encode index rows": (partial(encode_index_rows, keys), keys.nbytes + count * (kernel_cases.INDEX_DIM + 4)),
            "encode fp8 entries": (partial(encode_rows, spec, kv), kv.nbytes + count * spec.entry_bytes),
        }
        for name, (call, moved) in cases.items():
            _time_encoder(run, name, call, bytes=moved, chunks=count)
    for sessions in POOLING:
        for windows, tokens in kernel_cases.POOLED:
            rings = kernel_cases.full_rings(
                windows, tokens, sessions, kernel_cases.HEAD_DIM, torch.bfloat16, run.device
            )
            # of a ring of two windows, each token gives one of its two series
            moved = sum(x.nbytes for x in rings[:2]) // windows + sum(x.nbytes for x in rings[2:4])
            moved += sessions * kernel_cases.HEAD_DIM * 2
            _time_encoder(
                run, f"pool {windows * tokens} slots", partial(pool_in_place, *rings), bytes=moved, batch=sessions
            )


def _time_encoder(run: Run, name: str, call: Callable[..., Any], **shape: int) -> None:
    whole: dict[str, Any] = {"flops": 0, "rate": "fp32", **shape}
    ours = run.time(name, [partial(call, impl="fused")], **whole)
    run.time(name, [partial(call, impl="reference")], peer="torch", ours=ours, **whole)


# ---- program


def compile_ahead(jobs: int) -> None:
    """Compile what will be timed on all cores, into Triton's cache."""
    names = [name for name, _ in kernel_resources.variants()]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(kernel_resources.compile_variant, names))


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The fastest variant of every timed case."""
    for key, row in report.fastest(rows).items():
        case = " ".join(str(value) for value in key if value is not None)
        us = row.get("warm_us", row.get("us"))
        share = row.get("share_of_copy_bandwidth", "-")
        ratio = f", ratio {row['ratio']}" if "ratio" in row else ""
        yield (
            f"{case:75} {us:10} us, cold {row.get('cold_us', '-'):>9}, {share:>6} of copy{ratio}, "
            f"{row.get('tiles', '')}"
        )


PARTS: dict[str, Callable[[Run], None]] = {
    "checks": run_checks,
    "scores": run_scores,
    "selection": run_selection,
    "attention": run_attention,
    "encoders": run_encoders,
    "score_peers": run_score_peers,
}


PEERS: dict[str, Callable[[Run], None]] = {"deep-gemm": run_deep_gemm}


def run(
    directory: Path | None,
    *,
    seconds: float,
    jobs: int,
    parts: Sequence[str],
    peers: Sequence[str] = (),
    sweep: bool = True,
    program: str,
) -> dict[str, Any]:
    """Measure peers, then the given parts, on the current CUDA device; returns rows and the checks that failed.

    `jobs` processes compile ahead, none if it is 0; `program` is how the command line begins in the first row.
    """
    run = Run(directory, seconds, torch.device("cuda", torch.cuda.current_device()), sweep=sweep)
    run.add("machine", command=report.command_line(program), triton=triton.__version__, **report.machine())
    if jobs:
        compile_ahead(jobs)
    torch.backends.cuda.matmul.allow_tf32 = False
    run_ceilings(run)
    for name in [*peers, *parts]:
        if name in PARTS or name in PEERS:
            (PARTS.get(name) or PEERS[name])(run)
        else:
            run.add("peer", peer=name, state=peer_state(name))
        if run.out_of_time():
            run.add("stopped", part=name, reason=f"{seconds} seconds are over")
            break
    return {"failures": run.failures, "rows": run.rows}


def lines(result: dict[str, Any]) -> Iterator[str]:
    """What a person is told: the fastest variants, and the first checks that failed."""
    yield from summary(result["rows"])
    yield f"{len(result['failures'])} checks failed"
    yield from result["failures"][:20]
