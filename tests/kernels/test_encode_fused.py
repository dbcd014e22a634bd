"""What a step writes: pooled windows, index rows and fp8 entries, byte for byte those of the definition."""

import pytest
import torch

from flashmem.kernels.index_rows import decode_index_rows, encode_index_rows
from flashmem.kernels.kv_codec import KVFormatSpec, decode_rows, encode_rows
from support.paged_cases import draw


def values_of_all_sizes(*shape: int, seed: int = 0) -> torch.Tensor:
    """With zeros, values far below and above the range, and the two ends of it."""
    x = draw(*shape, seed=seed) * 10 ** (8 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 4)
    x[..., 0] = 0.0
    x.view(-1)[::7] *= -1e-6
    return x


SHAPES = [((1, 4), torch.float32), ((33, 64), torch.bfloat16), ((3, 7, 128), torch.float32)]


@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
def test_index_rows_are_the_same_bytes(shape: tuple[int, ...], dtype: torch.dtype, triton_device: torch.device) -> None:
    for keys in (draw(*shape), values_of_all_sizes(*shape), torch.zeros(shape)):
        keys = keys.to(triton_device, dtype)
        found = encode_index_rows(keys, impl="fused")
        assert found.shape == (*shape[:-1], shape[-1] + 4) and torch.equal(found, encode_index_rows(keys))


def test_every_e4m3_value_and_the_ties_between_them(triton_device: torch.device) -> None:
    """One channel of 448 fixes the scale at 1; the others are all values, midpoints and their neighbours."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[1:] + codes[:-1]) / 2
    x = torch.cat((codes, middle, middle.nextafter(codes[1:]), middle.nextafter(codes[:-1])))
    x = torch.cat((x, -x))
    x = torch.nn.functional.pad(x, (0, -len(x) % 63)).view(-1, 63)
    x = torch.cat((torch.full((len(x), 1), 448.0), x), 1).to(triton_device)
    spec = KVFormatSpec("fp8", 64, 0)
    found = encode_rows(spec, x, impl="fused")
    assert torch.equal(found, encode_rows(spec, x)) and found[:, 64].eq(127).all()


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(64, 0), (70, 4), (128, 32), (512, 64), (10, 8)])
def test_fp8_entries_are_the_same_bytes(head_dim: int, rope_dim: int, triton_device: torch.device) -> None:
    spec = KVFormatSpec("fp8", head_dim, rope_dim)
    kv = values_of_all_sizes(9, head_dim).to(triton_device)
    kv[::2, 0] = 448.0 * 2.0 ** (torch.arange(5, device=triton_device) * 3 - 6)  # at the edge of a scale
    assert torch.equal(encode_rows(spec, kv, impl="fused"), encode_rows(spec, kv))


def test_infinity_and_nan_stay_in_place(triton_device: torch.device) -> None:
    spec = KVFormatSpec("fp8", 128, 0)
    kv = torch.ones(1, 128)
    kv[0, 0], kv[0, 64] = float("inf"), float("nan")
    rows = encode_rows(spec, kv.to(triton_device), impl="fused")
    assert torch.equal(rows, encode_rows(spec, kv.to(triton_device)))
    assert decode_rows(spec, rows, torch.float32)[0, 64].isnan()
    keys = torch.ones(2, 8)
    keys[1, 3] = float("nan")
    found = decode_index_rows(encode_index_rows(keys.to(triton_device), impl="fused"))
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_what_the_fused_versions_cannot_do_is_refused(triton_device: torch.device) -> None:
    with pytest.raises(ValueError, match="power of two of channels, at least 4, got 12"):
        encode_index_rows(torch.zeros(1, 12), impl="fused")
    with pytest.raises(ValueError, match="even bytes, got 9 plain channels"):
        encode_rows(KVFormatSpec("fp8", 17, 8), torch.zeros(1, 17), impl="fused")
    for call in (
        lambda: encode_index_rows(torch.zeros(1, 8), impl="fast"),  # type: ignore[arg-type]
        lambda: encode_rows(KVFormatSpec("fp8", 64, 0), torch.zeros(1, 64), impl="fast"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="unknown impl 'fast'"):
            call()
