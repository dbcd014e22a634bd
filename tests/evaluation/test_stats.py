"""Intervals and tests against brute force and published or closed-form values."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmem.evaluation import stats

SHARES = st.floats(0, 1)


class TestWilson:
    def test_known_values(self) -> None:
        """Newcombe 1998, Table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
        for right, count, low, high in (
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ):
            assert stats.wilson(right, count) == pytest.approx((low, high), abs=5e-5)

    @given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
    def test_the_ends_solve_the_score_equation(self, counts: tuple[int, int]) -> None:
        right, count = counts
        for end in stats.wilson(right, count):
            if 1e-9 < end < 1 - 1e-9:
                z = (right / count - end) / math.sqrt(end * (1 - end) / count)
                assert abs(z) == pytest.approx(1.959964, rel=1e-4)


class TestBootstrap:
    def test_clusters_are_drawn_whole(self) -> None:
        """Three clusters have ten multisets; every mean is one of theirs, and each comes as often as it should."""
        values, clusters = [1.0, 0.0, 5.0, 2.0, 2.0, 2.0], list("aabccc")
        samples = stats.bootstrap_means(values, clusters, resamples=60_000)
        groups = {"a": (1.0, 2), "b": (5.0, 1), "c": (6.0, 3)}
        chance: dict[float, Fraction] = {}
        for drawn in itertools.product("abc", repeat=3):
            total, count = (sum(groups[name][part] for name in drawn) for part in (0, 1))
            mean = round(total / count, 9)
            chance[mean] = chance.get(mean, Fraction(0)) + Fraction(1, 27)
        means, counts = np.unique(samples.round(9), return_counts=True)
        assert set(means.tolist()) == set(chance)
        for mean, count in zip(means.tolist(), counts.tolist(), strict=True):
            assert count / len(samples) == pytest.approx(float(chance[mean]), abs=0.01)

    def test_one_cluster_each_gives_the_standard_error(self) -> None:
        values = np.random.default_rng(1).normal(size=400).tolist()
        samples = stats.bootstrap_means(values, range(400))
        assert samples.std() == pytest.approx(np.std(values) / 20, rel=0.05)
        low, high = stats.percentile_interval(samples)
        assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 20, rel=0.08)

    @given(st.lists(st.tuples(SHARES, st.integers(0, 3)), min_size=1, max_size=20))
    def test_samples_stay_within_the_values(self, rows: list[tuple[float, int]]) -> None:
        values, clusters = [row[0] for row in rows], [row[1] for row in rows]
        samples = stats.bootstrap_means(values, clusters, resamples=200)
        assert min(values) - 1e-9 <= samples.min() <= samples.max() <= max(values) + 1e-9

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="0 values"):
            stats.bootstrap_means([], [])
        with pytest.raises(ValueError, match="2 values in 1 clusters"):
            stats.bootstrap_means([1.0, 2.0], ["a"])


class TestMcNemar:
    @given(st.integers(0, 6), st.integers(0, 6))
    def test_against_every_split(self, gained: int, lost: int) -> None:
        pairs = gained + lost
        splits = itertools.product((0, 1), repeat=pairs)
        as_uneven = sum(abs(2 * sum(signs) - pairs) >= abs(gained - lost) for signs in splits)
        assert stats.mcnemar_exact(gained, lost) == pytest.approx(as_uneven / 2**pairs)

    def test_known_values(self) -> None:
        assert stats.mcnemar_exact(0, 0) == 1
        assert stats.mcnemar_exact(5, 0) == 2 / 32
        assert stats.mcnemar_exact(1, 9) == pytest.approx(0.021484375)  # the sign test of 1 in 10
        with pytest.raises(ValueError, match="negative"):
            stats.mcnemar_exact(-1, 2)


