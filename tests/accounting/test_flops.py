"""FLOPs: the figures of V4-Flash from its geometry, and symmetry of the two systems."""

from __future__ import annotations

import pytest

from flashmem.accounting import flops_report, resolve_geometry
from flashmem.accounting.flops import constant_flops, level1_flops, scoring_flops

FLASH = resolve_geometry("deepseek-v4-flash")


def test_constant_of_flash() -> None:
    billions = {name: value / 1e9 for name, value in constant_flops(FLASH).items()}
    expected = {
        "experts": 15.15,
        "attention_projections": 9.20,
        "head": 1.06,
        "index_queries": 0.36,
        "compressors": 0.61,
        "router": 0.09,
    }
    assert {name: round(billions[name], 2) for name in expected} == expected
    assert sum(billions.values()) == pytest.approx(26.64, rel=0.004)  # the published constant, hyper-connections in


def test_terms_of_flash() -> None:
    full = flops_report(FLASH, 1 << 20, resident_chunks=0).full
    assert scoring_flops(64, 128) == 16_512
    assert full.attend == pytest.approx(1.409e9, rel=1e-3)
    assert full.scoring == 21 * 16_512 * (1 << 18)
    assert full.dense_hca == 20 * 8192 * 64 * 1024 * 2
    assert full.window == pytest.approx(0.72e9, rel=1e-2)
    assert full.level1 == 0


@pytest.mark.parametrize(
    ("context", "pages", "full", "lsa"),
    [(256, 96, 56.9, 36.4), (512, 192, 85.0, 44.0), (1024, 384, 141.1, 59.2)],
)
def test_whole_model_totals_of_flash(context: int, pages: int, full: float, lsa: float) -> None:
    """Symmetric totals in GFLOP at the published page budgets."""
    report = flops_report(FLASH, context * 1024, resident_chunks=pages * 64)
    assert report.full.total / 1e9 == pytest.approx(full, rel=0.005)
    assert report.lsa.total / 1e9 == pytest.approx(lsa, rel=0.005)


def test_level1_is_spread_over_the_cycle() -> None:
    once = level1_flops(FLASH, 1000, num_targets=3, observation_window=1, heads=128, rank=2048)
    query = 2 * (4096 * 2048 + 2048 * 128 * 128 + 4096 * 128)
    assert once == 3 * (query + 1000 * 128 * 258)
    assert flops_report(FLASH, 4000, resident_chunks=0, tau=16).lsa.level1 == once // 16
    assert flops_report(FLASH, 4000, resident_chunks=0, tau=16, observation_window=4).lsa.level1 == 4 * once // 16


def test_everything_resident_differs_by_level1_only() -> None:
    report = flops_report(FLASH, 100_000, resident_chunks=25_000)
    assert report.lsa.total - report.full.total == report.lsa.level1 > 0


def test_short_contexts_pick_what_there_is() -> None:
    report = flops_report(FLASH, 40, resident_chunks=10)
    assert report.full.attend == 21 * 10 * 64 * 2 * 1024
    assert report.full.window == 43 * 40 * 64 * 2 * 1024


def test_bad_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="resident_chunks"):
        flops_report(FLASH, 40, resident_chunks=11)
    with pytest.raises(ValueError, match="tau"):
        flops_report(FLASH, 40, resident_chunks=1, tau=0)
