import pytest
import torch

from flashmem.kernels.index_rows import decode_index_rows, encode_index_rows, hadamard
from flashmem.kernels.score_chunks import score_chunks, score_chunks_max
from flashmem.kernels.score_chunks.tiled import ELEMENT_BUDGET, score_chunks_tiled


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_float64(q_MHI: torch.Tensor, keys_NI: torch.Tensor, w_MH: torch.Tensor) -> torch.Tensor:
    """One logit at a time."""
    q, keys, w = q_MHI.double(), keys_NI.double(), w_MH.double()
    logits = torch.zeros(len(q), len(keys), dtype=torch.float64)
    for m in range(len(q)):
        for n in range(len(keys)):
            for h in range(q.shape[1]):
                logits[m, n] += w[m, h] * max(0.0, float(q[m, h] @ keys[n]))
    return logits


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize(("M", "H", "I", "N"), [(1, 1, 4, 1), (1, 5, 12, 7), (3, 4, 16, 33), (2, 7, 6, 0)])
def test_matches_float64_on_rows_and_float_keys(impl: str, M: int, H: int, I: int, N: int) -> None:  # noqa: E741
    q, keys, w = draw(M, H, I, seed=1), draw(N, I, seed=2), draw(M, H, seed=3)  # weights of both signs
    logits = score_chunks(q, keys, w, impl=impl)
    assert logits.dtype is torch.float32 and logits.shape == (M, N)
    torch.testing.assert_close(logits.double(), in_float64(q, keys, w), rtol=1e-5, atol=1e-5)
    rows = encode_index_rows(keys)
    expected = in_float64(q, decode_index_rows(rows), w)
    torch.testing.assert_close(score_chunks(q, rows, w, impl=impl).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 7, 64, 1000, 1 << 20])
def test_any_tile_gives_the_definition(budget: int) -> None:
    q, keys, w = draw(2, 5, 3, 8, seed=1), draw(2, 129, 8, seed=2), draw(2, 5, 3, seed=3)
    tiled = score_chunks_tiled(q, keys, w, element_budget=budget)
    torch.testing.assert_close(tiled, score_chunks(q, keys, w, impl="reference"), rtol=1e-5, atol=1e-5)


def test_batches_have_their_own_keys() -> None:
    q, keys, w = draw(3, 2, 4, 8, seed=1), draw(3, 9, 8, seed=2), draw(3, 2, 4, seed=3)
    logits = score_chunks(q, keys, w)
    for b in range(3):
        torch.testing.assert_close(logits[b], score_chunks(q[b], keys[b], w[b]))


def test_relu_ties_and_negative_similarity_are_exactly_zero() -> None:
    q, w = torch.ones(1, 4, 8), -torch.ones(1, 4)
    keys = torch.stack((torch.zeros(8), -torch.ones(8), torch.ones(8)))
    assert score_chunks(q, keys, w).tolist() == [[0.0, 0.0, -32.0]]


def test_hadamard_on_both_sides_changes_nothing() -> None:
    q, keys, w = draw(2, 4, 16, seed=1), draw(50, 16, seed=2), draw(2, 4, seed=3)
    torch.testing.assert_close(
        score_chunks(hadamard(q), hadamard(keys), w), score_chunks(q, keys, w), rtol=1e-4, atol=1e-4
    )