class TestHolm:
    def test_known_values(self) -> None:
        assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert stats.holm_alphas([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.05 / 3, 0.05, 0.05 / 2, 0.05 / 4])
        assert stats.holm([]) == []

    @given(st.lists(SHARES, min_size=1, max_size=6))
    def test_against_the_closed_test(self, p_values: list[float]) -> None:
        """Holm is the closed test whose local tests are Bonferroni's: the worst of all families with the hypothesis."""
        for index, adjusted in enumerate(stats.holm(p_values)):
            families = (
                family
                for size in range(1, len(p_values) + 1)
                for family in itertools.combinations(range(len(p_values)), size)
                if index in family
            )
            worst = max(min(1.0, len(family) * min(p_values[i] for i in family)) for family in families)
            assert adjusted == pytest.approx(worst)


class TestNonInferiority:
    def test_no_discordant_pair_is_no_certainty(self) -> None:
        """Then z is sqrt(n margin / (1 - margin)): 132 pairs do not exclude a loss of two points, 133 do."""
        for pairs in (20, 132, 133, 1000):
            z = math.sqrt(pairs * 0.02 / 0.98)
            assert stats.noninferiority_tango(0, 0, pairs) == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)))
        assert stats.noninferiority_tango(0, 0, 132) > 0.05 > stats.noninferiority_tango(0, 0, 133)

    def test_the_restricted_estimate_is_the_likeliest(self) -> None:
        """The same statistic with the likelihood maximised over a grid instead of in closed form."""
        for gained, lost, pairs in ((3, 7, 100), (0, 5, 300), (12, 1, 80), (40, 44, 500), (0, 0, 60)):
            margin = 0.02
            lost_share = np.linspace(margin + 1e-9, 0.5, 400_001)
            gained_share = lost_share - margin
            likelihood = (
                lost * np.log(lost_share)
                + (gained * np.log(gained_share) if gained else 0)
                + (pairs - gained - lost) * np.log(1 - lost_share - gained_share)
            )
            best = lost_share[likelihood.argmax()]
            variance = pairs * (2 * best - margin - margin**2)
            z = (gained - lost + pairs * margin) / math.sqrt(variance)
            expected = 0.5 * math.erfc(z / math.sqrt(2))
            assert stats.noninferiority_tango(gained, lost, pairs, margin) == pytest.approx(expected, abs=1e-4)

    def test_errors_keep_to_their_level(self) -> None:
        """Exactly at the margin, five in a hundred trials or so find non-inferiority."""
        rng = np.random.default_rng(0)
        draws = rng.multinomial(400, [0.03, 0.05, 0.92], size=4000)  # gained, lost, alike: two points below
        found = sum(stats.noninferiority_tango(int(g), int(lost), 400) < 0.05 for g, lost, _ in draws)
        assert 0.035 < found / len(draws) < 0.065

    @given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 200))
    def test_more_losses_are_never_better(self, gained: int, lost: int, alike: int) -> None:
        pairs = gained + lost + alike + 1
        assert stats.noninferiority_tango(gained, lost, pairs) <= stats.noninferiority_tango(gained, lost + 1, pairs)

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="cannot be"):
            stats.noninferiority_tango(3, 3, 5)


def test_paired_comparison() -> None:
    new, old = [1.0] * 190 + [0.0] * 10, [1.0] * 180 + [0.0] * 20
    paired = stats.compare_paired(new, old, range(200), discordant=(10, 0))
    assert paired.difference == pytest.approx(0.05)
    assert paired.interval is not None and paired.interval[0] > 0.015 and paired.interval[1] < 0.09
    assert paired.mcnemar_p == pytest.approx(2 / 1024)
    assert paired.noninferior
    one_document = stats.compare_paired(new, old, ["d"] * 200, discordant=(10, 0))
    assert one_document.clusters == 1 and one_document.interval is None
    worse = stats.compare_paired(old, new, range(200), discordant=(0, 10))
    assert not worse.noninferior and worse.noninferior_p > 0.9


def test_both_averages_of_ratios() -> None:
    """The paper's rows (0.04 of 0.17 GB and 0.18 of 1.87 GB) show how far the two lie apart."""
    parts, wholes = [0.04, 0.18], [0.17, 1.87]
    assert stats.mean_of_ratios(parts, wholes) == pytest.approx((0.04 / 0.17 + 0.18 / 1.87) / 2)
    assert stats.ratio_of_means(parts, wholes) == pytest.approx(0.22 / 2.04)
