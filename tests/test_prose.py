"""The chronicle: the same for the same seed, without repetition, and readable as far as a program can tell."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from flashmem import prose
from flashmem.accounting import shipped_model
from flashmem.training.backbone.corpus import encode_prose
from flashmem.training.backbone.tokenizer import load_tokenizer


def paragraphs(count: int, seed: int = 0) -> list[str]:
    return [" ".join(sentences) for sentences in islice(prose.paragraphs(seed), count)]


def test_a_seed_names_a_text() -> None:
    assert paragraphs(50, seed=3) == paragraphs(50, seed=3)
    assert not set(paragraphs(50, seed=3)) & set(paragraphs(50, seed=4))


def test_sentences_are_those_of_the_paragraphs_with_their_leads() -> None:
    text = "".join(islice(prose.sentences(1), 300))
    assert text.startswith("\n" + "\n".join(paragraphs(20, seed=1)))


def test_no_paragraph_twice_and_few_sentences_in_16k_tokens() -> None:
    tokenizer = load_tokenizer(shipped_model())
    corpus = encode_prose(16_384, tokenizer, seed=5)
    text = tokenizer.decode(corpus.tokens.tolist())
    written = [paragraph for paragraph in text.split("\n") if paragraph]
    assert len(written) > 80
    assert len(set(written)) == len(written)
    sentences = list(islice(prose.sentences(5), len(corpus.sentences) - 1))
    assert len({sentence.strip() for sentence in sentences}) > 0.85 * len(sentences)


def test_text_is_whole_paragraphs(capsys: pytest.CaptureFixture[str]) -> None:
    text = prose.text(5000, seed=1)
    lines = text.splitlines()
    assert 5000 <= len(text) < 5000 + len(lines[-1]) + 1
    assert lines == paragraphs(len(lines), seed=1)
    prose.main(["5000", "--seed", "1"])
    assert capsys.readouterr().out == text
    assert prose.text(0) == ""
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        prose.text(-1)


def test_sentences_are_clean() -> None:
    for sentence in (sentence for sentences in islice(prose.paragraphs(2), 2000) for sentence in sentences):
        assert re.fullmatch(r"[A-Z][A-Za-z,;' -]+\.", sentence), sentence  # no digit, no slot left, one full stop
        assert not re.search(r"\ba [aeiou]|\ban [^aeiouh]|  | ,", sentence), sentence


def test_all_kinds_and_all_months_come() -> None:
    text = " ".join(paragraphs(400))
    assert all(month in text for month in ("January", "April", "July", "October", "December"))
    for openings, body in prose.KINDS.values():
        assert len(body) >= 10 and len(openings) >= 4
    slots = set(re.findall(r"\{(\w+)\}", str(prose.KINDS)))
    of_people = {f"{role}{part}" for role in ("who", "other") for part in ("", "_he", "_his", "_him", "_short")}
    assert slots - of_people - {"date", "sky"} <= prose.SLOTS.keys()


def test_a_corpus_of_prose_is_its_text() -> None:
    tokenizer = load_tokenizer(shipped_model())
    corpus = encode_prose(3000, tokenizer, seed=1)
    assert len(corpus.tokens) >= 3000 and corpus.sentences[-1] == len(corpus.tokens)
    assert np.all(np.diff(corpus.sentences) > 0)
    first, second = (corpus.tokens[corpus.sentences[i] : corpus.sentences[i + 1]].tolist() for i in (0, 1))
    assert [tokenizer.decode(first), tokenizer.decode(second)] == list(islice(prose.sentences(1), 2))


def test_prose_needs_neither_model_nor_tensors() -> None:
    code = "import sys, flashmem.prose; assert not {'torch', 'numpy', 'tokenizers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