def test_gradients_equal_the_definition() -> None:
    grads = []
    for impl in ("reference", "tiled"):
        q, keys, w = (x.requires_grad_() for x in (draw(2, 3, 8), draw(70, 8, seed=1), draw(2, 3, seed=2)))
        score_chunks(q, keys, w, impl=impl).square().sum().backward()
        grads.append((q.grad, keys.grad, w.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_no_tensor_of_all_heads_and_chunks() -> None:
    q, rows, w = draw(2, 64, 8), torch.zeros(100_000, 12, dtype=torch.uint8), draw(2, 64)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        score_chunks(q, rows, w)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 2 * 64 * 100_000 * 4 / 2


@pytest.mark.parametrize("budget", [1, 100, 1 << 20])
def test_gradients_of_any_tile_equal_the_definition(budget: int) -> None:
    grads = []
    for tiled in (False, True):
        q, keys, w = draw(2, 5, 3, 8), draw(2, 70, 8, seed=1), draw(2, 5, 3, seed=2)
        for tensor in (q, keys, w):
            tensor.requires_grad_()
        logits = (
            score_chunks_tiled(q, keys, w, element_budget=budget)
            if tiled
            else score_chunks(q, keys, w, impl="reference")
        )
        logits.square().sum().backward()
        grads.append((q.grad, keys.grad, w.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("elements", [1, 500, 1 << 20])
@pytest.mark.parametrize("some", [False, True])
def test_maximum_over_tokens_and_its_gradient(elements: int, some: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ELEMENT_BUDGET, "cpu", elements)
    seen = torch.tensor([[True, True, True], [False, False, True]]) if some else None
    results = []
    for impl in ("reference", "tiled"):
        q, keys, w = draw(2, 3, 5, 8), draw(131, 8, seed=1), draw(2, 3, 5, seed=2)
        for tensor in (q, keys, w):
            tensor.requires_grad_()
        best = score_chunks_max(q, keys, w, seen, impl=impl)  # type: ignore[arg-type]
        (best * draw(2, 131, seed=3).relu()).sum().backward()  # relu: some pairs have no gradient
        results.append((best, q.grad, keys.grad, w.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_one_observed_token_is_its_own_maximum() -> None:
    q, rows, w = draw(3, 1, 5, 8), encode_index_rows(draw(70, 8, seed=1)), draw(3, 1, 5, seed=2)
    seen = torch.tensor([[True], [False], [True]])
    best = score_chunks_max(q, rows, w, seen)
    assert torch.equal(best[seen[:, 0]], score_chunks(q[:, 0], rows, w[:, 0])[seen[:, 0]])
    assert bool((best[1] == -torch.inf).all())


def test_maximum_over_many_chunks_of_few_tokens() -> None:
    """Tiles of one token that are full, partly filled, and absent."""
    q, keys, w = draw(2, 3, 4, 8), draw(400, 8, seed=1), draw(2, 3, 4, seed=2)
    w[0, 1] = -w[0, 1].abs()  # a token that seldom wins
    grads = []
    for impl in ("reference", "tiled"):
        tensors = [x.clone().requires_grad_() for x in (q, keys, w)]
        (score_chunks_max(*tensors, impl=impl) * draw(2, 400, seed=3)).sum().backward()
        grads.append([x.grad for x in tensors])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("m", [1, 3])
def test_autocast_rounds_products_and_nothing_else(m: int, device: str) -> None:
    """Forward and backward round alike; large logits keep their float32 digits."""
    q, w = draw(2, m, 16, 32).to(device), draw(2, m, 16, seed=2).to(device) + 30
    rows = encode_index_rows(draw(300, 32, seed=1)).to(device)
    upstream = draw(2, 300, seed=3).to(device)
    results = []
    for rounds in (False, True):
        tensors = [x.clone().requires_grad_() for x in (q, w)]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=rounds):
            best = score_chunks_max(tensors[0], rows, tensors[1])
        (best * upstream).sum().backward()
        results.append([best.detach(), *(x.grad for x in tensors)])
    # bfloat16 keeps 8 bits, 4e-3; a product near zero may change sides, which only the gradient of q sees as a jump
    for exact, rounded, limit in zip(*results, (8e-3, 4e-2, 8e-3), strict=True):
        assert rounded.dtype is torch.float32
        assert 0 < float((rounded - exact).norm() / exact.norm()) < limit
    best = results[1][0]
    assert not torch.equal(best, best.bfloat16().float())


def test_maximum_of_nothing() -> None:
    assert score_chunks_max(draw(2, 3, 5, 8), torch.empty(0, 12, dtype=torch.uint8), draw(2, 3, 5)).shape == (2, 0)
    assert score_chunks_max(draw(0, 3, 5, 8), draw(4, 8), draw(0, 3, 5)).shape == (0, 4)
    with pytest.raises(ValueError, match="at least one observed token"):
        score_chunks_max(draw(2, 0, 5, 8), draw(4, 8), draw(2, 0, 5))
    with pytest.raises(ValueError, match="must be"):
        score_chunks_max(draw(2, 3, 5, 8), draw(4, 8), draw(2, 5, 3))


def test_backward_keeps_no_products() -> None:
    kept: list[torch.Tensor] = []
    q, rows, w = draw(2, 64, 8).requires_grad_(), torch.zeros(5000, 12, dtype=torch.uint8), draw(2, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        score_chunks(q, rows, w)
    assert sum(x.nbytes for x in kept) < 2 * 64 * 5000


@pytest.mark.parametrize(
    ("q", "keys", "w"),
    [
        ((2, 3, 8), (5, 7), (2, 3)),  # key width
        ((2, 3, 8), (5, 8), (3, 2)),  # weights
        ((2, 3, 2, 8), (3, 5, 8), (2, 3, 2)),  # batch
        ((3, 8), (5, 8), (3,)),  # no query dimension
    ],
)
def test_shapes_that_do_not_fit_are_refused(q: tuple, keys: tuple, w: tuple) -> None:
    with pytest.raises(ValueError, match="must be"):
        score_chunks(torch.zeros(q), torch.zeros(keys), torch.zeros(w))


def test_rows_of_the_wrong_type_or_impl_are_refused() -> None:
    q, w = torch.zeros(1, 2, 8), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="uint8 rows or floating"):
        score_chunks(q, torch.zeros(3, 12, dtype=torch.int8), w)
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        score_chunks(q, torch.zeros(3, 8), w, impl="fast")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1, 128, 128, 70_001), (1, 5, 64, 128, 1000), (7, 1, 9, 12, 33)])
def test_cuda_equals_the_definition(shape: tuple[int, ...]) -> None:
    B, M, H, I, N = shape  # noqa: E741
    q, w = draw(B, M, H, I, seed=1), draw(B, M, H, seed=3)
    rows = encode_index_rows(draw(B, N, I, seed=2))
    expected = score_chunks(q, rows, w, impl="reference")
    logits = score_chunks(q.cuda(), rows.cuda(), w.cuda())
    assert logits.is_cuda
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-3)
