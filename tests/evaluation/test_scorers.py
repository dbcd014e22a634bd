"""Scorers against RULER's rules and the other benchmarks' own."""

from __future__ import annotations

from typing import Any

import pytest

from flashmem.evaluation.items import Item
from flashmem.evaluation.scorers import score


def item(scorer: str, *answers: str, **extra: Any) -> Item:
    return Item(
        id="x", task="t", length=0, document="d", question="?", answers=answers, scorer=scorer, max_new_tokens=9,
        extra=extra,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prediction", "asked", "expected"),
    [
        (" 123, 456 and 9", item("all", "123", "456", "789", "9"), 0.75),
        ("Blue TREE", item("all", "blue tree"), 1),
        ("", item("all", "1"), 0),
        ("it is paris, they say", item("part", "Lyon", "Paris"), 1),
        (" river \n", item("exact", "river"), 1),
        ("rivers", item("exact", "river"), 0),
        ("**The correct answer is (B)**", item("choice", "B"), 1),
        ("The correct answer is B.", item("choice", "B"), 1),
        ("The correct answer is (A)", item("choice", "B"), 0),
        ("B", item("choice", "B"), 0),
        ("The correct answer is Because", item("choice", "B"), 0),
        ("You said: the red bicycle!", item("contains", "A red bicycle"), 1),
        ("Covered wagons", item("contains", "red wagon"), 0),
        ("k7fpoem", item("mrcr", "k7fpoem", prefix="k7f"), 1),
        ("poem", item("mrcr", "k7fpoem", prefix="k7f"), 0),
        ("k7fpoet", item("mrcr", "k7fpoem", prefix="k7f"), 0.75),
    ],
)
def test_scores(prediction: str, asked: Item, expected: float) -> None:
    assert score(prediction, asked) == expected


def test_an_unknown_scorer_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown scorer 'best'"):
        score("x", item("best", "x"))
