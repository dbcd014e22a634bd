"""The operations of `kernels/` as they run without fused kernels: what a CPU does, checked in float64, then timed.

Shape letters: L = layers, B = sessions, N = chunks, H = heads, I = index_head_dim.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..kernels.index_rows import decode_index_rows, encode_index_rows
from ..kernels.kv_codec import KVFormatSpec, decode_rows, encode_rows
from ..kernels.score_chunks import score_pages
from ..kernels.select_chunks import topk_chunks
from ..kernels.sparse_attention import attend
from . import kernel_cases, report
from .kernel_cases import PAGE_CHUNKS, TEMPERATURE, PoolCase, ScoreCase

WARM_UP = 2


def run(*, device: torch.device, chunks: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """One row per operation and number of chunks; raises AssertionError for a wrong result."""
    return [row for count in chunks for row in _rows(device, count, rounds)]


def _rows(device: torch.device, chunks: int, rounds: int) -> list[dict[str, Any]]:
    case = ScoreCase(chunks, 1, planar=False)
    keys, (q, w) = case.keys(device), case.queries(device)
    tiled = partial(
        score_pages, q, w, keys, page_chunks=PAGE_CHUNKS, temperature=TEMPERATURE, threshold=0.0, impl="reference"
    )
    best = torch.stack([_logits64(q[layer, 0, 0], w[layer, 0, 0], keys.read(layer)[0]) for layer in range(case.layers)])
    wanted = best.amax(0).unflatten(0, (-1, PAGE_CHUNKS))
    close(tiled().score[0], TEMPERATURE * torch.logsumexp(wanted / TEMPERATURE, 1), 1e-4)

    draw = kernel_cases.generator(device, 3)
    scores, ids = kernel_cases.randn(1, chunks, device=device, draw=draw), torch.arange(chunks, device=device)[None]
    top = min(kernel_cases.TOP_K, chunks)
    close(scores.gather(1, topk_chunks(scores, ids, top)[0]), scores.sort(dim=1, descending=True).values[:, :top], 0)

    spec = KVFormatSpec("fp8", kernel_cases.HEAD_DIM, kernel_cases.ROPE_DIM)
    kv = kernel_cases.randn(chunks, kernel_cases.HEAD_DIM, device=device, draw=draw)
    rows = encode_rows(spec, kv, impl="reference")
    close(decode_rows(spec, rows, torch.float32), kv, 0.05)  # e4m3 has three bits

    pool = PoolCase(chunks, 1)
    queries, sources, sinks = pool.attention(device, picks=top)
    sets = [source.key_set(torch.float32) for source in sources]
    exact = [(keys_NI.double(), valid) for keys_NI, valid in sets]
    scale = kernel_cases.HEAD_DIM**-0.5
    step = partial(attend, queries.float(), sets, sinks, scale)
    close(step(), attend(queries.double(), exact, sinks.double(), scale), 1e-4)

    index = kernel_cases.randn(chunks, kernel_cases.INDEX_DIM, device=device, draw=draw)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "score pages": (tiled, case.key_bytes),
        f"top-{top}": (partial(topk_chunks, scores, ids, top), scores.nbytes),
        "attend": (step, sum(keys_NI.nbytes for keys_NI, _ in sets)),
        "encode fp8 entries": (partial(encode_rows, spec, kv, impl="reference"), kv.nbytes + rows.nbytes),
        "encode index rows": (
            partial(encode_index_rows, index, impl="reference"),
            index.nbytes + chunks * (kernel_cases.INDEX_DIM + 4),
        ),
    }
    return [_timed(name, call, moved, device, chunks, rounds) for name, (call, moved) in calls.items()]


def _timed(
    name: str, call: Callable[[], object], moved: int, device: torch.device, chunks: int, rounds: int
) -> dict[str, Any]:
    seconds = [report.timed(call, report.synchronizer(device)) for _ in range(rounds + WARM_UP)][WARM_UP:]
    median = statistics.median(seconds)
    return {
        "operation": name,
        "impl": "definition",
        "chunks": chunks,
        "milliseconds": report.spread(seconds),
        "bytes": moved,
        "gb_per_s": round(moved / median / 1e9, 3),
    }


def _logits64(q_HI: torch.Tensor, w_H: torch.Tensor, rows_NR: torch.Tensor) -> torch.Tensor:
    return (decode_index_rows(rows_NR).double() @ q_HI.double().T).relu() @ w_H.double()


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Raise AssertionError where the relative error in the norm is larger, or a NaN."""
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
    assert error <= tolerance, f"relative error {error}, at most {tolerance}"


__all__ = ["run"]
