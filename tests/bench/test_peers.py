"""Adapters of peers, on stand-ins that compute what the peers document from the bytes that they are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flashmem.bench import kernel_peers, kernels, peers
from flashmem.bench.kernel_cases import PAGE_CHUNKS, TEMPERATURE, PoolCase, ScoreCase
from flashmem.bench.kernel_timing import Run, relative_error
from flashmem.kernels.index_rows import decode_index_rows
from flashmem.kernels.kv_codec import get_planar
from flashmem.kernels.score_chunks import score_history, score_pages

CPU = torch.device("cpu")


def stand_in() -> SimpleNamespace:
    """Paged logits by their definition: pages hold all values, then all float32 scales."""

    def logits(
        q: torch.Tensor, kv_cache: torch.Tensor, weights: torch.Tensor, context_lens: torch.Tensor,
        block_table: torch.Tensor, schedule_meta: object, max_context_len: int, clean_logits: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        q_BRHI, pages, w_NH, table_BP, lengths_BR = q, kv_cache, weights, block_table, context_lens
        schedule, longest = schedule_meta, max_context_len
        channels, (batch, rows) = q_BRHI.shape[-1], q_BRHI.shape[:2]
        assert q_BRHI.is_contiguous() and w_NH.shape == (batch * rows, q_BRHI.shape[2]) and w_NH.stride(1) == 1
        assert lengths_BR.shape == (batch, rows) and lengths_BR.dtype is torch.int32 and lengths_BR.is_contiguous()
        assert len(table_BP) == batch and table_BP.stride(1) == 1
        assert pages.shape[1:] == (64, 1, channels + 4) and schedule == "schedule" and table_BP.dtype is torch.int32
        flat = pages.flatten(1)
        values = flat[:, : 64 * channels].view(torch.float8_e4m3fn).float().view(-1, 64, channels)
        scales = flat[:, 64 * channels :].contiguous().view(torch.float32)
        keys = (values * scales[..., None])[table_BP.long()].flatten(1, 2)
        found = torch.einsum("brhi,bni->brnh", q_BRHI, keys).relu() @ w_NH.view(batch, rows, -1, 1)
        found = found[..., 0].masked_fill(torch.arange(keys.shape[1]) >= lengths_BR[..., None], float("nan"))
        return torch.nn.functional.pad(found.flatten(0, 1), (0, 64))[:, : longest + 64]  # rows may be longer

    return SimpleNamespace(
        get_num_sms=lambda: 4, get_paged_mqa_logits_metadata=lambda *_: "schedule", fp8_paged_mqa_logits=logits
    )


def test_logits_of_deep_gemm_are_ours() -> None:
    """Two rows of 64 heads each in one pass, added, are the logits of 128 heads."""
    case = ScoreCase(256, 3, layers=2)
    keys, (q, w) = case.keys(CPU), case.queries(CPU)
    q_LBRHI, w_LBRH = kernel_peers._peer_queries((q[:, :, :, None], w / 2), 2)
    pages_L = [torch.cat(layer) for layer in keys.regions]
    table = torch.arange(len(pages_L[0]), dtype=torch.int32).view(3, -1)
    peer = peers.DeepGemm(stand_in())
    batch = peer.batch(table, case.chunks, 2)
    logits_L = [batch.logits(*inputs) for inputs in zip(q_LBRHI, w_LBRH, pages_L, strict=True)]
    found = torch.stack([logits.sum(1) for logits in logits_L]).amax(0)
    assert relative_error(found, score_history(q, w, keys, impl="reference")) < 1e-5

    scores = score_pages(
        q, w, keys, page_chunks=PAGE_CHUNKS, temperature=TEMPERATURE, threshold=0.0, impl="reference"
    )  # fmt: skip
    chosen = kernel_peers._peer_select(logits_L, 2)
    assert torch.equal(chosen, scores.score.topk(2, dim=1).indices.sort(dim=1).values)
    counts = kernel_peers._one_by_one(peer, q_LBRHI, w_LBRH, pages_L, table, case.chunks)
    assert torch.equal(torch.stack(counts).int(), scores.above)


def test_deep_gemm_reads_resident_pages_through_their_table() -> None:
    keys = PoolCase(256, 2).keys(CPU)
    q, w = ScoreCase(1, 2, layers=1, heads=64).queries(CPU)
    batch = peers.DeepGemm(stand_in()).batch(keys.numbers_BP.int(), 256, 1)
    found = batch.logits(q[0, :, :1, :].view(2, 1, 64, 128), w[0], keys.regions[0][0].contiguous())[:, 0]
    assert relative_error(found, score_history(q, w, keys, impl="reference")) < 1e-5


def test_rows_of_the_index_are_pages_of_the_peer() -> None:
    """Values first, then scales: what `get_planar` reads back is what was put."""
    keys = ScoreCase(64, 1, layers=1).keys(CPU)
    rows = get_planar(keys.form, keys.regions[0][0], torch.zeros(64, dtype=torch.int64), torch.arange(64))
    values = keys.regions[0][0][0, : 64 * 128].view(torch.float8_e4m3fn).float().view(64, 128)
    scales = keys.regions[0][0][0, 64 * 128 :].clone().view(torch.float32)
    assert torch.equal(values * scales[:, None], decode_index_rows(rows))


@pytest.mark.parametrize(
    ("error", "state"),
    [(ModuleNotFoundError("no"), "peer absent"), (OSError("/x/y/lib.so is missing"), "lib.so is missing")],
)
def test_a_peer_that_is_absent_or_broken_is_a_row(
    monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(peers, "import_module", fail)
    run = Run(None, 10, CPU)
    kernel_peers.run_deep_gemm(run)
    assert len(run.rows) == 1 and run.rows[0]["peer"] == "deep-gemm" and state in run.rows[0]["state"]
    assert "/x/" not in run.rows[0]["state"]


def test_a_call_that_fails_is_a_row_and_the_other_cases_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*inputs: object, **more: object) -> None:
        raise RuntimeError("Assertion error (/x/y/attention.hpp:368): batch_size")

    peer = peers.DeepGemm(SimpleNamespace(**vars(stand_in()) | {"fp8_paged_mqa_logits": refuse}))
    monkeypatch.setattr(peers.DeepGemm, "load", lambda: peer)
    monkeypatch.setattr(kernel_peers, "_beside_level_1", lambda run, peer, case: ask(peer))
    monkeypatch.setattr(kernel_peers, "_beside_level_2", lambda run, peer, case: run.add("level 2"))

    def ask(peer: peers.DeepGemm) -> None:
        batch = peer.batch(torch.zeros(1, 1, dtype=torch.int32), 64, 1)
        batch.logits(torch.zeros(1, 1, 64, 128), torch.zeros(1, 1, 64), torch.zeros(1, 64 * 132, dtype=torch.uint8))

    run = Run(None, 10, CPU)
    kernel_peers.run_deep_gemm(run)
    failed = [row for row in run.rows if "failed" in row]
    assert len(failed) == len(kernel_peers.SCORES) and "batch_size" in failed[0]["failed"]
    assert "/x/" not in failed[0]["failed"] and failed[0]["case"] == "level 1 chunks=65536 batch=1"
    assert len(run.rows) - len(failed) == len(kernel_peers.RESIDENT_CHUNKS) * len(kernel_peers.BATCHES)


def test_an_error_that_is_not_the_peers_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*inputs: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(peers.DeepGemm, "load", lambda: peers.DeepGemm(stand_in()))
    monkeypatch.setattr(kernel_peers, "_beside_level_1", fail)
    with pytest.raises(RuntimeError, match="ours"):
        kernel_peers.run_deep_gemm(Run(None, 10, CPU))


def test_peers_that_run_have_an_adapter() -> None:
    assert set(peers.MEASURED) == kernels.PEERS.keys() and set(peers.MEASURED) <= peers.MODULES.keys()
