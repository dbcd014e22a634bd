import pytest
import torch

from flashmem.kernels.kv_codec import (
    KVFormatSpec,
    decode_rows,
    encode_rows,
    get_planar,
    get_planar_pages,
    put_planar,
)

SHAPES = [(512, 64), (128, 32), (70, 4), (64, 0), (9, 8), (193, 64)]


def random_entries(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 10 ** (4 * torch.rand(*shape[:-1], 1, generator=generator) - 2)


def test_sizes_of_the_v4_layout() -> None:
    spec = KVFormatSpec("fp8", 512, 64)
    assert (spec.data_bytes, spec.scale_bytes, spec.entry_bytes) == (448 + 128, 8, 584)
    assert spec.page_bytes(64) == 37_440
    assert KVFormatSpec("bf16", 512, 64).page_bytes(64) == 64 * 1024
    assert KVFormatSpec("fp32", 9, 2).page_bytes(4) == 4 * 36


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(64, 64), (64, 65), (64, -1)])
def test_entries_without_plain_channels_are_refused(head_dim: int, rope_dim: int) -> None:
    with pytest.raises(ValueError, match=f"got {rope_dim}"):
        KVFormatSpec("fp8", head_dim, rope_dim)


@pytest.mark.parametrize(("head_dim", "rope_dim"), SHAPES)
@pytest.mark.parametrize(("kv_format", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_exact_formats_are_the_raw_bytes(kv_format: str, dtype: torch.dtype, head_dim: int, rope_dim: int) -> None:
    spec = KVFormatSpec(kv_format, head_dim, rope_dim)
    kv = random_entries(5, head_dim).to(dtype)
    rows = encode_rows(spec, kv)
    assert rows.shape == (5, spec.entry_bytes) and torch.equal(rows.view(dtype), kv)
    assert torch.equal(decode_rows(spec, rows, dtype), kv)


@pytest.mark.parametrize(("head_dim", "rope_dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_keeps_entries_to_format_precision(head_dim: int, rope_dim: int, dtype: torch.dtype) -> None:
    spec = KVFormatSpec("fp8", head_dim, rope_dim)
    nope = head_dim - rope_dim
    kv = random_entries(3, 7, head_dim).to(dtype)
    rows = encode_rows(spec, kv)
    assert rows.shape == (3, 7, spec.entry_bytes)
    out = decode_rows(spec, rows, torch.float32)
    assert torch.equal(out[..., nope:], kv[..., nope:].bfloat16().float())
    for first in range(0, nope, 64):
        block = kv[..., first : min(first + 64, nope)].float()
        error = (out[..., first : min(first + 64, nope)] - block).abs()
        # half a step of 3 mantissa bits; below the normal range half of 2^-9, at a scale of at most 2 * amax / 448
        smallest = block.abs().amax(-1, keepdim=True).clamp_min(1e-4) * 2 / 448 * 2**-10
        assert (error <= torch.maximum(block.abs() / 16, smallest)).all()


def test_fp8_is_the_published_byte_order() -> None:
    spec = KVFormatSpec("fp8", 512, 64)
    kv = torch.zeros(1, 512)
    kv[0, :64] = 448.0  # scale 1
    kv[0, 64] = 449.0  # scale 2
    kv[0, 511] = 1.0
    row = encode_rows(spec, kv)[0]
    assert row[:64].view(torch.float8_e4m3fn).float().eq(448).all()
    assert row[64:65].view(torch.float8_e4m3fn).float().item() == 224  # 449 / 2, rounded to 3 mantissa bits
    assert row[574:576].view(torch.bfloat16).item() == 1.0
    floor = 127 - 22  # 2^-22 is the smallest power of two that is at least 1e-4 / 448
    assert row[576:].tolist() == [127, 128, *[floor] * 5, 0]


@pytest.mark.parametrize("exponent", range(-20, 100, 7))
def test_scales_are_the_smallest_that_do_not_overflow(exponent: int) -> None:
    spec = KVFormatSpec("fp8", 64, 0)
    edge = torch.tensor([448.0 * 2.0**exponent])
    for amax, expected in ((edge, exponent), (torch.nextafter(edge, edge * 2), exponent + 1)):
        kv = torch.zeros(1, 64)
        kv[0, 3] = -amax
        row = encode_rows(spec, kv)
        assert row[0, 64].item() - 127 == max(expected, -22)
        assert decode_rows(spec, row, torch.float32).isfinite().all()


def test_fp8_infinity_and_nan_stay_in_place() -> None:
    spec = KVFormatSpec("fp8", 128, 0)
    kv = torch.ones(1, 128)
    kv[0, 0], kv[0, 64] = float("inf"), float("nan")
    out = decode_rows(spec, encode_rows(spec, kv), torch.float32)
    assert out[0, 0].isposinf() and out[0, 1:64].isfinite().all()
    assert out[0, 64].isnan() and out[0, 65:].eq(1).all()


@pytest.mark.parametrize("kv_format", ["fp32", "bf16", "fp8"])
def test_no_entries(kv_format: str) -> None:
    spec = KVFormatSpec(kv_format, 70, 4)
    rows = encode_rows(spec, torch.zeros(0, 3, 70))
    assert rows.shape == (0, 3, spec.entry_bytes)
    assert decode_rows(spec, rows, torch.bfloat16).shape == (0, 3, 70)


def test_wrong_shapes_are_refused() -> None:
    spec = KVFormatSpec("fp8", 70, 4)
    with pytest.raises(ValueError, match="70"):
        encode_rows(spec, torch.zeros(2, 71))
    with pytest.raises(ValueError, match=str(spec.entry_bytes)):
        decode_rows(spec, torch.zeros(2, 70, dtype=torch.uint8), torch.float32)
    with pytest.raises(ValueError, match=str(spec.page_bytes(4))):
        get_planar_pages(spec.planar(4), torch.zeros(2, 70, dtype=torch.uint8), torch.tensor([0]))


@pytest.mark.parametrize(("head_dim", "rope_dim"), SHAPES)
@pytest.mark.parametrize("kv_format", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("num_slots", [1, 5])
def test_planar_regions_within_records(kv_format: str, head_dim: int, rope_dim: int, num_slots: int) -> None:
    spec = KVFormatSpec(kv_format, head_dim, rope_dim)
    form = spec.planar(4)
    records = torch.full((num_slots, 32 + form.page_bytes + 48), 0xFF, dtype=torch.uint8)
    region = records[:, 32 : 32 + form.page_bytes]
    rows = encode_rows(spec, random_entries(num_slots * 4, head_dim))
    order = torch.randperm(num_slots * 4, generator=torch.Generator().manual_seed(1))
    slots, offsets = order // 4, order % 4
    put_planar(form, region, slots, offsets, rows)

    assert torch.equal(get_planar(form, region, slots, offsets), rows)
    pages = get_planar_pages(form, region, torch.arange(num_slots).flip(0).view(1, -1))
    assert torch.equal(pages[0].flip(0)[slots, offsets], rows)
    for row, slot, offset in zip(rows, slots.tolist(), offsets.tolist(), strict=True):
        first, tail = offset * form.data_bytes, 4 * form.data_bytes + offset * form.tail_bytes
        assert torch.equal(region[slot, first : first + form.data_bytes], row[: form.data_bytes])
        assert torch.equal(region[slot, tail : tail + form.tail_bytes], row[form.data_bytes :])
    assert records[:, :32].eq(0xFF).all() and records[:, 32 + 4 * form.row_bytes :].eq(0xFF).all()


def test_nothing_written_nothing_read() -> None:
    form = KVFormatSpec("fp8", 128, 32).planar(4)
    region = torch.zeros(2, form.page_bytes, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    put_planar(form, region, none, none, torch.zeros(0, form.row_bytes, dtype=torch.uint8))
    assert get_planar(form, region, none.view(2, 0), none.view(2, 0)).shape == (2, 0, form.row_bytes)
    assert get_planar_pages(form, region[:0], none).shape == (0, 4, form.row_bytes)


@pytest.mark.parametrize(("head_dim", "rope_dim"), SHAPES)
def test_single_entries(head_dim: int, rope_dim: int) -> None:
    """One row of a larger tensor counts as contiguous, at any address."""
    spec = KVFormatSpec("fp8", head_dim, rope_dim)
    form = spec.planar(4)
    kv = random_entries(3, head_dim)
    rows = encode_rows(spec, kv)
    assert torch.equal(encode_rows(spec, kv[1]), rows[1])
    assert torch.equal(decode_rows(spec, rows[1:2], torch.float32), decode_rows(spec, rows, torch.float32)[1:2])
    region = torch.zeros(2, form.page_bytes, dtype=torch.uint8)
    put_planar(form, region, torch.tensor([1]), torch.tensor([3]), rows[1:2])
    assert torch.equal(get_planar(form, region, torch.tensor(1), torch.tensor(3)), rows[1])
