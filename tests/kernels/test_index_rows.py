import pytest
import torch

from flashmem.kernels.index_rows import decode_index_rows, encode_index_rows, hadamard


@pytest.mark.parametrize("dim", [1, 2, 12, 64, 96, 128])
def test_hadamard_is_its_own_inverse_and_keeps_dot_products(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    a, b = torch.randn(2, 5, dim, generator=generator)
    torch.testing.assert_close(hadamard(hadamard(a)), a)
    torch.testing.assert_close((hadamard(a) * hadamard(b)).sum(-1), (a * b).sum(-1))


def test_hadamard_is_sylvester_ordered() -> None:
    expected = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    torch.testing.assert_close(hadamard(torch.eye(4)), expected)


@pytest.mark.parametrize("shape", [(0, 64), (1, 128), (3, 7, 32), (5, 12)])
def test_rows_keep_keys_to_e4m3_precision(shape: tuple[int, ...]) -> None:
    keys = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    rows = encode_index_rows(keys)
    assert rows.shape == (*shape[:-1], shape[-1] + 4) and rows.dtype is torch.uint8
    rotated = hadamard(keys)
    allowed = rotated.abs() / 16 + rotated.abs().amax(-1, keepdim=True).clamp_min(0) / 448
    assert ((decode_index_rows(rows) - rotated).abs() <= allowed).all()


def test_zero_keys_stay_zero() -> None:
    assert decode_index_rows(encode_index_rows(torch.zeros(2, 16))).eq(0).all()
