"""Intervals and tests for paired answers that come in clusters (several questions about one document).

Wilson 1927 for a share; the paired bootstrap resamples documents; McNemar's test is the exact binomial one; Holm 1979
adjusts a family of tests; non-inferiority of paired shares is Tango's score test (Statistics in Medicine 17, 1998),
which, unlike a bootstrap, does not take "no discordant pair" among few pairs for certainty.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

import numpy as np

from ..training.backbone.gates import wilson

RESAMPLES = 10_000
MARGIN = 0.02
"""Non-inferior means: not more than two points below."""
ALPHA = 0.05


def bootstrap_means(
    values: Sequence[float], clusters: Sequence[Hashable], *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Means of `values` in resamples of whole clusters, float64 [resamples]. Raises ValueError for uneven input."""
    if not values or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values in {len(clusters)} clusters")
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for value, name in zip(values, clusters, strict=True):
        sums[names[name]] += value
        counts[names[name]] += 1
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return np.asarray((drawn @ sums) / (drawn @ counts))


def percentile_interval(samples: np.ndarray, alpha: float = ALPHA) -> tuple[float, float]:
    """The middle 1 - alpha of bootstrap samples."""
    low, high = np.quantile(samples, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided p of as uneven a split of the discordant pairs, were both sides as likely."""
    if min(gained, lost) < 0:
        raise ValueError(f"counts of pairs must not be negative, got {gained} and {lost}")
    pairs = gained + lost
    tail = sum(math.comb(pairs, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**pairs)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, in the given order."""
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(_by_p(p_values)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def holm_alphas(p_values: Sequence[float], alpha: float = ALPHA) -> list[float]:
    """The level that Holm's procedure tests each hypothesis at: what an interval that goes with it must use."""
    alphas = [alpha] * len(p_values)
    for rank, index in enumerate(_by_p(p_values)):
        alphas[index] = alpha / (len(p_values) - rank)
    return alphas


def noninferiority_tango(gained: int, lost: int, pairs: int, margin: float = MARGIN) -> float:
    """One-sided p of "the new share is at least `margin` below the old one"; small means non-inferior.

    `gained` pairs are right only under the new method, `lost` only under the old one.
    """
    if pairs < 1 or min(gained, lost) < 0 or gained + lost > pairs or not 0 < margin < 1:
        raise ValueError(f"{gained} gained and {lost} lost of {pairs} pairs, margin {margin}: this cannot be")
    # The share of lost pairs that is likeliest where the difference of shares is exactly -margin.
    a, b = 2 * pairs, -gained - lost - (2 * pairs - gained + lost) * margin
    c = lost * margin * (1 + margin)
    likeliest = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = pairs * (2 * likeliest - margin * (1 + margin))
    z = (gained - lost + pairs * margin) / math.sqrt(variance)
    return 1 - NormalDist().cdf(z)


@dataclass(frozen=True, slots=True)
class Paired:
    """One method against another on the same items."""

    pairs: int
    clusters: int
    difference: float
    """Mean score of the new method minus that of the old one."""
    interval: tuple[float, float] | None
    """None where all items are about one document."""
    alpha: float
    gained: int
    lost: int
    mcnemar_p: float
    noninferior_p: float
    """The larger of Tango's p on right answers and the clustered bootstrap's on scores."""

    @property
    def noninferior(self) -> bool:
        return self.noninferior_p < ALPHA


def compare_paired(
    new: Sequence[float],
    old: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    discordant: tuple[int, int],
    margin: float = MARGIN,
    alpha: float = ALPHA,
    seed: int = 0,
) -> Paired:
    """Scores of the same items in the same order; `discordant` counts answers right only in new, and only in old."""
    if len(new) != len(old):
        raise ValueError(f"{len(new)} new scores for {len(old)} old ones")
    differences = [a - b for a, b in zip(new, old, strict=True)]
    samples = bootstrap_means(differences, clusters, seed=seed)
    tango = noninferiority_tango(*discordant, len(new), margin)
    documents = len(set(clusters))
    return Paired(
        pairs=len(new),
        clusters=documents,
        difference=fmean(differences),
        interval=percentile_interval(samples, alpha) if documents > 1 else None,
        alpha=alpha,
        gained=discordant[0],
        lost=discordant[1],
        mcnemar_p=mcnemar_exact(*discordant),
        noninferior_p=max(tango, float((samples <= -margin).mean())),
    )


def mean_of_ratios(parts: Sequence[float], wholes: Sequence[float]) -> float:
    """Every row counts alike: the reading of the published 13.5 %."""
    return fmean(part / whole for part, whole in zip(parts, wholes, strict=True))


def ratio_of_means(parts: Sequence[float], wholes: Sequence[float]) -> float:
    """Every byte counts alike."""
    return sum(parts) / sum(wholes)


def _by_p(p_values: Sequence[float]) -> list[int]:
    return sorted(range(len(p_values)), key=lambda index: p_values[index])


__all__ = [
    "ALPHA",
    "MARGIN",
    "Paired",
    "bootstrap_means",
    "compare_paired",
    "holm",
    "holm_alphas",
    "mcnemar_exact",
    "mean_of_ratios",
    "noninferiority_tango",
    "percentile_interval",
    "ratio_of_means",
    "wilson",
]
