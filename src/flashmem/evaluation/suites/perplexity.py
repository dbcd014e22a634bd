"""`perplexity`: how well text is continued, by how much text came before, and by how long ago level 1 ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...training.backbone.corpus import Corpus
from ..items import Document, Item, ItemSet

SUITE = "perplexity"
TARGET_TOKENS = 128


def generate(
    corpus: Corpus,
    lengths: Sequence[int],
    *,
    n: int = 10,
    seed: int = 0,
    target_tokens: int = TARGET_TOKENS,
    first_token: int | None = None,
    made: Mapping[str, Any] | None = None,
) -> ItemSet:
    """`n` passages per length, each with what follows it; `first_token` (the BOS of a model) leads each."""
    documents: list[Document] = []
    items: list[Item] = []
    for length in lengths:
        for index in range(n):
            name = f"{length}-{index}"
            generator = np.random.default_rng([seed, length, index])
            lead = () if first_token is None else (first_token,)
            text, _ = corpus.passage(generator, length - len(lead) + target_tokens)
            ids = (*lead, *text.tolist())
            documents.append(Document(id=name, content=ids[:length]))
            items.append(
                Item(
                    id=name,
                    task=SUITE,
                    length=length,
                    document=name,
                    question=(),
                    answers=(),
                    scorer="all",
                    max_new_tokens=target_tokens,
                    target=ids[length:],
                )
            )
    arguments = {"lengths": list(lengths), "n": n, "seed": seed, "target_tokens": target_tokens}
    return ItemSet(suite=SUITE, documents=tuple(documents), items=tuple(items), made=arguments | dict(made or {}))


def corpus_of(path: str | Path, tokenizer: Any) -> Corpus:
    """A text file as token ids of a model's tokenizer."""
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{path} holds no text")
    return Corpus(np.array(ids), np.array([0, len(ids)]))


__all__ = ["SUITE", "corpus_of", "generate"]
