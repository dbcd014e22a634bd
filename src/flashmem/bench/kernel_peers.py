"""DeepGEMM beside K1 and K2: its logits are checked against ours on the same fp8 queries and keys, then both timed.

Its best use is measured first: all sessions in one call, 128 heads as two rows of 64 that share one pass over the keys,
the schedule made beforehand. Then its use per session, layer and group of 64 heads, schedules included, as the
published server calls it. Our side always runs with the tiles that the engine runs with.
Shape letters: L = layers, B = sessions, R = rows of a session, H = heads, I = index_head_dim, N = chunks, P = pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..kernels.paged import PagedRows
from ..kernels.score_chunks import fused as score
from ..kernels.select_chunks import fused as select
from ..kernels.select_pages import select_pages
from . import kernel_cases, peers, report
from .kernel_cases import BATCHES, PAGE_CHUNKS, RESIDENT_CHUNKS, TEMPERATURE, PoolCase, ScoreCase, page_scores_fused
from .kernel_timing import Run, graph_of, relative_error, time_peer

NAME = "deep-gemm"
TOLERANCE = 2e-3
"""Relative error in the norm between two sums of the same rounded products."""
SCORES = tuple(ScoreCase(chunks, batch) for chunks in (65_536, 262_144) for batch in (1, 8, 32))
COMPILED = ScoreCase(262_144, 8)
"""Where what follows the peer's logits is also compiled."""
KEPT = 0.1
"""Share of pages that level 1 selects here."""


def run_deep_gemm(run: Run) -> None:
    try:
        peer = peers.DeepGemm.load()
    except ImportError:
        run.add("peer", peer=NAME, state=peers.ABSENT)
        return
    except (OSError, RuntimeError) as error:
        run.add("peer", peer=NAME, state=f"peer present, cannot be loaded: {report.without_paths(str(error))[:300]}")
        return
    for case in SCORES:
        _beside(run, partial(_beside_level_1, run, peer, case), f"level 1 chunks={case.chunks} batch={case.batch}")
    for chunks in RESIDENT_CHUNKS:
        for batch in BATCHES:
            case_2 = PoolCase(chunks, batch)
            _beside(run, partial(_beside_level_2, run, peer, case_2), f"level 2 chunks={chunks} batch={batch}")


def _beside(run: Run, measure: Callable[[], None], name: str) -> None:
    """One case; where the peer's call fails, a row says so."""
    if run.out_of_time():
        return
    try:
        measure()
    except peers.PeerError as error:
        run.add("peer", peer=NAME, case=name, failed=report.without_paths(str(error))[:300])
    torch.cuda.empty_cache()


# ---- K1


