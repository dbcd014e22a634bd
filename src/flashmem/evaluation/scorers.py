"""Scores of an answer, each between 0 and 1. An answer counts as right when its score is 1.

`all` and `part` are RULER's `string_match_all` and `string_match_part`: references are looked for as substrings,
without regard to case.
"""

from __future__ import annotations

from collections.abc import Callable

from .items import Item


def all_of(prediction: str, item: Item) -> float:
    """Share of the references that the prediction contains."""
    found = prediction.lower()
    return sum(answer.lower() in found for answer in item.answers) / len(item.answers)


def any_of(prediction: str, item: Item) -> float:
    """1 if the prediction contains one of the references."""
    found = prediction.lower()
    return float(any(answer.lower() in found for answer in item.answers))


def exact(prediction: str, item: Item) -> float:
    """1 if the prediction is one of the references, up to space at its ends."""
    return float(prediction.strip() in item.answers)


Scorer = Callable[[str, Item], float]
SCORERS: dict[str, Scorer] = {"all": all_of, "part": any_of, "exact": exact}


def score(prediction: str, item: Item) -> float:
    """Score by the item's own scorer; raises ValueError for an unknown one."""
    if item.scorer not in SCORERS:
        raise ValueError(f"item {item.id}: unknown scorer {item.scorer!r}; known are {', '.join(SCORERS)}")
    return SCORERS[item.scorer](prediction, item)


__all__ = ["SCORERS", "all_of", "any_of", "exact", "score"]
