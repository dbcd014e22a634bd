"""Hyper-connections on few tokens: what the stock modules say, in every shape that a step can have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from flashmem.kernels.hyper_connection import Connection, collapse, spread

IMPLS = ["reference", "fused"]
SIZES = [(1, 70), (2, 256), (3, 70), (4, 70), (4, 256)]


def modules(num_streams: int, hidden: int, device: torch.device) -> tuple[Any, Any]:
    """A stock connection and the norm behind it, with weights that leave nothing near a constant."""
    config = DeepseekV4Config(hidden_size=hidden, hc_mult=num_streams, hc_sinkhorn_iters=7, hc_eps=1e-3)
    connection, norm = stock.DeepseekV4HyperConnection(config), stock.DeepseekV4RMSNorm(hidden, eps=1e-2)
    generator = torch.Generator().manual_seed(num_streams * hidden)
    with torch.no_grad():
        for parameter in (*connection.parameters(), *norm.parameters()):
            parameter.normal_(generator=generator)
        connection.fn.mul_(2 * (num_streams * hidden) ** -0.5)
    return connection.to(device), norm.to(device)


def weights(connection: Any, norm: Any) -> Connection:
    return Connection(
        fn_OF=connection.fn.detach(), base_O=connection.base.detach(), scale_3=connection.scale.detach(),
        norm_weight_E=norm.weight.detach(), streams_eps=connection.input_norm.eps, mix_eps=connection.hc_eps,
        norm_eps=norm.variance_epsilon, sinkhorn_iterations=connection.hc_sinkhorn_iters,
    )  # fmt: skip


def draw(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """The same values, with NaN before and behind them."""
    around = torch.full((x.numel() + 512,), float("nan"), dtype=x.dtype, device=x.device)
    around[256:-256] = x.flatten()
    return around[256:-256].view(x.shape)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(("num_streams", "hidden"), SIZES)
@torch.no_grad()
def test_collapse_is_the_stock_connection_and_norm(
    num_streams: int, hidden: int, batch: int, impl: Any, triton_device: torch.device
) -> None:
    connection, norm = modules(num_streams, hidden, triton_device)
    streams = draw(batch, num_streams, hidden, device=triton_device)
    *wanted, collapsed = connection(streams[:, None])
    found = collapse(streams, weights(connection, norm), impl=impl)
    for name, got, want in zip(("post", "comb", "normed"), found, [*wanted, norm(collapsed)], strict=True):
        torch.testing.assert_close(got, want[:, 0], rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(("num_streams", "hidden"), [*SIZES, (2, 600)])
def test_spread_sums_over_the_first_axis(
    num_streams: int, hidden: int, batch: int, impl: Any, triton_device: torch.device
) -> None:
    streams, out = (draw(batch, *shape, hidden, device=triton_device) for shape in ((num_streams,), ()))
    post, comb = (draw(batch, *shape, device=triton_device) for shape in ((num_streams,), (num_streams, num_streams)))
    wanted = post[..., None] * out[:, None]
    for old in range(num_streams):
        wanted += comb[:, old, :, None] * streams[:, old, None]
    torch.testing.assert_close(spread(out, post, comb, streams, impl=impl), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("num_streams", "hidden"), [(1, 70), (3, 70), (5, 96)])
@torch.no_grad()
def test_nothing_beyond_the_values_is_read(num_streams: int, hidden: int, triton_device: torch.device) -> None:
    """Blocks are padded to powers of two, in streams, channels, weights and shares."""
    connection, norm = modules(num_streams, hidden, triton_device)
    streams, out = draw(3, num_streams, hidden, device=triton_device), draw(3, hidden, device=triton_device)
    plain = weights(connection, norm)
    names = ("fn_OF", "base_O", "scale_3", "norm_weight_E")
    guarded = weights(connection, norm)
    for name in names:
        object.__setattr__(guarded, name, poisoned(getattr(plain, name)))
    wanted = collapse(streams, plain, impl="reference")
    found = collapse(poisoned(streams), guarded, impl="fused")
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
    post, comb, _ = wanted
    new = spread(*map(poisoned, (out, post, comb, streams)), impl="fused")
    torch.testing.assert_close(new, spread(out, post, comb, streams), rtol=1e-5, atol=2e-6)


@torch.no_grad()
def test_a_token_does_not_depend_on_its_neighbours(triton_device: torch.device) -> None:
    """But for the order of sums on a device, where other numbers of tokens are another kernel; no chance is in it."""
    connection, norm = modules(3, 70, triton_device)
    streams = draw(11, 3, 70, device=triton_device)
    together = collapse(streams, weights(connection, norm), impl="fused")
    for b in range(11):
        alone = collapse(streams[b : b + 1], weights(connection, norm), impl="fused")
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], many[b], rtol=1e-5, atol=2e-6)
    again = collapse(streams, weights(connection, norm), impl="fused")
    assert all(torch.equal(one, other) for one, other in zip(together, again, strict=True))


@torch.no_grad()
def test_without_eps_padding_is_no_nan(triton_device: torch.device) -> None:
    connection, norm = modules(3, 70, triton_device)
    connection.hc_eps = connection.input_norm.eps = 0.0
    streams = draw(2, 3, 70, device=triton_device)
    for got, want in zip(*(collapse(streams, weights(connection, norm), impl=impl) for impl in IMPLS), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("batch", [1, 9])
@torch.no_grad()
def test_bf16_is_rounded_where_the_stock_layer_rounds(batch: int, triton_device: torch.device) -> None:
    if triton_device.type != "cuda":
        pytest.skip("Triton's interpreter rounds bfloat16 wrongly")
    connection, norm = modules(4, 4096, triton_device)
    streams, out = (draw(batch, *s, device=triton_device).bfloat16() for s in ((4, 4096), (4096,)))
    found, wanted = (collapse(streams, weights(connection, norm), impl=impl) for impl in ("fused", "reference"))
    stock_post, stock_comb, _ = connection(streams[:, None])
    for got, want, theirs in zip(found[:2], wanted[:2], (stock_post, stock_comb), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got, theirs[:, 0], rtol=1e-4, atol=1e-5)
    # sums in another order may fall on the other side of a rounding: one step of bfloat16, twice
    torch.testing.assert_close(found[2], wanted[2], rtol=2**-6, atol=1e-3)
    assert (found[2] == wanted[2]).float().mean() > 0.95
    new, same = (spread(out, *wanted[:2], streams, impl=impl) for impl in ("fused", "reference"))
    torch.testing.assert_close(new, same, rtol=2**-7, atol=1e-3)


def test_no_tokens_are_no_launch() -> None:
    connection, norm = modules(2, 64, torch.device("cpu"))
    streams = torch.zeros(0, 2, 64)
    post, comb, normed = collapse(streams, weights(connection, norm), impl="fused")
    assert (post.shape, comb.shape, normed.shape) == ((0, 2), (0, 2, 2), (0, 64))
    assert spread(normed, post, comb, streams, impl="fused").shape == (0, 2, 64)


def test_what_does_not_fit_is_refused(triton_device: torch.device) -> None:
    c = weights(*modules(2, 64, triton_device))
    streams = draw(3, 2, 64, device=triton_device)
    with pytest.raises(ValueError, match=r"streams must be floats \[B, N, E\], got torch.int64"):
        collapse(streams.long(), c)
    with pytest.raises(ValueError, match=r"fn must be \(15, 192\) for 3 streams of 64, got \(8, 128\)"):
        collapse(draw(3, 3, 64, device=triton_device), c)
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        collapse(streams, c, impl="fast")  # type: ignore[arg-type]
    out, post, comb = streams[:, 0], streams[:, :, 0], streams[:, :, :2]
    with pytest.raises(ValueError, match=r"comb must be \(3, 2, 2\) for 2 streams of 64, got \(3, 2\)"):
        spread(out, post, post, streams)
    with pytest.raises(ValueError, match=r"out is torch\.float16, the streams are torch\.float32"):
        spread(out.half(), post, comb, streams)
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        spread(out, post, comb, streams, impl="fast")  # type: ignore[arg-type]
    wide = draw(1, 2, 8200, device=triton_device)
    with pytest.raises(ValueError, match="2 streams of 8200 channels; the fused kernel takes at most 8 of 8192"):
        collapse(wide, weights(*modules(2, 8200, triton_device)), impl="fused")
    with pytest.raises(ValueError, match="at most 8 of 8192"):
        spread(wide[:, 0], post[:1], comb[:1], wide, impl="fused")
