"""Decode attention over rows read in place, against the definition on gathered and decoded entries."""

import pytest
import torch

from flashmem.kernels.kv_codec import KVFormatSpec, PlanarForm, encode_rows, put_planar
from flashmem.kernels.paged import PagedRows, interleaved_form
from flashmem.kernels.sparse_attention import EntrySource, attend, attend_rows
from flashmem.kernels.sparse_attention.fused import Tiles, attend_rows_fused, choose_tiles
from support.paged_cases import POISON, draw, pooled_entries

RAGGED = [50, 0, 17]
# format, head_dim, rotary channels: whole blocks, half a block, none, less than a block, V4's own
GEOMETRIES = [
    ("fp32", 64, 16), ("bf16", 128, 32), ("fp32", 70, 4),
    ("fp8", 128, 32), ("fp8", 96, 0), ("fp8", 70, 4), ("fp8", 64, 64 - 8), ("fp8", 512, 64),
]  # fmt: skip


def windows(spec: KVFormatSpec, counts: list[int], size: int, device: torch.device) -> EntrySource:
    """Rings of which only the first entries were written."""
    form = PlanarForm(size, spec.data_bytes, 0)
    rings = []
    for b, count in enumerate(counts):
        ring = torch.full((1, form.page_bytes), POISON, dtype=torch.uint8)
        ring[0, : count * spec.data_bytes] = encode_rows(spec, draw(count, spec.head_dim, seed=70 + b)).flatten()
        rings.append(ring.to(device))
    return EntrySource(PagedRows(form, [rings], counts), spec)


def picks(counts: list[int], k: int, device: torch.device) -> torch.Tensor:
    rows = []
    for b, count in enumerate(counts):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(b))[:k]
        rows.append(torch.cat((order, torch.full((k - len(order),), -1))))
    return torch.stack(rows).to(device)


def case(
    kv_format: str, head_dim: int, rope_dim: int, heads: int, device: torch.device, k: int = 20
) -> tuple[torch.Tensor, list[EntrySource], torch.Tensor, float]:
    spec = KVFormatSpec(kv_format, head_dim, rope_dim)  # type: ignore[arg-type]
    exact = KVFormatSpec("fp32", head_dim, rope_dim)
    entries = EntrySource(pooled_entries(spec, RAGGED, device), spec, picks(RAGGED, k, device))
    sources = [windows(exact, [32, 1, 9], 32, device), entries]
    q, sinks = draw(3, heads, head_dim, seed=80).to(device), draw(heads, seed=81).to(device)
    return q, sources, sinks, head_dim**-0.5


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shares", [1, 3])
def test_window_and_picks(geometry: tuple[str, int, int], shares: int, triton_device: torch.device) -> None:
    q, sources, sinks, scale = case(*geometry, 5, triton_device)
    found = attend_rows_fused(q, sources, sinks, scale, Tiles(16, 16, shares, warps=4))
    torch.testing.assert_close(found, attend_rows(q, sources, sinks, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 16, 17, 64])
def test_head_counts(heads: int, triton_device: torch.device) -> None:
    q, sources, sinks, scale = case("fp8", 64, 8, heads, triton_device)
    found = attend_rows(q, sources, sinks, scale, impl="fused")
    torch.testing.assert_close(found, attend_rows(q, sources, sinks, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 16, 33])
def test_numbers_of_picks(k: int, triton_device: torch.device) -> None:
    q, sources, sinks, scale = case("fp32", 64, 8, 4, triton_device, k=k)
    found = attend_rows(q, sources, sinks, scale, impl="fused")
    torch.testing.assert_close(found, attend_rows(q, sources, sinks, scale), rtol=1e-5, atol=1e-5)


def test_more_shares_than_blocks(triton_device: torch.device) -> None:
    q, sources, sinks, scale = case("fp32", 64, 8, 4, triton_device)
    found = attend_rows_fused(q, sources, sinks, scale, Tiles(16, 16, 8, warps=4))
    torch.testing.assert_close(found, attend_rows(q, sources, sinks, scale), rtol=1e-5, atol=1e-5)


