"""Rows: exact lengths, answers where they are said to be, evidence, and splits that share nothing."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from flashmem.training.backbone.batches import LM, Source, make_batch
from flashmem.training.backbone.corpus import Corpus, encode_books, read_books, sentences_of
from flashmem.training.backbone.gates import document, summary, values_of, wilson
from flashmem.training.backbone.recipe import Recipe, Stage
from flashmem.training.backbone.tasks import FAMILIES, Draw, Lexicon, frequent_words_row, pairs_row, recall_row
from flashmem.training.backbone.tokenizer import EOS_ID, load_tokenizer

MODEL = Path(__file__).parents[3] / "src/flashmem/models/demo"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The shipped tokenizer and words, over prose made here."""
    folder = tmp_path_factory.mktemp("books")
    rng = random.Random(0)
    words = (MODEL / "words.txt").read_text().split()
    sentences = [" ".join(rng.choices(words, k=rng.randint(4, 14))).capitalize() + "." for _ in range(3000)]
    (folder / "book.txt").write_text("\n\n".join(" ".join(sentences[i : i + 9]) for i in range(0, 3000, 9)))
    corpus = encode_books([folder / "book.txt"], load_tokenizer(MODEL))
    return Source(Lexicon.load(MODEL), corpus, "train")


def row_of(source: Source, family: str, length: int, seed: int = 0):  # type: ignore[no-untyped-def]
    rng = random.Random(seed)
    return recall_row(
        rng, source.lexicon, source.corpus, source.split, length, [family], facts_share=0.3, questions_share=0.4
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("length", [256, 2048])
def test_rows_have_their_length_and_answers(source: Source, family: str, length: int) -> None:
    for seed in range(5):
        row = row_of(source, family, length, seed)
        assert len(row.ids) == len(row.prose) == length
        assert row.answers
        for answer in row.answers:
            assert answer.prompt_start < answer.start < answer.stop <= length
            assert not row.prose[answer.prompt_start : answer.stop].any()
            assert values_of(answer)
            for first, last in answer.evidence:
                assert 0 < first < last <= answer.prompt_start


@pytest.mark.parametrize("family", ["number", "kv", "song", "talk", "vt"])
def test_the_answer_stands_in_the_evidence(source: Source, family: str) -> None:
    decode = source.lexicon.tokenizer.decode
    for seed in range(10):
        row = row_of(source, family, 1024, seed)
        for answer in row.answers:
            said = "".join(decode(row.ids[a:b].tolist()) for a, b in answer.evidence)
            for value in values_of(answer):
                tokens = [int(row.ids[answer.start + offset]) for offset in value]
                assert decode([t for t in tokens if t != EOS_ID]).split(",")[0].strip() in said


def test_rows_are_their_own_text(source: Source) -> None:
    """Tokenising a row's text gives the row, so that prompts typed by a user look like training."""
    tokenizer = source.lexicon.tokenizer
    same = 0
    for seed in range(20):
        row = row_of(source, "kv", 512, seed)
        text = tokenizer.decode(row.ids.tolist(), skip_special_tokens=False)
        same += tokenizer.encode(text).ids == row.ids.tolist()
    assert same >= 18  # a passage cut inside a word may tokenise anew


def test_splits_share_nothing(source: Source) -> None:
    drawn = {}
    for split in ("train", "test"):
        draw = Draw(random.Random(1), source.lexicon, split)  # type: ignore[arg-type]
        for _ in range(60):
            draw.key(), draw.number(7), draw.variable(), draw.name(), draw.pair_value()
        drawn[split] = draw.taken
    assert not drawn["train"] & drawn["test"]


def test_books_are_held_out_whole(tmp_path: Path) -> None:
    for index in range(25):
        (tmp_path / f"{index:02d}.txt").write_text("x")
    train, test = read_books(tmp_path, "train"), read_books(tmp_path, "test")
    assert len(test) == 2 and sorted(train + test) == read_books(tmp_path) and not set(train) & set(test)


def test_sentences_keep_every_word() -> None:
    text = 'It was late.  "Go," he said. She\nwent!\n\nThe end'
    pieces = list(sentences_of(text))
    assert pieces == ["\nIt was late.", ' "Go," he said.', " She went!", "\nThe end"]


def test_passages_go_round(source: Source) -> None:
    small = Corpus(source.corpus.tokens[:100], np.array([0, 30, 70, 100]))
    tokens, starts = small.passage(np.random.default_rng(0), 350)
    first = int(np.flatnonzero([np.array_equal(small.tokens[s : s + 20], tokens[:20]) for s in (0, 30, 70)])[0])
    origin = (0, 30, 70)[first]
    assert np.array_equal(tokens, small.tokens[np.arange(origin, origin + 350) % 100])
    assert set((starts + origin) % 100) == {0, 30, 70} and starts.max() < 350 and len(starts) in (10, 11)


def test_batches_repeat_and_differ(source: Source) -> None:
    kinds = {"any": 0.5, "lm": 0.25, "pairs": 0.25}
    recipe = Recipe(stages=(Stage(length=512, rows=4, steps=9, kinds=kinds, hide=0.5, skip=0.5),), logit_rows=1024)
    first, again, other = (make_batch(source, recipe, 0, step) for step in (3, 3, 4))
    assert np.array_equal(first.ids_BS, again.ids_BS) and np.array_equal(first.weights_R, again.weights_R)
    assert not np.array_equal(first.ids_BS, other.ids_BS)
    flat = first.ids_BS.reshape(-1)
    used = first.weights_R > 0
    assert np.array_equal(flat[first.rows_R[used] + 1], first.targets_RC[used, 0])
    assert first.weights_R.sum() == pytest.approx(1 + recipe.stages[0].lm_weight, abs=1e-3)
    assert (first.groups_R == LM).any() and (np.diff(first.positions_BS) >= 1).all()


def test_special_rows(source: Source) -> None:
    rng = random.Random(0)
    words = frequent_words_row(rng, source.lexicon, "train", 512)
    answer = words.answers[0]
    counts = np.bincount(words.ids[1 : answer.prompt_start])
    top = set(words.ids[answer.start : answer.start + 3].tolist())
    assert min(counts[list(top)]) >= sorted(counts)[-3]
    pairs = pairs_row(rng, source.lexicon, "train", 128, 8)
    for answer in pairs.answers:
        key, value = pairs.ids[answer.start - 1], pairs.ids[answer.start]
        before = pairs.ids[1 : answer.start - 1].reshape(-1, 2)
        assert value in before[before[:, 0] == key, 1]


def test_documents_are_test_documents_and_repeat(source: Source) -> None:
    held_out = Source(source.lexicon, source.corpus, "test")
    for kind in ("single", "multikey", "multivalue", "multiquery", "vt", "fwe"):
        row = document(kind, held_out, 2048, "0/1")
        assert len(row.ids) == 2048 and len(row.answers) == 1
        assert np.array_equal(row.ids, document(kind, held_out, 2048, "0/1").ids)


def test_intervals() -> None:
    low, high = wilson(24, 24)
    assert high == 1 and low == pytest.approx(0.862, abs=1e-3)
    right = {"family": "kv", "exact": True, "values": 1.0}
    wrong = {"family": "vt", "exact": False, "values": 0.5}
    made = summary([[right, wrong], [right, right]])
    assert made["exact"] == 0.75 and made["values"] == 0.875 and made["families"]["vt"]["questions"] == 1
