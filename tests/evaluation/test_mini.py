"""Documents of mini-table1 have the asked length, hold what the answers need, and are the same for the same seed."""

from __future__ import annotations

import pytest

from flashmem.accounting.models import shipped_model
from flashmem.evaluation.items import ItemSet
from flashmem.evaluation.suites import mini
from flashmem.training.backbone.tasks import Lexicon


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon.load(shipped_model())


@pytest.fixture(scope="module")
def items(lexicon: Lexicon) -> ItemSet:
    return mini.generate(lexicon, mini.filler(None, lexicon, prose_tokens=20_000)[0], [2048, 4096], n=5, per_document=2)


def test_every_cell_has_its_items(items: ItemSet) -> None:
    for length in (2048, 4096):
        for task in mini.TASKS:
            assert sum(item.task == task and item.length == length for item in items.items) == 5
    assert [len(document.content) for document in items.documents] == [2048] * 3 + [4096] * 3


def test_evidence_holds_the_answers(lexicon: Lexicon, items: ItemSet) -> None:
    contents = {document.id: document.content for document in items.documents}
    for item in items.items:
        ids = [token for first, last in item.evidence for token in contents[item.document][first:last]]
        text = lexicon.tokenizer.decode(ids)
        wanted = item.answers if item.task != "hop" else item.answers[0].split(": ")
        assert all(answer in text for answer in wanted), item.id
        assert item.max_new_tokens > len(lexicon.tokenizer.encode(" ".join(item.answers)).ids)


def test_the_number_of_references(items: ItemSet) -> None:
    counts = {item.task: len(item.answers) for item in items.items}
    assert counts == {
        "single": 1, "multivalue": 4, "multiquery": 4, "vt": 5, "talk": 1, "hop": 1, "ahead": 16, "song": 1,
    }  # fmt: skip


def test_a_seed_names_its_items(lexicon: Lexicon, items: ItemSet) -> None:
    corpus = mini.filler(None, lexicon, prose_tokens=20_000)[0]
    again = mini.generate(lexicon, corpus, [2048, 4096], n=5, per_document=2)
    other = mini.generate(lexicon, corpus, [2048, 4096], n=5, per_document=2, seed=1)
    assert again == items
    assert other.documents != items.documents


def test_what_cannot_be_made_is_refused(lexicon: Lexicon) -> None:
    corpus = mini.filler(None, lexicon, prose_tokens=20_000)[0]
    with pytest.raises(ValueError, match="unknown tasks chess"):
        mini.generate(lexicon, corpus, [2048], names=["chess"])
    with pytest.raises(ValueError, match="the row has"):
        mini.generate(lexicon, corpus, [512])