def test_all_entries_of_each_session(triton_device: torch.device) -> None:
    """HCA: interleaved rows of a session's own, no picks."""
    spec = KVFormatSpec("fp8", 96, 32)
    regions = []
    for b, count in enumerate(RAGGED):
        rows = torch.full((count + 3, spec.entry_bytes), POISON, dtype=torch.uint8)
        rows[:count] = encode_rows(spec, draw(count, 96, seed=b))
        regions.append(rows.to(triton_device))
    form = interleaved_form(spec.data_bytes, spec.scale_bytes)
    hca = EntrySource(PagedRows(form, [regions], RAGGED), spec)
    window = windows(KVFormatSpec("fp32", 96, 32), [8, 1, 3], 8, triton_device)
    q, sinks = draw(3, 4, 96, seed=1).to(triton_device), draw(4, seed=2).to(triton_device)
    for sources in ([window, hca], [hca]):
        found = attend_rows(q, sources, sinks, 0.1, impl="fused")
        torch.testing.assert_close(found, attend_rows(q, sources, sinks, 0.1), rtol=1e-5, atol=1e-5)


def test_it_is_attention_over_gathered_entries(triton_device: torch.device) -> None:
    q, sources, sinks, scale = case("fp8", 64, 8, 4, triton_device)
    sets = [source.key_set(torch.float32) for source in sources]
    found = attend_rows(q, sources, sinks, scale, impl="fused")
    torch.testing.assert_close(found, attend(q, sets, sinks, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale_code", [0, 1, 100, 127, 200, 246], ids=str)  # 247 * 448 is beyond float32
def test_every_code_at_every_scale(scale_code: int, triton_device: torch.device) -> None:
    """One entry and no sink: the result is the entry as the codec decodes it, bit for bit, subnormals too."""
    spec = KVFormatSpec("fp8", 256, 16)  # rotary channels beside plain ones in the last block
    rows = encode_rows(spec, draw(2, 256))
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN, which would be in every channel of the result
    rows[:, :240] = torch.stack((codes[:240], codes.roll(-16)[:240]))
    rows[:, 272:276] = scale_code
    form = spec.planar(1)
    source = EntrySource(
        PagedRows(form, [[padded(row, form.page_bytes).to(triton_device) for row in rows]], [1, 1]), spec
    )
    q, sinks = torch.zeros(2, 16, 256, device=triton_device), torch.full((16,), -1e30, device=triton_device)
    expected = source.key_set(torch.float32)[0].expand(-1, 16, -1)
    for tiles in (Tiles(16, 16, 1, warps=4), Tiles(16, 16, 1, warps=4, stages=3)):
        assert attend_rows_fused(q, [source], sinks, 1.0, tiles).eq(expected).all()


def padded(row: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (0, size - len(row)))[None]


def test_nan_of_a_picked_entry_is_seen(triton_device: torch.device) -> None:
    if triton_device.type == "cpu":
        pytest.skip("Triton's interpreter reads the e4m3 code of NaN as 480")
    spec = KVFormatSpec("fp8", 64, 8)
    kv = draw(4, 64)
    kv[2, 5] = float("nan")
    form = spec.planar(4)
    region = torch.full((1, form.page_bytes), POISON, dtype=torch.uint8)
    put_planar(form, region, torch.zeros(4, dtype=torch.int64), torch.arange(4), encode_rows(spec, kv))
    picked = torch.tensor([[2, 1, -1], [3, 1, -1]], device=triton_device)
    source = EntrySource(PagedRows(form, [[region.to(triton_device)]], [4, 4]), spec, picked)
    found = attend_rows(draw(2, 4, 64).to(triton_device), [source], draw(4).to(triton_device), 0.1, impl="fused")
    assert found[0].isnan().all() and found[1].isfinite().all()


@pytest.mark.parametrize("shares", [2, 4, 7])
def test_shares_cut_anywhere(shares: int, triton_device: torch.device) -> None:
    """Shares that end within a source, between two, or hold nothing; with more blocks than are on their way at once."""
    q, sources, sinks, scale = case("fp8", 64, 8, 4, triton_device, k=50)
    found = attend_rows_fused(q, sources, sinks, scale, Tiles(16, 16, shares, warps=4, stages=3))
    torch.testing.assert_close(found, attend_rows(q, sources, sinks, scale), rtol=1e-5, atol=1e-5)


def test_a_session_without_entries_gives_zeros(triton_device: torch.device) -> None:
    spec = KVFormatSpec("fp32", 64, 8)
    rows = pooled_entries(spec, [5, 0], triton_device)
    sources = [EntrySource(rows, spec, picks([5, 0], 4, triton_device))]
    q, sinks = draw(2, 4, 64, seed=1).to(triton_device), draw(4, seed=2).to(triton_device)
    for shares in (1, 2):
        found = attend_rows_fused(q, sources, sinks, 0.1, Tiles(16, 16, shares, warps=4))
        assert found[1].eq(0).all() and found[0].isfinite().all() and found[0].any()


def test_large_logits_and_sinks(triton_device: torch.device) -> None:
    q, sources, sinks, _ = case("fp32", 64, 8, 4, triton_device)
    for factor in (-200.0, 200.0):
        found = attend_rows(q * 30, sources, sinks * factor, 1.0, impl="fused")
        torch.testing.assert_close(found, attend_rows(q * 30, sources, sinks * factor, 1.0), rtol=1e-4, atol=1e-4)


def test_what_the_fused_version_cannot_do_is_refused(triton_device: torch.device) -> None:
    spec = KVFormatSpec("fp8", 193, 64)  # rotary channels in two blocks
    rows = pooled_entries(spec, [5], triton_device)
    q, sinks = draw(1, 4, 193).to(triton_device), draw(4).to(triton_device)
    with pytest.raises(ValueError, match=r"129..192 must lie within one block"):
        attend_rows(q, [EntrySource(rows, spec)], sinks, 0.1, impl="fused")
    q, sources, sinks, scale = case("fp32", 64, 8, 4, triton_device)
    with pytest.raises(ValueError, match="one or two sources, got 3"):
        attend_rows(q, [*sources, sources[0]], sinks, scale, impl="fused")


def test_shapes_that_do_not_fit_are_refused(triton_device: torch.device) -> None:
    q, sources, sinks, scale = case("fp32", 64, 8, 4, triton_device)
    with pytest.raises(ValueError, match="does not fit 3 sessions"):
        attend_rows(q[:2], sources, sinks, scale)
    with pytest.raises(ValueError, match=r"sinks must be \[4\]"):
        attend_rows(q, sources, sinks[:3], scale)
    with pytest.raises(ValueError, match="picks must be int64"):
        EntrySource(sources[1].rows, sources[1].spec, torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="do not hold"):
        EntrySource(sources[1].rows, KVFormatSpec("bf16", 64, 8))


@pytest.mark.parametrize(
    ("batch", "heads", "keys", "wide", "picked", "tiles"),
    [
        (1, 64, (128, 512), True, True, (16, 32, 20, 4)),  # one session: blocks of heads fill the device
        (8, 64, (128, 512), True, True, (64, 32, 16, 8)),
        (64, 64, (128, 512), True, True, (64, 64, 2, 8)),
        (64, 64, (128, 8192), True, False, (64, 32, 2, 8)),  # neighbours
        (2048, 64, (128, 512), True, True, (64, 64, 1, 8)),
        (2048, 8, (64, 2048), True, False, (16, 64, 1, 4)),
        (2048, 8, (64, 64), True, True, (16, 32, 1, 8)),
        (4, 8, (64, 0), True, True, (16, 32, 2, 8)),
        (1, 8, (0,), True, False, (16, 32, 1, 8)),
        (3, 64, (128, 512), False, True, (16, 16, 11, 8)),
    ],
)
def test_tiles_follow_the_work(
    batch: int, heads: int, keys: tuple[int, ...], wide: bool, picked: bool, tiles: tuple[int, ...]
) -> None:
    """On 132 multiprocessors; shares never outnumber blocks of keys, nor leave a program without a multiprocessor."""
    found = choose_tiles(132, batch, heads, keys, wide=wide, picked=picked)
    assert (found.heads, found.keys, found.shares, found.warps) == tiles
