"""The fused scorer against the definition; on the CPU through Triton's interpreter."""

import pytest
import torch

from flashmem.kernels.index_rows import encode_index_rows
from flashmem.kernels.paged import PagedRows
from flashmem.kernels.score_chunks import score_chunks, score_history, score_pages
from support.paged_cases import draw, interleaved_index_rows, pooled_exact_keys, pooled_index_rows

RAGGED = [3, 0, 70, 64]


def queries(
    keys: PagedRows, heads: int, dim: int, *, tokens: int = 1, seed: int = 50
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (keys.num_layers, keys.batch, tokens, heads)
    return draw(*shape, dim, seed=seed).to(keys.device), draw(*shape, seed=seed + 1).to(keys.device)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    there = wanted.isfinite()
    assert torch.equal(there, found.isfinite()), "what is no chunk must be -inf, and nothing else"
    return float((found - wanted)[there].double().norm() / wanted[there].double().norm())


@pytest.mark.parametrize("heads", [1, 3, 16, 17, 64, 128, 256])
def test_every_head_count(heads: int, triton_device: torch.device) -> None:
    keys = interleaved_index_rows([40], 32, triton_device)
    q, w = queries(keys, heads, 32)
    found = score_history(q, w, keys, precision="fp32", impl="fused")
    assert relative_error(found, score_history(q, w, keys, impl="reference")) < 1e-5


@pytest.mark.parametrize("dim", [4, 12, 64, 96, 128])
@pytest.mark.parametrize("in_pages", [False, True])
def test_ragged_sessions_among_nan_bytes(dim: int, in_pages: bool, triton_device: torch.device) -> None:
    make = pooled_index_rows if in_pages else interleaved_index_rows
    keys = make(RAGGED, dim, triton_device)
    q, w = queries(keys, 5, dim)
    found = score_history(q, w, keys, precision="fp32", impl="fused")
    assert found.shape == (4, 70) and found.dtype is torch.float32
    assert relative_error(found, score_history(q, w, keys, impl="reference")) < 1e-5


@pytest.mark.parametrize("merge", ["max", "mean"])
@pytest.mark.parametrize(("layers", "tokens"), [(1, 3), (3, 1), (2, 2)])
def test_layers_and_tokens_merge(merge: str, layers: int, tokens: int, triton_device: torch.device) -> None:
    keys = interleaved_index_rows([33, 7], 16, triton_device, layers=layers)
    q, w = queries(keys, 4, 16, tokens=tokens)
    found = score_history(q, w, keys, merge=merge, precision="fp32", impl="fused")
    wanted = score_history(q, w, keys, merge=merge, impl="reference")
    assert relative_error(found, wanted) < 1e-5
    assert not torch.equal(wanted, score_history(q[:1, :, :1], w[:1, :, :1], _layer(keys, 0)))


@pytest.mark.parametrize("page_chunks", [1, 4, 64])
def test_exact_keys(page_chunks: int, triton_device: torch.device) -> None:
    keys = pooled_exact_keys(RAGGED, 24, torch.float32, triton_device, page_chunks=page_chunks)
    q, w = queries(keys, 6, 24)
    found = score_history(q, w, keys, impl="fused")  # float32 keys are multiplied in float32 by default
    assert relative_error(found, score_history(q, w, keys, impl="reference")) < 1e-5


@pytest.mark.parametrize(("precision", "least", "most"), [("fp16", 0, 1e-3), ("fp8x2", 1e-4, 1e-2), ("fp8", 5e-3, 0.1)])
def test_narrow_queries_lose_what_their_format_loses(
    precision: str, least: float, most: float, triton_device: torch.device
) -> None:
    keys = pooled_index_rows([100, 50], 64, triton_device)
    q, w = queries(keys, 16, 64)
    found = score_history(q * 300, w, keys, precision=precision, impl="fused")
    assert least < relative_error(found, score_history(q * 300, w, keys, impl="reference")) < most


def test_fp8_products_are_exact(triton_device: torch.device) -> None:
    from flashmem.kernels.score_chunks.fused import score_logits

    keys = pooled_index_rows([100, 50], 64, triton_device)
    q, w = queries(keys, 16, 64)
    rounded = (q * 100).to(torch.float8_e4m3fn)
    found = score_logits(rounded[:, :, :, None], w / 2, keys, mean=False)  # the kernel doubles: relu's half is in w
    assert relative_error(found, score_history(rounded.float(), w, keys, impl="reference")) < 1e-4


@pytest.mark.parametrize("precision", ["fp8", "fp8x2", "fp16", "bf16", "fp32"])
def test_prepared_queries_are_the_queries(precision: str, triton_device: torch.device) -> None:
    from flashmem.kernels.score_chunks.fused import prepare_queries

    if precision in ("fp8", "fp8x2", "bf16") and triton_device.type == "cpu":
        pytest.skip("Triton's interpreter loses the carry when it rounds 31.7 to e4m3, and cuts bf16")
    q, w = draw(2, 3, 1, 19, 24, seed=1).to(triton_device), draw(2, 3, 1, 19, seed=2).to(triton_device)
    prepared, weights = prepare_queries(q, w, precision)
    scale = (2 * weights / w)[..., None]
    if precision.startswith("fp8"):  # every head uses the whole range
        assert prepared[..., 0, :, :].float().abs().amax(-1).eq(448).all()
    half_step = {"fp8": 2**-4, "fp8x2": 2**-8, "fp16": 2**-11, "bf16": 2**-8, "fp32": 2**-22}[precision]
    smallest = q.abs().amax(-1, keepdim=True) * (2**-18 if precision.startswith("fp8") else 2**-22)
    restored = prepared.float().sum(dim=3) * scale
    assert ((restored - q).abs() <= q.abs() * half_step + smallest).all()


def test_large_and_zero_queries_stay_finite(triton_device: torch.device) -> None:
    keys = interleaved_index_rows([20], 32, triton_device)
    q, w = queries(keys, 4, 32)
    for factor, precision in ((0.0, "fp16"), (0.0, "fp8"), (1e-30, "fp16"), (1e9, "fp16"), (1e9, "fp8x2")):
        found = score_history(q * factor, w, keys, precision=precision, impl="fused")
        wanted = score_history(q * factor, w, keys, impl="reference")
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1 * float(wanted.abs().max()) + 1e-6)