def _beside_level_1(run: Run, peer: peers.DeepGemm, case: ScoreCase) -> None:
    keys, (q, w) = case.keys(run.device), case.queries(run.device)
    rows = case.heads // peer.HEADS
    prepared = score.prepare_queries(q, w, "fp8")
    q_LBRHI, w_LBRH = _peer_queries(prepared, rows)
    pages_L = [torch.cat(layer) for layer in keys.regions]
    table = torch.arange(len(pages_L[0]), dtype=torch.int32, device=run.device).view(case.batch, -1)
    batch = peer.batch(table, case.chunks, rows)
    shape: dict[str, Any] = {"chunks": case.chunks, "batch": case.batch, "precision": "fp8"}
    cost: dict[str, Any] = {"bytes": case.key_bytes // case.layers, "flops": case.flops // case.layers, "rate": "fp8"}

    of_one = PagedRows(keys.form, keys.regions[:1], [case.chunks] * case.batch)
    of_rows = partial(batch.logits, q_LBRHI[0], w_LBRH[0], pages_L[0])
    ours = partial(score.score_logits, prepared[0][:1], prepared[1][:1], of_one, mean=False)

    def added() -> torch.Tensor:
        return of_rows().sum(1)

    if not _agrees(run, f"DeepGEMM logits chunks={case.chunks} batch={case.batch}", added, ours):
        return
    seconds = run.time("score logits", [ours], layers=1, **cost, **shape)
    for name, call in (("DeepGEMM, rows not added", of_rows), ("DeepGEMM, rows added", added)):
        run.time("score logits peer", [call], ours=seconds, layers=1, peer=name, **cost, **shape)

    limits = _limits(case, run.device)
    whole = partial(_select, limits, q, w, keys)
    cost = {"bytes": case.key_bytes, "flops": case.flops, "rate": "fp8"}
    seconds = run.time("level 1", [whole], layers=case.layers, **cost, **shape)
    parts = [partial(batch.logits, *inputs) for inputs in zip(q_LBRHI, w_LBRH, pages_L, strict=True)]
    ends: dict[str, Callable[..., object]] = {"DeepGEMM and torch": _peer_select}
    if case == COMPILED:
        ends["DeepGEMM and torch, compiled"] = torch.compile(_peer_select, dynamic=False)
    for name, end in ends.items():
        at_best = partial(_of_layers, parts, partial(end, kept=int(limits[1][0])))
        run.time("level 1 peer", [at_best], ours=seconds, layers=case.layers, peer=name, **cost, **shape)
    as_served = partial(_one_by_one, peer, q_LBRHI, w_LBRH, pages_L, table, case.chunks)
    name = "DeepGEMM per session, layer and 64 heads"
    time_peer(run, "score pages peer", name, as_served, partial(page_scores_fused, q, w, keys, "fp8"),
              layers=case.layers, **shape)  # fmt: skip


def _peer_queries(prepared: tuple[torch.Tensor, torch.Tensor], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours as q [L, B, R, H, I] and w [L, B, R, H]; our weights hold the half of relu's x + |x|."""
    q_LBHI, w_LBH = prepared[0][:, :, 0, 0], prepared[1][:, :, 0]
    return q_LBHI.unflatten(2, (rows, -1)), (2 * w_LBH).unflatten(2, (rows, -1))


def _limits(case: ScoreCase, device: torch.device) -> list[torch.Tensor]:
    """Pages that every session has, and must and may have beside the always-kept ones."""
    pages = case.chunks // PAGE_CHUNKS
    return [torch.full((case.batch,), n, dtype=torch.int32, device=device) for n in (pages, *[round(KEPT * pages)] * 2)]


def _select(limits: list[torch.Tensor], q: torch.Tensor, w: torch.Tensor, keys: PagedRows) -> object:
    """All of our level 1, from queries to pages."""
    scores = page_scores_fused(q, w, keys, "fp8").score
    return select_pages(scores, *limits, sink=0, recency=0, impl="fused")


def _of_layers(parts: Sequence[Callable[[], torch.Tensor]], end: Callable[[list[torch.Tensor]], object]) -> object:
    logits_L = [part() for part in parts]
    with peers.peer_errors():  # what follows its logits may have to be compiled
        return end(logits_L)


def _peer_select(logits_L: list[torch.Tensor], kept: int) -> torch.Tensor:
    """Rows added, the best layer of each chunk, page scores and the best pages in order."""
    best_BN = torch.stack([logits_BRN.sum(1) for logits_BRN in logits_L]).amax(0)
    pages_BPC = best_BN.unflatten(1, (-1, PAGE_CHUNKS)) / TEMPERATURE
    return pages_BPC.logsumexp(-1).topk(kept, dim=1).indices.sort(dim=1).values


def _one_by_one(
    peer: peers.DeepGemm, q_LBRHI: torch.Tensor, w_LBRH: torch.Tensor, pages_L: list[torch.Tensor],
    table_BP: torch.Tensor, chunks: int,
) -> list[torch.Tensor]:  # fmt: skip
    """Chunks above one half per page of every session."""
    counts = []
    for b in range(len(table_BP)):
        layers = []
        for q_BRHI, w_BRH, pages in zip(q_LBRHI, w_LBRH, pages_L, strict=True):
            rows = []
            for row in range(q_BRHI.shape[1]):
                one = peer.batch(table_BP[b : b + 1], chunks, 1)
                at = slice(b, b + 1), slice(row, row + 1)
                rows.append(one.logits(q_BRHI[at], w_BRH[at], pages)[0, 0])
            layers.append(torch.stack(rows).sum(0))
        above_N = torch.stack(layers).amax(0).sigmoid() > 0.5
        counts.append(above_N.unflatten(0, (-1, PAGE_CHUNKS)).sum(-1))
    return counts


# ---- K2


def _beside_level_2(run: Run, peer: peers.DeepGemm, case: PoolCase) -> None:
    """The peer reads pages that lie densely, ours those of a pool of records."""
    k = kernel_cases.TOP_K
    keys = case.keys(run.device)
    q, w = ScoreCase(1, case.batch, layers=1, heads=kernel_cases.INDEX_HEADS).queries(run.device)
    prepared = score.prepare_queries(q, w, "fp8")
    q_LBRHI, w_LBRH = _peer_queries(prepared, 1)
    assert keys.numbers_BP is not None
    batch = peer.batch(keys.numbers_BP.int(), case.chunks, 1)
    peer_logits = partial(batch.logits, q_LBRHI[0], w_LBRH[0], keys.regions[0][0].contiguous())
    logits = partial(score.score_logits, *prepared, keys, mean=False)
    if not _agrees(
        run, f"DeepGEMM level 2 chunks={case.chunks} batch={case.batch}", lambda: peer_logits()[:, 0], logits
    ):
        return

    def peer_picks() -> torch.Tensor:
        return peer_logits()[:, 0].topk(k, dim=1).indices

    size = case.batch * case.chunks * (kernel_cases.INDEX_DIM + 4)
    flops = 2 * case.batch * case.chunks * kernel_cases.INDEX_HEADS * kernel_cases.INDEX_DIM
    row: dict[str, Any] = {
        "bytes": size, "flops": flops, "rate": "fp8", "chunks": case.chunks, "batch": case.batch, "precision": "fp8",
    }  # fmt: skip
    seconds = run.time("lightning logits", [logits], **row)
    run.time("lightning logits peer", [peer_logits], ours=seconds, peer="DeepGEMM", **row)
    ours = partial(
        select.select_resident_fused, q[0, :, 0], w[0, :, 0], keys, k, precision="fp8", ordered=False
    )  # fmt: skip
    seconds = run.time("level 2 beside DeepGEMM", [ours], k=k, **row)
    run.time("level 2 peer", [peer_picks], ours=seconds, k=k, peer="DeepGEMM and torch.topk", **row)


def _agrees(run: Run, name: str, peer: Callable[[], torch.Tensor], ours: Callable[[], torch.Tensor]) -> bool:
    """Whether a peer computes what we do, called and captured in a graph: a graph that misses it would look fast."""
    wanted = ours()
    called = relative_error(peer(), wanted)
    found: list[torch.Tensor] = []
    graph = graph_of([lambda: found.append(peer())])
    found[-1].fill_(float("nan"))
    graph.replay()
    return run.check(name, max(called, relative_error(found[-1], wanted)), TOLERANCE, called=called)


__all__ = ["run_deep_gemm"]
