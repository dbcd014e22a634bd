"""Scores of an answer, each between 0 and 1. An answer counts as right when its score is 1.

`all` and `part` are RULER's `string_match_all` and `string_match_part`: references are looked for as substrings,
without regard to case.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from difflib import SequenceMatcher

from .items import Item

_CHOICE = re.compile(r"The correct answer is \(?([A-D])\b")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


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


def choice(prediction: str, item: Item) -> float:
    """LongBench-v2: 1 if the prediction says which letter is correct, in the words that were asked for."""
    found = _CHOICE.search(prediction.replace("*", ""))
    return float(found is not None and found[1] == item.answers[0])


def contains(prediction: str, item: Item) -> float:
    """LongMemEval without a judge: 1 if a reference is in the prediction, without case, articles and punctuation.

    Strict where a reference is a sentence; whoever has a judge should ask it.
    """
    found = f" {normalised(prediction)} "
    return float(any(f" {normalised(answer)} " in found for answer in item.answers))


def mrcr(prediction: str, item: Item) -> float:
    """OpenAI MRCR: likeness of the texts behind the random string; 0 where the answer does not begin with it."""
    prefix = str(item.extra["prefix"])
    if not prediction.startswith(prefix):
        return 0.0
    wanted = item.answers[0].removeprefix(prefix)
    return SequenceMatcher(None, prediction.removeprefix(prefix), wanted).ratio()


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(_ARTICLES.sub(" ", plain).split())


Scorer = Callable[[str, Item], float]
SCORERS: dict[str, Scorer] = {
    "all": all_of,
    "part": any_of,
    "exact": exact,
    "choice": choice,
    "contains": contains,
    "mrcr": mrcr,
}


def score(prediction: str, item: Item) -> float:
    """Score by the item's own scorer; raises ValueError for an unknown one."""
    if item.scorer not in SCORERS:
        raise ValueError(f"item {item.id}: unknown scorer {item.scorer!r}; known are {', '.join(SCORERS)}")
    return SCORERS[item.scorer](prediction, item)


__all__ = ["SCORERS", "all_of", "any_of", "choice", "contains", "exact", "mrcr", "normalised", "score"]
