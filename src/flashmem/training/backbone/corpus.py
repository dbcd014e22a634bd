"""Novels as token ids with sentence starts: the filler of every long training row and the language-modelling text.

    python -m flashmem.training.backbone.corpus --novels novels/ --out corpus/

writes `tokenizer.json`, `train.npz` and `test.npz`. Whole books are held out for the test split.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from ... import prose
from .tokenizer import load_tokenizer, train_tokenizer

Split = Literal["train", "test"]
TEST_EVERY = 10
"""Every tenth book, in the order of file names, belongs to the test split."""
_STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "_": None})
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s+[\"'A-Z])|(?<=[.!?][\"'])(?=\s+[\"'A-Z])")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids of many books, one after another, and where sentences start (the end of the last one included)."""

    tokens: np.ndarray
    sentences: np.ndarray

    @classmethod
    def load(cls, path: str | Path) -> Corpus:
        with np.load(path) as arrays:
            lengths = arrays["lengths"].astype(np.int64)
            return cls(arrays["tokens"], np.concatenate([[0], np.cumsum(lengths)]))

    def save(self, path: str | Path) -> None:
        lengths = np.diff(self.sentences)
        np.savez_compressed(path, tokens=self.tokens.astype(np.uint16), lengths=lengths.astype(np.uint16))

    def passage(self, rng: np.random.Generator, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Text of exactly num_tokens tokens from a random sentence on, and the sentence starts inside it.

        Text longer than the corpus goes round: the books repeat.
        """
        first = int(rng.integers(0, len(self.sentences) - 1))
        start = int(self.sentences[first])
        total, starts = len(self.tokens), self.sentences[:-1]
        picked = self.tokens[np.arange(start, start + num_tokens) % total]
        inside = [starts[first : np.searchsorted(starts, start + num_tokens)] - start]
        for turn in range(1, (start + num_tokens - 1) // total + 1):
            offset = turn * total - start
            inside.append(starts[: np.searchsorted(starts, num_tokens - offset)] + offset)
        return picked, np.concatenate(inside)


def read_books(folder: str | Path, split: Split | None = None) -> list[Path]:
    """Files of a split in the order of their names; None gives all of them."""
    books = sorted(Path(folder).glob("*.txt"))
    if not books:
        raise ValueError(f"no .txt file in {folder}")
    held_out = books[TEST_EVERY - 1 :: TEST_EVERY]
    if split is None:
        return books
    return held_out if split == "test" else [book for book in books if book not in held_out]


def sentences_of(text: str) -> Iterator[str]:
    """Sentences with the space or line break that leads them; hard line breaks inside a paragraph become spaces."""
    for paragraph in re.split(r"\n\s*\n", text.translate(_STRAIGHT)):
        joined = " ".join(paragraph.split())
        pieces = _SENTENCE_END.split(joined) if joined else []
        for index, piece in enumerate(pieces):
            yield piece if index else "\n" + piece


def common_words(books: Sequence[Path], tokenizer: Tokenizer, *, skip: int = 150) -> list[str]:
    """Lower-case words of four to ten letters that are one token after a space; not the `skip` most frequent ones."""
    counts: Counter[str] = Counter()
    for book in books:
        counts.update(re.findall(r"(?<= )[a-z]{4,10}(?=[ .,;])", book.read_text(encoding="utf-8", errors="replace")))
    single = [word for word, count in counts.most_common() if count >= 200 and _is_one_token(word, tokenizer)]
    return sorted(single[skip:])


def _is_one_token(word: str, tokenizer: Tokenizer) -> bool:
    return len(tokenizer.encode(" " + word, add_special_tokens=False).ids) == 1


def encode_books(books: Sequence[Path], tokenizer: Tokenizer) -> Corpus:
    """Tokenise whole books sentence by sentence."""
    texts = (list(sentences_of(book.read_text(encoding="utf-8", errors="replace"))) for book in books)
    return encode_sentences(texts, tokenizer)


def encode_prose(num_tokens: int, tokenizer: Tokenizer, seed: int | str = 0) -> Corpus:
    """At least so many tokens of our own chronicle (`flashmem.prose`): what stands in where there are no books."""
    stream, pieces = prose.sentences(seed), list[Corpus]()
    while sum(len(piece.tokens) for piece in pieces) < num_tokens:
        pieces.append(encode_sentences([list(islice(stream, 500))], tokenizer))
    lengths = np.concatenate([np.diff(piece.sentences) for piece in pieces])
    return Corpus(np.concatenate([piece.tokens for piece in pieces]), np.concatenate([[0], np.cumsum(lengths)]))


def encode_sentences(texts: Iterable[Sequence[str]], tokenizer: Tokenizer) -> Corpus:
    """Tokenise texts given as sentences, each with the space or line break that leads it."""
    ids: list[np.ndarray] = []
    for sentences in texts:
        ids += [np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(sentences, add_special_tokens=False)]
    ids = [piece for piece in ids if len(piece)]
    return Corpus(np.concatenate(ids), np.concatenate([[0], np.cumsum([len(piece) for piece in ids])]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=Path, required=True, help="folder of plain text books")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        books = (book.read_text(encoding="utf-8", errors="replace") for book in read_books(args.novels, "train"))
        tokenizer = train_tokenizer(("".join(sentences_of(b)) for b in books), vocab_size=args.vocab_size)
    tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "words.txt").write_text("\n".join(common_words(read_books(args.novels, "train"), tokenizer)) + "\n")
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        corpus = encode_books(read_books(args.novels, split), tokenizer)
        corpus.save(args.out / f"{split}.npz")
        print(f"{split}: {len(corpus.tokens):,} tokens, {len(corpus.sentences) - 1:,} sentences")


if __name__ == "__main__":
    main()
