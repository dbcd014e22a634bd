"""Bytes: the published column, the record formats, and what must hold for every geometry."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmem.accounting import kept_pages, key_entry_bytes, kv_entry_bytes, kv_report, record_bytes, resolve_geometry
from flashmem.accounting.bytes import compressor_bytes, key_page_bytes, kv_page_bytes, window_bytes
from flashmem.config import ModelGeometry, RopeConfig

FLASH = resolve_geometry("deepseek-v4-flash")
SMALL = replace(
    FLASH,
    layer_kinds=("window", "csa", "hca", "csa", "hca", "csa", "csa"),
    hidden_size=48,
    num_heads=3,
    head_dim=40,
    index_heads=5,
    index_head_dim=24,
    sliding_window=16,
    compress_rope=RopeConfig(theta=160_000.0, dim=8),
)


@pytest.mark.parametrize(
    ("context", "gib"),
    [(46, 0.17), (179, 0.65), (493, 1.80), (125, 0.46), (500, 1.82), (64, 0.23), (128, 0.47), (256, 0.94), (512, 1.87)],
)
def test_full_bytes_are_the_published_column(context: int, gib: float) -> None:
    full = kv_report(FLASH, context * 1024, keep=0.1).paper.full_bytes / 2**30
    assert abs(full - gib) <= 0.005 + 0.015 * gib  # printed with two decimals


def test_published_bytes_per_token() -> None:
    assert kv_report(FLASH, 128, keep=1.0).paper.full_bytes == 128 * (584 + 132) * 21 // 4 + 584 * 20


def test_flash_formats() -> None:
    assert (kv_entry_bytes(FLASH, "fp8"), key_entry_bytes(FLASH, "fp8")) == (584, 132)
    assert (kv_entry_bytes(FLASH, "bf16"), key_entry_bytes(FLASH, "bf16")) == (1024, 256)
    assert (kv_page_bytes(FLASH, "fp8", 64), key_page_bytes(FLASH, "fp8", 64)) == (37_440, 8_448)
    assert record_bytes(FLASH, "fp8", num_targets=3) == 938_304
    assert record_bytes(FLASH, "bf16", num_targets=3) == 21 * 64 * (1024 + 256)  # exact: keys of every layer


def test_page_regions_are_padded() -> None:
    assert kv_page_bytes(SMALL, "fp8", 4) == 576  # 4 x (32 + 2 x 8 + 8) = 224
    assert key_page_bytes(SMALL, "fp8", 4) == 112
    assert kv_page_bytes(SMALL, "fp32", 4) == 4 * 160


def test_state_is_the_rings_and_windows() -> None:
    assert window_bytes(SMALL, "fp32") == 7 * 16 * 40 * 4
    csa = 8 * 80 + 8 * 80 + 8 * 48 + 8 * 48  # value and gate of 8 tokens: entry, then index key
    hca = 2 * 128 * 40
    assert compressor_bytes(SMALL, "fp32") == 4 * (4 * csa + 2 * hca)


@given(
    context=st.integers(0, 300_000),
    keep=st.floats(0.001, 1.0),
    kv_format=st.sampled_from(["fp32", "bf16", "fp8"]),
    page_chunks=st.sampled_from([4, 16, 64]),
    geometry=st.sampled_from([FLASH, SMALL]),
)
def test_reports_are_consistent(
    context: int, keep: float, kv_format: str, page_chunks: int, geometry: ModelGeometry
) -> None:
    report = kv_report(geometry, context, keep=keep, kv_format=kv_format, page_chunks=page_chunks)
    paper, all_in = report.paper, report.all_in
    assert 0 <= paper.resident_bytes <= paper.full_bytes
    assert sum(paper.full_components.values()) == paper.full_bytes
    assert sum(paper.resident_components.values()) == paper.resident_bytes
    assert all_in.full_bytes == sum(all_in.full_components.values()) > paper.full_bytes
    assert all_in.device["pages"] == report.resident_pages * report.record_bytes
    assert all_in.host_bytes == (context // 4 // page_chunks) * report.record_bytes
    assert min(*all_in.device.values(), *all_in.host.values(), *all_in.disk.values()) >= 0

    longer = kv_report(geometry, context + 4 * page_chunks, keep=keep, kv_format=kv_format, page_chunks=page_chunks)
    assert longer.paper.full_bytes > paper.full_bytes
    assert longer.paper.resident_bytes >= paper.resident_bytes
    assert longer.all_in.device_bytes > all_in.device_bytes
    assert longer.all_in.host_bytes == all_in.host_bytes + report.record_bytes


@given(context=st.integers(0, 100_000), page_chunks=st.sampled_from([4, 64]))
def test_everything_resident_is_everything(context: int, page_chunks: int) -> None:
    report = kv_report(FLASH, context, keep=1.0, page_chunks=page_chunks)
    assert report.resident_pages == report.num_pages
    assert report.paper.resident_bytes == report.paper.full_bytes
    assert report.paper.ratio == 1.0
    assert report.all_in.device_bytes >= report.all_in.full_bytes


@given(first=st.floats(0.001, 1.0), second=st.floats(0.001, 1.0))
def test_keeping_more_costs_more(first: float, second: float) -> None:
    low, high = (kv_report(FLASH, 500_000, keep=keep) for keep in sorted((first, second)))
    assert low.paper.resident_bytes <= high.paper.resident_bytes
    assert low.all_in.device_bytes <= high.all_in.device_bytes


def test_measured_counts_replace_predictions() -> None:
    base = kv_report(SMALL, 1000, resident_pages=1)
    assert base.paper.resident_components["csa_kv"] == 4 * (250 - 3 * 64) * kv_entry_bytes(SMALL, "fp8")
    measured = kv_report(
        SMALL, 1000, resident_pages=1, host_pages=2, disk_pages=1, slack_pages=3, hca_capacity=10, row_capacity=256
    )
    record = measured.record_bytes
    assert measured.all_in.host_bytes == 2 * record
    assert measured.all_in.disk_bytes == record
    extra_hca = (10 - 1000 // 128) * 2 * kv_entry_bytes(SMALL, "fp8")
    assert measured.all_in.device["slack"] == 3 * record + extra_hca + (256 - 250) * 2 * 28  # 4 CSA layers: 2 targets
    assert measured.all_in.device_bytes == base.all_in.device_bytes + measured.all_in.device["slack"]


def test_kept_pages() -> None:
    assert kept_pages(30, 0.1) == 3
    assert kept_pages(4096, 0.1) == 410
    assert kept_pages(100, 0.001) == 3  # sink and recency
    assert kept_pages(2, 0.5) == 2
    assert kept_pages(0, 0.5) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": None}, "either keep or resident_pages"),
        ({"resident_pages": 5}, "resident_pages must lie in 0..4"),
        ({"num_targets": 22}, "num_targets"),
        ({"hca_capacity": 1}, "hca_capacity"),
        ({"row_capacity": 1}, "row_capacity"),
        ({"state_format": "fp8"}, "state_format"),
    ],
)
def test_contradictions_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kv_report(FLASH, 1000, **{"keep": 0.5, **wrong})
    with pytest.raises(ValueError, match="context_tokens"):
        kv_report(FLASH, -1, keep=0.5)