@pytest.mark.parametrize("page_chunks", [4, 16, 128])
@pytest.mark.parametrize("merge", ["max", "mean"])
def test_page_reductions(page_chunks: int, merge: str, triton_device: torch.device) -> None:
    keys = interleaved_index_rows([*RAGGED, 130], 16, triton_device, layers=2)
    q, w = queries(keys, 4, 16)
    settings = {"page_chunks": page_chunks, "temperature": 0.25, "threshold": 1.0, "merge": merge}
    wanted = score_pages(q, w, keys, **settings)
    found = score_pages(q, w, keys, **settings, precision="fp32", impl="fused")
    assert found.best.shape == (5, -(-130 // page_chunks))
    torch.testing.assert_close(found.best, wanted.best, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.score, wanted.score, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.above, wanted.above) and int(wanted.above.sum()) > 0
    assert found.best[1].isneginf().all() and found.score[1].isneginf().all() and not found.above[1].any()


def test_page_scores_are_those_of_the_policies(triton_device: torch.device) -> None:
    from flashmem.policy.scores import TEMPERATURE, page_maxima, page_scores

    keys = interleaved_index_rows([50], 16, triton_device)
    q, w = queries(keys, 4, 16)
    logits = score_history(q, w, keys, impl="reference")[0]
    pages = score_pages(
        q, w, keys, page_chunks=16, temperature=TEMPERATURE, threshold=0.0, precision="fp32", impl="fused"
    )
    torch.testing.assert_close(pages.score[0].cpu(), page_scores(logits, 16, 4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pages.best[0].cpu(), page_maxima(logits, 16, 4), rtol=1e-4, atol=1e-4)


def test_a_nan_is_not_hidden(triton_device: torch.device) -> None:
    keys = interleaved_index_rows([40], 16, triton_device, layers=2)
    keys.regions[0][0][20] = 0xFF
    q, w = queries(keys, 4, 16)
    assert score_history(q, w, keys, precision="fp32", impl="fused").isnan()[0].nonzero().tolist() == [[20]]
    settings = {"page_chunks": 16, "temperature": 0.25, "threshold": 0.0, "precision": "fp32"}
    assert score_pages(q, w, keys, **settings, impl="fused").score[0].isnan().tolist() == [False, True, False]


def test_one_tensor_of_keys(triton_device: torch.device) -> None:
    q, w = draw(2, 3, 4, 16, seed=1).to(triton_device), draw(2, 3, 4, seed=2).to(triton_device)
    keys = draw(2, 45, 16, seed=3).to(triton_device)
    for k in (keys, encode_index_rows(keys)):
        found = score_chunks(q, k, w, impl="fused", precision="fp32")
        torch.testing.assert_close(found, score_chunks(q, k, w, impl="reference"), rtol=1e-4, atol=1e-4)
    assert score_chunks(q[0], keys[0, :0], w[0], impl="fused").shape == (3, 0)


def test_nobody_there(triton_device: torch.device) -> None:
    keys = interleaved_index_rows([0, 0], 16, triton_device)
    q, w = queries(keys, 4, 16)
    assert score_history(q, w, keys, impl="fused").shape == (2, 0)
    pages = score_pages(q, w, keys, page_chunks=4, temperature=1.0, threshold=0.0, impl="fused")
    assert pages.best.shape == (2, 0)


def test_what_the_fused_version_cannot_do_is_refused(triton_device: torch.device) -> None:
    keys = interleaved_index_rows([8], 16, triton_device)
    q, w = queries(keys, 300, 16)
    with pytest.raises(ValueError, match="300 heads; the fused kernel takes at most 256"):
        score_history(q, w, keys, impl="fused")
    q, w = queries(keys, 4, 16)
    with pytest.raises(ValueError, match="power of two of chunks, got 12"):
        score_pages(q, w, keys, page_chunks=12, temperature=1.0, threshold=0.0, impl="fused")
    with pytest.raises(ValueError, match="no gradient"):
        score_chunks(q[0].requires_grad_(), keys.read()[:1], w[0], impl="fused")
    odd = interleaved_index_rows([8], 6, triton_device)
    with pytest.raises(ValueError, match="aligned to 2"):
        score_history(*queries(odd, 4, 6), odd, impl="fused")


def test_shapes_that_do_not_fit_are_refused(triton_device: torch.device) -> None:
    keys = interleaved_index_rows([8, 8], 16, triton_device)
    q, w = queries(keys, 4, 16)
    for args, message in (
        ((q[:, :1], w[:, :1], keys), "do not fit keys of 1 layers and 2 sessions"),
        ((q, w[..., :3], keys), "q must be"),
        ((q[..., :12], w, keys), "cannot be rows of 16 [+] 4"),
    ):
        with pytest.raises(ValueError, match=message):
            score_history(*args)
    with pytest.raises(ValueError, match="merge must be"):
        score_history(q, w, keys, merge="sum")  # type: ignore[arg-type]


def _layer(keys: PagedRows, layer: int) -> PagedRows:
    return PagedRows(keys.form, [keys.regions[layer]], keys.counts_B.tolist(), keys.numbers_BP)
